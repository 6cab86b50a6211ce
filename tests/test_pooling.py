"""The last real token by the mask: padding of either side, pad == eos and full rows change no logit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkd.models.lora import add_lora
from llmkd.models.pooling import (
    autocast,
    class_logits,
    depth,
    head_logits,
    last_real_token,
    logits_and_states,
    pooled,
    resolve_precision,
    without_dropout,
)

EOS = 2  # also the pad token
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
    "pad_token_id": EOS,
    "eos_token_id": EOS,
    "max_position_embeddings": 32,
}
DECODER = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": DECODER,
    "qwen2": DECODER,
    "gemma2": {**DECODER, "head_dim": 8, "sliding_window": 4},
    "bert": SIZES,
}
DECODERS = ["llama", "qwen2", "gemma2"]
ROWS = [  # one ends in the pad token, one holds it, one is a single token, one fills the length
    [5, 9, EOS],
    [7, EOS, EOS, 8, 11],
    [EOS],
    [3, 4, 5, 6, 7, 8, 9],
    [13, 14, 15, EOS, EOS, EOS, EOS],
]


def classifier(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name in ("score.weight", "classifier.weight"):
            nn.init.normal_(parameter)  # so that logits differ by more than rounding
    return model


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), EOS), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: nn.Module, row: list[int]) -> Tensor:
    return class_logits(
        model, input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)
    )[0]


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float])
def test_last_real_token(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]])
    assert last_real_token(mask.to(dtype)).tolist() == [1, 3, 3, 0, 3, 2]


@pytest.mark.parametrize(
    ("architecture", "side"),
    [*((name, side) for name in DECODERS for side in ("left", "right")), ("bert", "right")],
)
@torch.no_grad()
def test_a_padded_row_has_the_logits_it_has_alone(architecture: str, side: str) -> None:
    model = classifier(architecture)
    found = class_logits(model, **padded(ROWS, side))
    expected = torch.stack([alone(model, row) for row in ROWS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert found.std(0).min() > 0.05, "the rows must differ for this to show anything"


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
@torch.no_grad()
def test_a_single_row_has_the_librarys_own_logits(architecture: str) -> None:
    """Where nothing is padded and no text ends in the pad token, both must agree."""
    model, row = classifier(architecture), [5, 9, EOS, 7]
    own = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, 4, dtype=torch.long)).logits[0]
    torch.testing.assert_close(alone(model, row), own)


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
@torch.no_grad()
def test_a_fresh_adapter_changes_no_logit(architecture: str) -> None:
    model = classifier(architecture)
    before = class_logits(model, **padded(ROWS, "right"))
    torch.testing.assert_close(
        class_logits(add_lora(model, r=2, alpha=4).eval(), **padded(ROWS, "right")), before
    )


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_float32_head_over_a_bf16_backbone(architecture: str, precision: str) -> None:
    """As `load_in: bf16` leaves it, with autocast and without."""
    model = add_lora(classifier(architecture, torch.bfloat16), r=2, alpha=4)
    with autocast(precision, "cpu"):
        found = class_logits(model, **padded(ROWS, "right"))
    assert found.dtype == torch.float32
    found.sum().backward()
    expected = class_logits(classifier(architecture), **padded(ROWS, "right"))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_hidden_states_are_the_library_s_and_come_with_the_logits(architecture: str, lora: bool) -> None:
    """Only those asked for, from one forward."""
    model, inputs, forwards = classifier(architecture), padded(ROWS, "right"), list[Any]()
    expected = model.base_model(**inputs, output_hidden_states=True).hidden_states
    own = class_logits(model, **inputs)
    wrapped = add_lora(model, r=2, alpha=4).eval() if lora else model
    model.base_model.register_forward_hook(lambda *_: forwards.append(1))
    logits, states = logits_and_states(wrapped, [2, 0, 2], **inputs)
    assert (set(states), len(forwards), depth(wrapped)) == ({0, 2}, 1, 2)
    torch.testing.assert_close(logits, own)
    for layer, state in states.items():
        torch.testing.assert_close(state, expected[layer])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_row_is_stood_for_by_its_last_token_or_its_first(architecture: str) -> None:
    hidden, mask = torch.arange(12.0).view(2, 3, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = [[2.0, 3.0], [10.0, 11.0]] if architecture == "llama" else [[0.0, 1.0], [6.0, 7.0]]
    assert pooled(classifier(architecture), hidden, mask).tolist() == expected


def test_a_net_that_is_no_transformer_has_no_depth() -> None:
    assert depth(nn.Linear(1, 1)) == 0


def test_a_head_that_zero_3_has_cut_up_reads_the_dtype_of_its_shards() -> None:
    """Its weight is an empty stand-in between forwards, and keeps no dtype that it is gathered in."""
    seen: list[torch.dtype] = []

    class Head:
        weight = nn.Parameter(torch.empty(0))

        def __call__(self, vectors: Tensor) -> Tensor:
            seen.append(vectors.dtype)
            return vectors

    Head.weight.ds_tensor = torch.empty(3, dtype=torch.bfloat16)
    assert head_logits(Head(), torch.ones(2, 3)).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_without_dropout_only_nf4_layers_stay_in_training_mode() -> None:
    linear4bit = type("Linear4bit", (nn.Linear,), {})(2, 2)
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(linear4bit)).train()
    without_dropout(model)
    assert [module.training for module in model.modules()] == [False, False, False, True]


def test_autocast_computes_in_bf16_or_not() -> None:
    a = torch.randn(3, 3)
    with autocast("bf16", "cpu"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_precision_is_what_the_processor_computes(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_precision("auto") == expected
    assert [resolve_precision(asked) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]
