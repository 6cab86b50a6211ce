"""Exits: the depths, the heads on disk, and the shorter model with the exit's own logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from llmkd.errors import ModelError
from llmkd.models.artifact import load_artifact
from llmkd.models.exits import (
    FILE,
    depths,
    exit_logits,
    load_exits,
    mean_exits,
    new_exits,
    save_exits,
    truncate,
    write_exits,
)
from llmkd.models.lora import add_lora, trainable
from llmkd.models.pooling import class_logits

INPUTS = tiny.examples(6).inputs(np.arange(6))


def model(architecture: str = "llama", layers: int = 4, **settings: Any) -> Any:
    return tiny.classifier(architecture, num_hidden_layers=layers, **settings).eval()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(2, [1]), (3, [1, 2]), (4, [1, 2, 3]), (6, [2, 3, 5]), (12, [3, 6, 9]), (42, [11, 21, 32])],
)
def test_depths_are_the_quarters(layers: int, expected: list[int]) -> None:
    assert depths(layers) == expected


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_of_one_layer_has_no_exit(layers: int) -> None:
    with pytest.raises(
        ModelError, match=f"a model of {layers} layers has no depth to exit at; take one of 2"
    ):
        depths(layers)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "bert"])
@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_the_shorter_model_has_the_exit_s_logits(architecture: str, lora: bool, tmp_path: Path) -> None:
    """Also once it is saved and loaded as what it is, an ordinary classifier; and the model is as before."""
    whole = model(architecture)
    if lora:
        whole = add_lora(whole, r=2, alpha=4).eval()
        for parameter in trainable(whole).values():
            parameter.normal_(std=0.2)
    exits = new_exits(whole, [1, 3], seed=5)
    own, found = exit_logits(whole, exits, **INPUTS)
    torch.testing.assert_close(own, class_logits(whole, **INPUTS))
    assert list(found) == [1, 3]
    for depth, logits in found.items():
        short = truncate(whole, depth, exits[str(depth)].state_dict())
        assert short.config.num_hidden_layers == depth
        torch.testing.assert_close(class_logits(short, **INPUTS), logits, rtol=1e-5, atol=1e-5)
        short.save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        again, _ = load_artifact(tmp_path)
        torch.testing.assert_close(class_logits(again, **INPUTS), logits, rtol=1e-5, atol=1e-5)
        assert float((logits - own).abs().max()) > 0.01, "an exit is another classifier"
    torch.testing.assert_close(class_logits(whole, **INPUTS), own, rtol=0, atol=0)


def test_a_model_whose_layers_are_not_alike_is_not_cut_to_something_else() -> None:
    whole = model()
    whole.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"of 2 layers differs in model.extra.bias; it cannot be cut"):
        truncate(whole, 2, head())


def test_a_bf16_model_is_cut_in_bf16() -> None:
    whole = model("gemma2").bfloat16()
    exits = new_exits(whole, [2])
    assert exits["2"].weight.dtype == torch.float32
    short = truncate(whole, 2, exits["2"].state_dict())
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}


def test_a_head_is_the_model_s_own_kind() -> None:
    assert [new_exits(model(name), [1])["1"].bias is not None for name in ("llama", "bert")] == [False, True]


def test_heads_are_drawn_from_the_seed_alone() -> None:
    first = new_exits(model(), [1, 2], seed=1).state_dict()
    torch.manual_seed(7)
    torch.testing.assert_close(new_exits(model(), [2, 1], seed=1).state_dict(), first, rtol=0, atol=0)
    assert not torch.equal(new_exits(model(), [1], seed=2)["1"].weight, first["1.weight"])


def test_heads_on_disk_are_averaged_depth_by_depth(tmp_path: Path) -> None:
    folds = [tmp_path / "fold0", tmp_path / "fold1"]
    heads = [new_exits(model("bert"), [1, 2], seed) for seed in (0, 1)]
    for exits, directory in zip(heads, folds, strict=True):
        save_exits(exits, directory)
    mean = mean_exits(folds)
    assert list(mean) == [1, 2]
    for depth, state in mean.items():
        for name, tensor in state.items():
            one, two = (getattr(exits[str(depth)], name) for exits in heads)
            torch.testing.assert_close(tensor, (one + two) / 2)
    write_exits(mean, tmp_path)
    torch.testing.assert_close(load_exits(tmp_path), mean, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [[1], [1, 3]])
def test_folds_with_other_depths_are_refused(wrong: list[int], tmp_path: Path) -> None:
    save_exits(new_exits(model(), [1, 2]), tmp_path / "fold0")
    save_exits(new_exits(model(), wrong), tmp_path / "fold1")
    with pytest.raises(ModelError, match=r"fold1 has exits other than .*fold0; train the folds alike"):
        mean_exits([tmp_path / "fold0", tmp_path / "fold1"])


def test_missing_and_damaged_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"has no {FILE}; train with method: self_distillation"):
        load_exits(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"damaged .*; train that fold again"):
        load_exits(tmp_path)
    write_exits({1: {"bias": torch.zeros(3)}}, tmp_path)
    with pytest.raises(ModelError, match=r"lacks the heads of the depths \[1\]"):
        load_exits(tmp_path)


@pytest.mark.parametrize("wrong", [[], [0], [4], [1, 5]])
def test_a_depth_that_the_model_has_not_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ModelError, match=r"choose depths from 1 to 3 of its 4 layers"):
        new_exits(model(), wrong)


@pytest.mark.parametrize("architecture", ["distilbert", "electra", "gpt2"])
def test_a_model_without_a_shared_end_is_refused(architecture: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(architecture, **small))
    with pytest.raises(
        ModelError, match=r"ForSequenceClassification has no layers with a shared norm or pooler"
    ):
        new_exits(whole, [1])


def head(width: int = 32) -> dict[str, Tensor]:
    return {"weight": torch.zeros(3, width)}


def test_a_cut_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ModelError, match="no exit at depth 4 of 4 layers; choose one below"):
        truncate(model(), 4, head())
    with pytest.raises(ModelError, match=r"the exit's head at depth 2 is .*\(3, 16\).*; use its own exits"):
        truncate(model(), 2, head(16))
    quantized = model()
    quantized.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="exits of a quantized model cannot be cut out; cut the float one"):
        truncate(quantized, 2, head())
