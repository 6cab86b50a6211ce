"""Gemma 2's attention by blocks, its norms and its gated MLP: the numbers stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alike import LENGTH, assert_alike, rows
from tiny import classifier
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager_way

from llmkd.models import blocks, gemma2, passes, pooling
from llmkd.models.gemma2 import tune
from llmkd.models.pooling import class_logits


def gemma(**settings: Any) -> Any:
    return classifier(
        "gemma2", num_hidden_layers=3, num_key_value_heads=1, max_position_embeddings=512, **settings
    )


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """A model that stays in transformers' own way."""
    kept: list[Any] = []
    monkeypatch.setattr(pooling, "tune", lambda model: None if model in kept else tune(model))

    def keep(model: nn.Module) -> nn.Module:
        kept.append(pooling.unwrapped(model))
        return model

    return keep


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries of every attention by blocks."""
    found: list[Tensor] = []
    apply = blocks._Blocks.apply
    monkeypatch.setattr(blocks._Blocks, "apply", lambda *given: (found.append(given[0]), apply(*given))[1])
    return found


@pytest.mark.parametrize("window", [50, 512])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_blocks_give_what_eager_attention_gives(
    eager: Callable[[nn.Module], nn.Module],
    taken: list[Tensor],
    window: int,
    precision: str,
    tolerance: float,
) -> None:
    model = gemma(sliding_window=window)
    assert_alike(model, eager(copy.deepcopy(model)), precision, tolerance)
    assert len(taken) == 2, "one model's layers but the last, not the other's"


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


def passed(forward: Callable[..., Tensor], module: Any, kind: torch.dtype) -> list[Tensor]:
    """What an MLP gives in that precision, in training and not, and its input's gradient."""
    module = copy.deepcopy(module).to(kind)
    x = torch.linspace(-9, 9, 5 * 32, dtype=torch.float64).to(kind).view(1, 5, 32).requires_grad_()
    out = forward(module, x)
    (out * torch.linspace(0, 1, 32, dtype=kind)).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        return [one.detach().double() for one in (out, forward(module, x), x.grad)]


@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 100])
def test_a_gated_mlp_is_the_library_s(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, close: float, rows: int
) -> None:
    monkeypatch.setattr(passes, "NUMBERS", rows)  # of several blocks, and of one
    module = gemma().model.layers[0].mlp
    ours, theirs = (passed(way, module, kind) for way in (gemma2._mlp, type(module).forward))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= close * other.abs().max()


@pytest.mark.parametrize("rows", [1, 100])
def test_a_gated_mlp_in_bf16_is_as_exact_as_the_library_s(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(passes, "NUMBERS", rows)
    module = gemma().model.layers[0].mlp.bfloat16()  # the same weights in every precision
    ours, theirs = (passed(way, module, torch.bfloat16) for way in (gemma2._mlp, type(module).forward))
    exact = passed(type(module).forward, module, torch.float64)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert (one - right).norm() <= 1.1 * (other - right).norm()
        assert (one - right).abs().max() <= 0.01 * right.abs().max()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gated_gelu_leaves_what_it_reads(kind: torch.dtype) -> None:
    gate, up = torch.linspace(-3, 3, 24, dtype=kind).view(2, 2, 6)
    before = gate.clone(), up.clone()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    passes.GatedGelu.apply(gate, up).sum().backward()
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


def gate_and_up(kind: torch.dtype, learn: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    both = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = both.to(kind).transpose(-1, -2).unbind(0)  # of a layout of their own
    return [part.detach().requires_grad_(learns) for part, learns in zip(parts, learn, strict=True)]


@pytest.mark.parametrize("learn", [(True, True), (True, False), (False, True)])
def test_gradients_of_a_gated_gelu(monkeypatch: pytest.MonkeyPatch, learn: tuple[bool, bool]) -> None:
    monkeypatch.setattr(passes, "NUMBERS", 100)  # of several blocks
    assert torch.autograd.gradcheck(passes.GatedGelu.apply, gate_and_up(torch.float64, learn))


def test_a_gated_gelu_in_bf16_is_as_exact_as_the_library_s() -> None:
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def found(way: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        given = [part.detach().to(kind).requires_grad_() for part in gate_and_up(torch.bfloat16)]
        out = way(*given)
        return [one.detach().double() for one in (out, *torch.autograd.grad(out.sum(), given))]

    ours, theirs = (found(way, torch.bfloat16) for way in (passes.GatedGelu.apply, plain))
    for one, other, right in zip(ours, theirs, found(plain, torch.float64), strict=True):
        assert (one - right).norm() <= 1.1 * (other - right).norm()


def test_a_gated_gelu_has_no_second_derivative() -> None:
    gate, up = gate_and_up(torch.float64)
    out = passes.GatedGelu.apply(gate, up)
    (slope,) = torch.autograd.grad((out**2).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_another_activation_is_left_alone(eager: Callable[[nn.Module], nn.Module], activation: str) -> None:
    model = gemma(hidden_activation=activation)
    assert_alike(model, eager(copy.deepcopy(model)), "fp32", 1e-5)


def test_norms_of_several_blocks(
    eager: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "NUMBERS", 32 * 7)
    model = gemma()
    for name, value in model.named_parameters():
        value.requires_grad_("norm" not in name)
    assert_alike(model, eager(copy.deepcopy(model)), "fp32", 1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_norm_leaves_what_it_reads(kind: torch.dtype) -> None:
    x, grad, weight = (torch.randn(size).to(kind) for size in ((4, 8), (4, 8), (8,)))
    before = x.clone(), grad.clone(), weight.clone()
    passes.Norm.apply(x.requires_grad_(), weight, 1e-6).backward(grad)
    assert all(map(torch.equal, (x, grad, weight), before))


def test_dropout_of_attention_takes_the_eager_way(
    eager: Callable[[nn.Module], nn.Module], taken: list[Tensor]
) -> None:
    model = gemma(attention_dropout=0.5)
    assert_alike(model.train(), eager(copy.deepcopy(model)), "fp32", 1e-6)
    assert not taken


def test_another_attention_may_be_chosen_later(taken: list[Tensor]) -> None:
    model, seen = gemma(), list[Any]()
    ALL_ATTENTION_FUNCTIONS.register(
        "seen", lambda *given, **more: (seen.append(1), eager_way(*given, **more))[1]
    )
    ALL_MASK_ATTENTION_FUNCTIONS.register("seen", eager_mask)
    logits = class_logits(model, **rows())
    taken.clear()
    model.config._attn_implementation = "seen"
    torch.testing.assert_close(class_logits(model, **rows()), logits, rtol=1e-4, atol=1e-4)
    assert (len(taken), len(seen)) == (0, 3)


def test_what_is_saved_names_no_way_of_its_own(tmp_path: Any) -> None:
    model = gemma()
    model.save_pretrained(tmp_path / "before")
    class_logits(model, **rows())
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_model_spread_over_devices_keeps_its_own_forwards() -> None:
    from accelerate import cpu_offload

    model, inputs = gemma(attn_implementation="eager"), rows()
    expected = class_logits(copy.deepcopy(model), **inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(class_logits(model, **inputs), expected, rtol=1e-4, atol=1e-5)


def test_other_models_keep_their_attention(taken: list[Tensor]) -> None:
    class_logits(classifier("llama", max_position_embeddings=512), **rows())
    assert not taken


def test_a_tanh_in_place_is_torch_s_to_its_last_digits() -> None:
    y = torch.tensor([0.0, 1e-30, 1e-6, 0.3, 1.0, 5.0, 19.0, 100.0, 1e30, float("inf")])
    y = torch.cat([-y, y])
    expected = torch.tanh(y.double())
    assert ((blocks.tanh_of_half_(2 * y) - expected).abs() <= 3e-7 * expected.abs()).all()
    assert blocks.tanh_of_half_(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("softcap", [50.0, 1e4])
def test_scores_near_0_keep_their_digits_in_float32(softcap: float) -> None:
    """The sigmoid, which bf16 takes, would lose them: 2e-6 of the values and more, at these bounds."""
    torch.manual_seed(0)
    given = [torch.randn(2, 40, 2, 16) for _ in range(3)]  # query, key, value (B, L, H, D)
    angles = torch.ones(1, 40, 1, 8), torch.zeros(1, 40, 1, 8)  # nothing is turned
    mask = torch.full((40, 40), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 40, 40)
    ours, (query, key, value) = (
        [x.to(kind, copy=True).requires_grad_() for x in given] for kind in (torch.float32, torch.float64)
    )
    scores = softcap * torch.tanh(torch.einsum("blhd,bmhd->bhlm", query, key) / 4 / softcap) + mask
    expected = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)
    out = blocks._Blocks.apply(*ours, *angles, mask, 1 / 4, softcap, None)
    expected.square().sum().backward()
    out.square().sum().backward()
    pairs = [
        (out, expected),
        *((one.grad, other.grad) for one, other in zip(ours, (query, key, value), strict=True)),
    ]
    for one, other in pairs:
        assert (one - other).abs().max() <= 6e-7 * other.abs().max()


@torch.no_grad()
def test_a_cache_of_keys_is_filled_and_read() -> None:
    """Two tokens after a prompt whose keys and values were kept, as the eager way gives them."""
    model = gemma(sliding_window=50).eval()
    ids = rows()["input_ids"]
    expected = model.model(ids, use_cache=False).last_hidden_state[:, -2:]
    tune(model)
    begun = model.model(ids[:, :-2], use_cache=True)
    assert begun.past_key_values.get_seq_length() == LENGTH - 2
    found = model.model(ids[:, -2:], past_key_values=begun.past_key_values).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
