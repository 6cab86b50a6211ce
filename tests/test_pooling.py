"""The last real token by the mask: padding of either side, pad == eos and full rows change no logit."""

import pytest
import torch
from torch import Tensor, nn

from llmkd.models.lora import add_lora
from llmkd.models.pooling import autocast, class_logits, last_real_token, resolve_precision

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
