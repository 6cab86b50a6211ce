"""A classifier's last layer at the pooled token alone: every logit and every gradient stays."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import classifier
from torch import Tensor, nn

from llmkd.models import last_layer, pooling
from llmkd.models.lora import add_lora
from llmkd.models.pooling import class_logits, logits_and_states

EOS = 2  # also the pad token
ROWS = [[5, 9, EOS], [7, EOS, EOS, 8, 11], [EOS], [3, 4, 5, 6, 7, 8, 9], [13, 14, 15, EOS, EOS, EOS, EOS]]
FAMILIES = ["gemma2", "llama", "qwen2"]
WAYS = [("gemma2", "eager"), *((family, way) for family in FAMILIES[1:] for way in ("eager", "sdpa"))]


def model_of(family: str, **settings: Any) -> Any:
    window = {"sliding_window": 4} if family == "gemma2" else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = classifier(family, pad_token_id=EOS, eos_token_id=EOS, **{**heads, **window, **settings})
    for name, value in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(value, 1, 0.3)
    return model


def padded(side: str) -> dict[str, Tensor]:
    longest = max(map(len, ROWS))
    ids, mask = torch.full((len(ROWS), longest), EOS), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for i, row in enumerate(ROWS):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def full(side: str) -> dict[str, Tensor]:
    """No padding: where transformers makes no mask."""
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def found(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    logits = class_logits(model, **inputs)
    torch.manual_seed(2)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters()}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """A model in transformers' own way, from its first layer to its last."""
    kept: list[Any] = []
    shorten, tune = pooling.shorten, pooling.tune
    monkeypatch.setattr(pooling, "shorten", lambda body: body not in kept and shorten(body))
    monkeypatch.setattr(pooling, "tune", lambda model: None if model.base_model in kept else tune(model))

    def keep(model: nn.Module) -> nn.Module:
        kept.append(pooling.unwrapped(model).base_model)
        return model

    return keep


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of each row the heads' inputs stood for."""
    seen: list[int] = []
    layer = last_layer._layer

    def spy(module: Any, *args: Any, **more: Any) -> Tensor:
        hidden = layer(module, *args, **more)
        seen.append(hidden.shape[1])
        return hidden

    monkeypatch.setattr(last_layer, "_layer", spy)
    return seen


@pytest.mark.parametrize("inputs", [padded, full])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attention"), WAYS)
def test_logits_and_gradients_stay(
    whole: Callable[[nn.Module], nn.Module],
    widths: list[int],
    family: str,
    attention: str,
    side: str,
    inputs: Callable[[str], dict[str, Tensor]],
) -> None:
    model = model_of(family, attn_implementation=attention)
    if (
        inputs is full or attention == "sdpa"
    ):  # transformers' eager way gives NaN in float64 where all is padding
        model, close, near = model.double(), 1e-5, 1e-7  # norms and angles are in float32 all the same
    else:
        close, near = 1e-4, 1e-5
    (logits, gradients), (own, theirs) = (
        found(one, inputs(side)) for one in (model, whole(copy.deepcopy(model)))
    )
    assert widths == [1]
    torch.testing.assert_close(logits, own, rtol=close, atol=near)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=10 * close, atol=10 * near, msg=name)
    assert own.std(0).min() > 0.05, "the rows must differ for this to show anything"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_the_same(
    whole: Callable[[nn.Module], nn.Module], widths: list[int], family: str
) -> None:
    model = add_lora(model_of(family), r=4, alpha=8)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.2)
    (logits, gradients), (own, theirs) = (
        found(one, padded("right")) for one in (model, whole(copy.deepcopy(model)))
    )
    assert widths == [1]
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_evaluation_saves_it_too(whole: Callable[[nn.Module], nn.Module], widths: list[int]) -> None:
    model = model_of("llama").eval()
    expected = class_logits(whole(copy.deepcopy(model)), **padded("right"))
    torch.testing.assert_close(class_logits(model, **padded("right")), expected, rtol=1e-5, atol=1e-5)
    assert widths == [1]


def test_checkpointed_layers_are_computed_again_alike(widths: list[int]) -> None:
    model = model_of("llama")
    _, usual = found(copy.deepcopy(model), padded("left"))
    model.gradient_checkpointing_enable()
    _, gradients = found(model.train(), padded("left"))
    assert widths == [1, 1]  # computing it again ends where the last tensor is back
    for name, gradient in usual.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_who_asks_for_states_gets_all_tokens() -> None:
    model, inputs = model_of("gemma2").eval(), padded("right")
    logits = class_logits(model, **inputs)
    own, states = logits_and_states(model, [2], **inputs)
    assert states[2].shape == (len(ROWS), 7, 32)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(class_logits(model, **inputs), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["layer", "norm", "part", "body"])
def test_a_hook_sees_all_tokens(place: str) -> None:
    model, seen = model_of("llama"), list[int]()
    body = model.model
    parts = {"layer": body.layers[1], "norm": body.norm, "part": body.layers[1].mlp.down_proj, "body": body}
    class_logits(model, **padded("right"))
    look = parts[place].register_forward_hook(
        lambda one, given, out: seen.append(getattr(out, "last_hidden_state", out).shape[1])
    )
    class_logits(model, **padded("right"))
    look.remove()
    class_logits(model, **padded("right"))
    assert seen == [7]


def test_where_the_last_layer_stays_whole(widths: list[int]) -> None:
    model = model_of("llama", attention_dropout=0.1).train()
    class_logits(model, **padded("right"))
    sharded = model_of("llama")
    next(sharded.model.layers[1].parameters()).ds_id = 0
    class_logits(sharded, **padded("right"))
    class_logits(classifier("bert"), **padded("right"))
    assert not widths


def test_the_library_s_own_call_is_as_it_was() -> None:
    model, inputs = model_of("llama").eval(), padded("right")
    before = model(**inputs).logits
    class_logits(model, **inputs)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
    assert model.model(**inputs).last_hidden_state.shape[1] == 7


class Pooled(nn.Module):
    """A classifier of rows without padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return class_logits(self.model, input_ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_the_library_s_own(family: str, widths: list[int]) -> None:
    """Its last layer is whole, also where it was shortened before."""
    pooled, ids = Pooled(model_of(family).eval()), full("right")["input_ids"]
    expected = pooled(ids)
    assert widths == [1]
    program = torch.export.export(pooled, (ids,), strict=False)
    torch.testing.assert_close(program.module()(ids), expected, rtol=1e-4, atol=1e-5)
    assert [width for width in widths if width == 1] == [1]
