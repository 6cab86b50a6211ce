"""LoRA layers as one operation: what peft computes."""

import copy
from typing import Any

import pytest
import torch
from alike import assert_alike, logits_and_gradients, rows
from tiny import classifier
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.models import lora_linear
from llmkd.models.lora import add_lora
from llmkd.models.lora_linear import fuse
from llmkd.models.pooling import class_logits


def adapted(dropout: float = 0.0) -> tuple[Any, Any]:
    """The same model and adapter, with and without fused layers; B is not 0."""
    base = classifier("llama", max_position_embeddings=512, num_hidden_layers=2)
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


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_a_merged_layer(first: bool, biased: bool) -> None:
    """first: nothing before it learns, so its input has no gradient."""
    draw = torch.Generator().manual_seed(0)
    sizes = (2, 3, 6), (5, 6), (5,), (2, 6), (5, 2)  # x, weight, bias, A, B
    given = [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]
    x, weight, bias, a, b = given
    learns = [a.requires_grad_(), b.requires_grad_(), *([] if first else [x.requires_grad_()])]

    def merged(*_: Tensor) -> Any:
        return lora_linear._MergedLinear.apply(x, weight, bias if biased else None, a, b, 0.7)

    expected = x @ weight.T + 0.7 * x @ a.T @ b.T + (bias if biased else 0)
    torch.testing.assert_close(merged(), expected)
    assert torch.autograd.gradcheck(merged, learns)


@pytest.mark.parametrize(
    ("tokens", "kind", "pays"),
    [(28, torch.float32, True), (27, torch.float32, False), (900, torch.bfloat16, False)],
)
def test_an_adapter_is_merged_where_that_is_exact_and_pays(
    monkeypatch: pytest.MonkeyPatch, tokens: int, kind: torch.dtype, pays: bool
) -> None:
    """A weight of 16 x 12: 4 x 16 x 12 by 16 + 12 is 27.4 tokens."""
    taken: list[Any] = []
    apply = lora_linear._MergedLinear.apply
    monkeypatch.setattr(lora_linear._MergedLinear, "apply", lambda *x: (taken.append(x), apply(*x))[1])
    model = nn.Sequential(nn.Linear(12, 16, dtype=kind))
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model)
    usual = copy.deepcopy(model)
    fuse(model)
    x = torch.randn(tokens, 12).to(kind)
    found, expected = model(x), usual(x)
    assert (found - expected).abs().max() <= (0.03 if kind == torch.bfloat16 else 1e-5) * expected.abs().max()
    assert bool(taken) == pays


def test_a_merged_layer_is_as_exact_as_peft_s() -> None:
    """Against float64: an adapter of a hundred-thousandth of the weight is not rounded away."""
    torch.manual_seed(0)
    x, weight, a = torch.randn(400, 64), torch.randn(96, 64), torch.randn(8, 64)
    b = 1e-5 * torch.randn(96, 8)
    wide = [one.double() for one in (x, weight, a, b)]
    right = wide[0] @ wide[1].T + 2 * wide[0] @ wide[2].T @ wide[3].T
    ours = lora_linear._MergedLinear.apply(x, weight, None, a, b, 2.0)
    theirs = x @ weight.T + 2 * x @ a.T @ b.T
    assert (ours - right).norm() <= 1.2 * (theirs - right).norm()


@pytest.mark.parametrize("part", ["lora_A", "lora_dropout"])
def test_a_hook_on_a_part_is_called(part: str) -> None:
    fused, usual = adapted()
    seen: list[Tensor] = []
    for module in fused.modules():
        if hasattr(module, "lora_A"):
            getattr(module, part)["default"].register_forward_hook(lambda one, given, out: seen.append(out))
    assert_alike(fused, usual, "fp32", 1e-5)
    assert len(seen) == 14


def test_another_dropout_draws_for_itself() -> None:
    fused, usual = adapted(dropout=SHARE)
    for model in (fused, usual):
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = Falling(SHARE)
    assert_alike(fused.train(), usual.train(), "fp32", 1e-5)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_leaves_nothing_is_refused(dropout: float) -> None:
    with pytest.raises(ModelError, match=f"dropout={dropout} before the adapters"):
        add_lora(classifier("llama"), r=4, alpha=8, dropout=dropout)


SHARE = 0.25


class Falling(nn.Dropout):
    """Of every seventh entry."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten().index_fill(0, sevenths(x, self.p), 0).view_as(x) / (1 - self.p)


def sevenths(x: Tensor, p: float) -> Tensor:
    return torch.arange(3, x.numel(), 7)


@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_layer_drops_as_peft_does(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """masked: as elsewhere than on a CPU."""
    fused, usual = adapted(dropout=SHARE)

    def fixed(x: Tensor, p: float) -> Tensor:
        mask = torch.zeros(x.numel(), dtype=torch.bool).index_fill(0, sevenths(x, p), True)
        return mask.view_as(x) if masked else sevenths(x, p)

    monkeypatch.setattr(lora_linear, "drawn", fixed)
    for module in usual.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Falling(SHARE)
    assert_alike(fused.train(), usual.train(), "fp32", 1e-5)
    fused.zero_grad()
    assert_alike(fused.eval(), adapted()[1], "fp32", 1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_a_layer_with_dropout(first: bool, masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = (2, 3, 6), (5, 6), (5,), (2, 6), (5, 2)  # x, weight, bias, A, B
    x, weight, bias, a, b = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    x = x.mT.contiguous().mT.detach().requires_grad_(not first)  # of a layout of its own
    learns = [a.requires_grad_(), b.requires_grad_(), *([] if first else [x])]
    mask = torch.rand(2, 3, 6, generator=draw) < 0.4
    dropped = mask if masked else mask.flatten().nonzero().flatten()

    def output(*_: Tensor) -> Any:
        return lora_linear._LoraLinear.apply(x, dropped, weight, bias, a, b, 0.7)

    torch.testing.assert_close(output(), x @ weight.T + 0.7 * (x * ~mask) @ a.T @ b.T + bias)
    assert torch.autograd.gradcheck(output, learns)


def test_what_falls_is_drawn_anew_and_again_with_the_seed() -> None:
    fused, _ = adapted(dropout=0.5)
    fused.train()
    given = rows()
    with torch.no_grad():
        one, two, three = ((torch.manual_seed(seed), class_logits(fused, **given))[1] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert (one - three).abs().max() > 1e-3


def test_checkpointed_layers_drop_the_same_entries_twice() -> None:
    fused, _ = adapted(dropout=0.5)
    _, expected = logits_and_gradients(fused.train())
    fused.zero_grad()
    fused.gradient_checkpointing_enable()
    _, found = logits_and_gradients(fused)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_on_average_nothing_is_lost() -> None:
    layer = adapted(dropout=0.5)[0].train().base_model.model.model.layers[0].mlp.up_proj
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.randn(1, layer.in_features).expand(20_000, -1)
        found, expected = layer(x), adapted()[0].base_model.model.model.layers[0].mlp.up_proj(x[:1])
    error = (found.mean(0) - expected[0]).abs()
    assert (error <= 5 * found.std(0) / 20_000**0.5 + 1e-6).all()


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
