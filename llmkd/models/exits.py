"""Early exits: classifiers at some depths of one model, and the shorter models they make.

The exit at depth n is the model cut to its first n layers, with the final norm (or the pooler) that all
depths share and a head of its own. Decoders with `layers`, `norm` and `score` (Llama, Qwen2, Gemma2,
Mistral, ...) and encoders with `encoder.layer`, `pooler` and a linear `classifier` (BERT) have them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd import ranks
from llmkd.errors import ModelError
from llmkd.models.pooling import backbone, head_logits, is_decoder, logits_and_states, pooled, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    State = Mapping[str, Tensor]  # of one head: weight (C, H), and bias (C,) where the model's own has one

FILE = "exits.safetensors"


def depths(layers: int) -> list[int]:
    """Depths at a quarter, a half and three quarters of `layers`, rounded, each once: 4 -> [1, 2, 3].

    Raises ModelError where there is no depth below the last.
    """
    quarters = {(layers * part + 2) // 4 for part in (1, 2, 3)}  # a half is rounded up
    found = sorted(depth for depth in quarters if 1 <= depth < layers)
    if not found:
        raise ModelError(f"a model of {layers} layers has no depth to exit at; take one of 2 or more")
    return found


def new_exits(model: nn.Module, depths: Sequence[int], seed: int = 0) -> nn.ModuleDict:
    """A float32 head for each depth, by its depth as text, drawn from `seed`: ranks and folds begin alike.

    Raises ModelError for a model without such exits and for a depth that it does not have.
    """
    import torch
    from torch import nn

    head, layers = _head(model), unwrapped(model).config.num_hidden_layers
    wrong = [depth for depth in depths if not 1 <= depth < layers]
    if wrong or not depths:
        raise ModelError(
            f"exits at {list(depths)}: choose depths from 1 to {layers - 1} of its {layers} layers"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        exits = {
            str(depth): nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
            for depth in sorted(set(depths))
        }
    return nn.ModuleDict(exits).to(next(model.parameters()).device)


def exit_logits(model: nn.Module, exits: nn.ModuleDict, **inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The model's own logits (B, C) and those of its exits, {depth: (B, C)}, from one forward."""
    inner, body = unwrapped(model), backbone(model)
    logits, states = logits_and_states(model, [int(depth) for depth in exits], **inputs)
    found = {}
    for depth, head in exits.items():
        state = states[int(depth)]  # (B, L, H), which has not passed the final norm
        if is_decoder(inner):
            vectors = body.norm(pooled(inner, state, inputs["attention_mask"]))  # (B, H)
        else:
            vectors = inner.dropout(body.pooler(state))  # (B, H)
        found[int(depth)] = head_logits(head, vectors)
    return logits, found


def save_exits(exits: nn.ModuleDict, directory: Path) -> None:
    """Write the heads to directory/exits.safetensors. Every rank must call it, as ZeRO-3 has cut them up."""
    from llmkd.models.lora import trainable_state

    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in trainable_state(exits).items():
        depth, _, part = name.partition(".")
        states.setdefault(int(depth), {})[part] = tensor
    if ranks.is_main():
        write_exits(states, directory)


def write_exits(states: Mapping[int, State], directory: Path) -> None:
    """Heads by depth, as `load_exits` reads them, into directory/exits.safetensors."""
    from safetensors.torch import save_file

    tensors = {f"{depth}.{name}": tensor for depth, state in states.items() for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / FILE, metadata={"depths": json.dumps(sorted(states))})


def load_exits(directory: Path) -> dict[int, State]:
    """Each depth's head from directory/exits.safetensors, by depth; ModelError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not (directory / FILE).is_file():
        raise ModelError(f"{directory} has no {FILE}; train with method: self_distillation")
    try:
        with safe_open(directory / FILE, framework="pt") as file:
            known = json.loads((file.metadata() or {}).get("depths", "[]"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{directory / FILE} is damaged ({error}); train that fold again") from error
    found: dict[int, State] = {
        depth: {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{depth}.")}
        for depth in known
    }
    if not found or not all("weight" in state for state in found.values()):
        raise ModelError(f"{directory / FILE} lacks the heads of the depths {known}; train that fold again")
    return found


def mean_exits(directories: Sequence[Path]) -> dict[int, State]:
    """The mean over folds of each depth's head, in float32. Raises ModelError where folds differ in shape."""
    import torch

    folds = [load_exits(directory) for directory in directories]
    shapes = [
        {(depth, name): t.shape for depth, state in fold.items() for name, t in state.items()}
        for fold in folds
    ]
    for directory, found in zip(directories, shapes, strict=True):
        if found != shapes[0]:
            raise ModelError(f"{directory} has exits other than {directories[0]}; train the folds alike")
    return {
        depth: {name: torch.stack([fold[depth][name].float() for fold in folds]).mean(0) for name in state}
        for depth, state in folds[0].items()
    }


def truncate(model: PreTrainedModel, depth: int, head_state: State) -> PreTrainedModel:
    """A standard classifier of the first `depth` layers and the given head, in evaluation mode.

    It may share memory with `model`, a float one, which PEFT may wrap: its adapter is then merged into a
    copy. Raises ModelError for a quantized model, a depth that it does not have, and a head that does not
    fit.
    """
    _check_cut(model, depth, head_state)
    whole: Any = model
    inner = copy.deepcopy(whole).merge_and_unload() if hasattr(model, "get_base_model") else whole
    name, layers = ("score", "layers") if is_decoder(inner) else ("classifier", "encoder.layer")
    path = f"{inner.base_model_prefix}.{layers}"
    dropped = tuple(f"{path}.{layer}." for layer in range(depth, inner.config.num_hidden_layers))
    state = {key: tensor for key, tensor in inner.state_dict().items() if not key.startswith(dropped)}
    state |= {f"{name}.{part}": tensor.to(inner.dtype) for part, tensor in head_state.items()}
    config = copy.deepcopy(inner.config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    short, loading = type(inner).from_pretrained(
        None, config=config, state_dict=state, dtype=inner.dtype, output_loading_info=True
    )
    odd = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if odd:
        raise ModelError(f"{type(inner).__name__} of {depth} layers differs in {odd[0]}; it cannot be cut")
    return short.eval()  # type: ignore[no-any-return]


def _check_cut(model: nn.Module, depth: int, head_state: State) -> None:
    head, config = _head(model), unwrapped(model).config
    if getattr(config, "quantization_config", None):
        raise ModelError("exits of a quantized model cannot be cut out; cut the float one, then quantize it")
    if not 1 <= depth < config.num_hidden_layers:
        raise ModelError(f"no exit at depth {depth} of {config.num_hidden_layers} layers; choose one below")
    own = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in head_state.items()}
    if own != given:
        raise ModelError(f"the exit's head at depth {depth} is {given}, the model's {own}; use its own exits")


def _head(model: nn.Module) -> nn.Linear:
    """The model's own head; ModelError for a model whose depths cannot share what follows its layers."""
    from torch import nn
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    decoder = hasattr(inner, "score") and hasattr(body, "layers") and hasattr(body, "norm")
    encoder = hasattr(getattr(body, "encoder", None), "layer") and getattr(body, "pooler", None) is not None
    head = getattr(inner, "score" if decoder else "classifier", None)
    head = getattr(head, "original_module", head)  # PEFT's wrapper around a head that is trained in full
    if not (isinstance(body, PreTrainedModel) and (decoder or encoder) and isinstance(head, nn.Linear)):
        raise ModelError(
            f"{type(inner).__name__} has no layers with a shared norm or pooler to exit from; "
            "use a decoder such as llama, qwen2, gemma2 or mistral, or a bert"
        )
    return head
