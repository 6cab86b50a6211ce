"""Gemma 2's blocks of attention, its norms, and LoRA layers as one operation: the numbers stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import classifier
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager_way

from llmkd.models import blocks, gemma2, lora_linear, passes, pooling
from llmkd.models.gemma2 import tune
from llmkd.models.lora import add_lora
from llmkd.models.lora_linear import fuse
from llmkd.models.pooling import autocast, class_logits

LENGTH = 300  # more than one block of queries


def gemma(**settings: Any) -> Any:
    return classifier(
        "gemma2", num_hidden_layers=3, num_key_value_heads=1, max_position_embeddings=512, **settings
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


def test_a_hook_on_a_part_is_called() -> None:
    fused, usual = adapted()
    seen: list[Tensor] = []
    for module in fused.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda one, given, out: seen.append(out))
    assert_alike(fused, usual, "fp32", 1e-5)
    assert len(seen) == 14


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
