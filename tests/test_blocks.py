"""Gemma 2's blocks of attention, its norms, and LoRA layers as one operation: the numbers stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import classifier
from torch import Tensor, nn

from llmkd.models import blocks, pooling
from llmkd.models.gemma2 import tune
from llmkd.models.lora import add_lora
from llmkd.models.lora_linear import fuse
from llmkd.models.pooling import autocast, class_logits

LENGTH = 300  # more than one block of queries


def gemma(**settings: Any) -> Any:
    return classifier(
        "gemma2", num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=512, **settings
    )


def rows() -> dict[str, Tensor]:
    """Unpadded, padded on the right, padded on the left."""
    torch.manual_seed(1)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 200:], mask[2, :40] = 0, 0
    return {"input_ids": torch.randint(3, 64, (3, LENGTH)), "attention_mask": mask}


def logits_and_gradients(model: nn.Module, precision: str = "fp32") -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    with autocast(precision, "cpu"):
        logits = class_logits(model, **rows())
    (logits * torch.randn(3, 3)).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return logits.detach(), found


def assert_alike(one: nn.Module, two: nn.Module, precision: str, tolerance: float) -> None:
    (logits, gradients), (others, theirs) = (logits_and_gradients(m, precision) for m in (one, two))
    assert (logits - others).abs().max() <= tolerance * others.abs().max()
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= 10 * tolerance * gradient.abs().max() + 1e-9, name


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """A model that stays in transformers' own way."""
    kept: list[Any] = []
    monkeypatch.setattr(pooling, "tune", lambda model: None if model in kept else tune(model))

    def keep(model: nn.Module) -> nn.Module:
        kept.append(pooling.unwrapped(model))
        return model

    return keep


@pytest.mark.parametrize("window", [50, 512])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_blocks_give_what_eager_attention_gives(
    eager: Callable[[nn.Module], nn.Module], window: int, precision: str, tolerance: float
) -> None:
    model = gemma(sliding_window=window)
    usual = eager(copy.deepcopy(model))
    assert_alike(model, usual, precision, tolerance)
    assert model.config._attn_implementation == blocks.NAME
    assert usual.config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_frozen_norms_give_what_they_gave(
    eager: Callable[[nn.Module], nn.Module], precision: str, tolerance: float
) -> None:
    model = gemma()
    for name, value in model.named_parameters():
        value.requires_grad_("norm" not in name)
        if "norm" in name:
            nn.init.normal_(value, std=0.3)
    assert_alike(model, eager(copy.deepcopy(model)), precision, tolerance)


def test_scores_are_cut_into_several_blocks_of_rows(
    eager: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SCORES", 1)
    model = gemma()
    assert_alike(model, eager(copy.deepcopy(model)), "fp32", 1e-5)


def test_dropout_of_attention_takes_the_eager_way(eager: Callable[[nn.Module], nn.Module]) -> None:
    model = gemma(attention_dropout=0.5)
    assert_alike(model.train(), eager(copy.deepcopy(model)), "fp32", 1e-6)


def test_what_is_saved_names_no_way_of_its_own(tmp_path: Any) -> None:
    model = gemma()
    class_logits(model, **rows())
    model.save_pretrained(tmp_path)
    assert blocks.NAME not in (tmp_path / "config.json").read_text()


def test_other_models_keep_their_attention() -> None:
    model = classifier("llama", max_position_embeddings=512)
    before = model.config._attn_implementation
    class_logits(model, **rows())
    assert model.config._attn_implementation == before


def adapted(dropout: float = 0.0) -> tuple[Any, Any]:
    """The same model and adapter, with and without fused layers; B is not 0."""
    base = classifier("llama", max_position_embeddings=512)
    fused = add_lora(base, r=4, alpha=8, dropout=dropout)
    torch.manual_seed(3)
    for name, value in fused.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.2)
    usual = copy.deepcopy(fused)
    for module in usual.modules():
        module.__dict__.pop("forward", None)
    return fused, usual


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_a_fused_layer_gives_what_peft_gives(precision: str, tolerance: float) -> None:
    fused, usual = adapted()
    if precision == "bf16":
        for model in (fused, usual):
            model.get_base_model().model.to(torch.bfloat16)
            for value in model.parameters():
                value.data = value.data.float() if value.requires_grad else value.data
    assert_alike(fused, usual, precision, tolerance)


def test_a_hook_on_a_part_is_called() -> None:
    fused, usual = adapted()
    seen: list[Tensor] = []
    for module in fused.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda one, given, out: seen.append(out))
    assert_alike(fused, usual, "fp32", 1e-5)
    assert len(seen) == 7


def test_a_fused_layer_drops_what_peft_drops() -> None:
    fused, usual = adapted(dropout=0.5)
    assert_alike(fused.train(), usual.train(), "fp32", 1e-5)


def test_an_adapter_that_is_switched_off_adds_nothing() -> None:
    fused, usual = adapted()
    with torch.no_grad(), fused.disable_adapter(), usual.disable_adapter():
        assert torch.equal(class_logits(fused, **rows()), class_logits(usual, **rows()))


def test_merging_a_fused_adapter_changes_no_logit() -> None:
    fused, _ = adapted()
    with torch.no_grad():
        before = class_logits(fused, **rows())
        after = class_logits(fused.merge_and_unload(), **rows())
    assert torch.allclose(before, after, atol=1e-5)


def test_fusing_twice_is_fusing_once() -> None:
    fused, usual = adapted()
    fuse(fused)
    assert_alike(fused, usual, "fp32", 1e-5)
