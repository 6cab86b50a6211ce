"""One float model out of the folds: the mean of their weight deltas (or of their factors) and of their heads.

Works on the safetensors files themselves. peft's `add_weighted_adapter` is not used: it refuses adapters
that carry a trained head, and its "linear" combination weighs A and B by the root of the weight each, then
multiplies the sums, which is not the mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkd.errors import ModelError
from llmkd.progress import bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # peft saves every key under its two wrappers
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_[AB]\.weight")
# Each of these changes what "W + scale * B A" means, or changes the base weights the adapter was trained on.
REFUSED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "megatron_config",
)
PLAIN_INITS = (True, False, None, "gaussian", "eva")


@dataclass(frozen=True)
class Fold:
    """One trained fold on disk: its settings and where each of its tensors lies, by base parameter name."""

    path: Path
    adapter: Mapping[str, Any] | None  # adapter_config.json; None where the fold is a whole model
    tensors: Mapping[str, tuple[Any, str]]  # name -> the open safetensors file, and the key in it

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32. Raises ModelError where it is missing, empty, or not finite."""
        import torch

        if name not in self.tensors:
            raise ModelError(f"fold {self.path} has no tensor {name}; train that fold again")
        file, key = self.tensors[name]
        stored: torch.Tensor = file.get_tensor(key)
        if stored.numel() == 0:
            raise ModelError(f"fold {self.path}: tensor {name} was saved empty; gather it before saving")
        if not bool(torch.isfinite(stored).all()):
            raise ModelError(f"fold {self.path}: tensor {name} holds NaN or infinity; train that fold again")
        return stored.float()


def merge_folds(
    base: PreTrainedModel, folds: Sequence[Path], how: Literal["delta", "factors"] = "delta"
) -> PreTrainedModel:
    """Merge the folds into `base` in place and return it.

    Args:
        base: a freshly loaded float model; its own weights are the ones the adapters were trained on.
        folds: PEFT LoRA directories, or, for a student trained in full, Hugging Face model directories.
        how: `delta` adds mean_k(scale_k B_k A_k), the exact mean of the merged models; `factors` adds
            scale mean(B) mean(A), as the reference recipe does, and differs as folds diverge. Heads and
            whole models are averaged either way.

    Products and means are taken in float32, one module at a time, then cast to the base's dtype once.
    Raises ModelError for a quantized base, folds that do not match the base or each other, adapters that
    are not plain LoRA, missing files, missing heads, and tensors that are not finite.
    """
    import torch

    if how not in ("delta", "factors") or not folds:
        raise ModelError(
            f"merge.how is {how!r} over {len(folds)} folds; use delta or factors over at least one"
        )
    _refuse_quantized(base)
    with ExitStack() as stack, torch.no_grad():
        opened = [_open(Path(path), stack) for path in folds]
        _check_alike(opened)
        if opened[0].adapter is None:
            _average_models(base, opened)
        else:
            _merge_adapters(base, opened, how)
    return base


def _refuse_quantized(base: PreTrainedModel) -> None:
    import torch

    integers = (torch.int8, torch.uint8, torch.int32)
    packed = any(parameter.dtype in integers for parameter in base.parameters())
    if packed or getattr(base.config, "quantization_config", None):
        raise ModelError("the base is quantized; load it afresh in float32 or bfloat16 and merge into that")


def _open(path: Path, stack: ExitStack) -> Fold:
    from safetensors import SafetensorError, safe_open

    adapter = _adapter_config(path)
    tensors: dict[str, tuple[Any, str]] = {}
    for file in _weight_files(path, adapter is not None):
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged ({error}); train that fold again") from error
        tensors |= {key.removeprefix(PREFIX if adapter else ""): (handle, key) for key in list(handle.keys())}
    return Fold(path, adapter, tensors)


def _adapter_config(path: Path) -> dict[str, Any] | None:
    file = path / "adapter_config.json"
    if not file.is_file():
        if (path / "config.json").is_file():
            return None
        raise ModelError(f"fold {path} has no adapter_config.json nor config.json; train it first")
    config: dict[str, Any] = _json(file)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"fold {path} is a {config.get('peft_type')} adapter; only LORA can be merged")
    odd = [name for name in REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        odd.append("init_lora_weights")
    if odd:
        raise ModelError(f"fold {path} sets {', '.join(odd)}, which is not plain LoRA; train it without")
    return config


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}); train that fold again") from error


def _weight_files(path: Path, adapter: bool) -> list[Path]:
    stem = "adapter_model" if adapter else "model"
    index = path / f"{stem}.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise ModelError(f"fold {path} has no {name}; train that fold again")
    return [path / name for name in names]


def _check_alike(folds: Sequence[Fold]) -> None:
    first = folds[0]
    for fold in folds[1:]:
        if (fold.adapter is None) != (first.adapter is None):
            raise ModelError(f"fold {fold.path} or {first.path} is an adapter, the other a whole model")
        if fold.adapter is not None and first.adapter is not None:
            ours, theirs = (f.adapter.get("base_model_name_or_path") for f in (fold, first) if f.adapter)
            if ours != theirs:
                raise ModelError(f"fold {fold.path} was trained on base {ours}, {first.path} on {theirs}")
        odd = sorted(fold.tensors.keys() ^ first.tensors.keys())
        if odd:
            holder, other = (fold, first) if odd[0] in fold.tensors else (first, fold)
            raise ModelError(f"fold {holder.path} has {odd[0]} and {other.path} has not; train them alike")


def _merge_adapters(base: PreTrainedModel, folds: Sequence[Fold], how: str) -> None:
    matches = {name: LORA_KEY.fullmatch(name) for name in folds[0].tensors}
    modules = sorted({match["module"] for match in matches.values() if match})
    plain = sorted(name for name, match in matches.items() if not match)
    if not modules:
        raise ModelError(f"fold {folds[0].path} holds no lora_A or lora_B tensors; train that fold again")
    _check_head(base, folds[0], plain, modules)
    parameters = dict(base.named_parameters())
    for name in plain:  # first: a head may carry a LoRA of its own, on top of the saved weights
        _store(parameters, name, _mean(fold.read(name) for fold in folds), folds[0])
    for module in bar(modules, "merge"):
        delta = _mean_delta(module, folds) if how == "delta" else _factors_delta(module, folds)
        _add_delta(base, parameters, module, delta, folds[0])


def _check_head(base: PreTrainedModel, fold: Fold, plain: Iterable[str], modules: Iterable[str]) -> None:
    """A classifier's head is new, so adapters without it would be merged into random weights.

    A head may be all that stands outside the backbone, and a new pooler in it; what LoRA adapts instead
    is not new.
    """
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return
    backbone = base.base_model_prefix + "."
    saved = tuple(f"{module}." for module in (fold.adapter or {}).get("modules_to_save") or ())
    due = {
        name for name, _ in base.named_parameters() if not name.startswith(backbone) or name.startswith(saved)
    }
    adapted = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    missing = sorted(due - set(plain) - adapted)
    if missing:
        raise ModelError(
            f"fold {fold.path} lacks the trained head {missing[0]}; train with the head in modules_to_save"
        )


def _add_delta(
    base: PreTrainedModel,
    parameters: Mapping[str, torch.Tensor],
    module: str,
    delta: torch.Tensor,
    fold: Fold,
) -> None:
    name = f"{module}.weight"
    if name not in parameters:
        raise ModelError(f"fold {fold.path} adapts {module}, which the base has not; merge into its own base")
    # transformers' Conv1D (GPT-2) keeps its weight as [in, out], against [out, in] of a linear layer.
    turned = type(base.get_submodule(module)).__name__ == "Conv1D"
    weight = parameters[name].detach()
    _store(parameters, name, weight.float() + _fit(delta.T if turned else delta, weight, name, fold), fold)


def _fit(delta: torch.Tensor, weight: torch.Tensor, name: str, fold: Fold) -> torch.Tensor:
    if delta.shape != weight.shape:
        raise ModelError(
            f"fold {fold.path}: the delta of {name} is {tuple(delta.shape)}, "
            f"the base's weight {tuple(weight.shape)}; merge into its own base"
        )
    return delta.to(weight.device)


def _mean_delta(module: str, folds: Sequence[Fold]) -> torch.Tensor:
    def deltas() -> Iterable[torch.Tensor]:
        for fold in folds:
            a, b = _factors(module, fold)
            yield _scale(fold, module, a.shape[0]) * (b @ a)

    return _mean(deltas())


def _factors_delta(module: str, folds: Sequence[Fold]) -> torch.Tensor:
    pairs = [_factors(module, fold) for fold in folds]
    scales = [_scale(fold, module, a.shape[0]) for fold, (a, _) in zip(folds, pairs, strict=True)]
    for fold, (a, _), scale in zip(folds, pairs, scales, strict=True):
        if a.shape != pairs[0][0].shape or scale != scales[0]:
            raise ModelError(
                f"fold {fold.path}: {module} has not the first fold's rank and scale; use merge.how: delta"
            )
    return scales[0] * (_mean(b for _, b in pairs) @ _mean(a for a, _ in pairs))


def _factors(module: str, fold: Fold) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = fold.read(f"{module}.lora_A.weight"), fold.read(f"{module}.lora_B.weight")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(
            f"fold {fold.path}: {module} has factors {tuple(a.shape)}, {tuple(b.shape)}; not LoRA"
        )
    return a, b


def _scale(fold: Fold, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rslora; `alpha_pattern` is a regex of a name's tail, as in peft."""
    config = fold.adapter or {}
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _average_models(base: PreTrainedModel, folds: Sequence[Fold]) -> None:
    state = base.state_dict()  # shares memory with the model
    stored = set(folds[0].tensors)
    for name in bar(sorted(stored), "merge"):
        mean = _mean(fold.read(name) for fold in folds)
        _store(state, name, mean, folds[0])
    filled = {state[name].data_ptr() for name in stored}  # a tied weight is saved under one of its names only
    for name in sorted(set(state) - stored):
        if state[name].data_ptr() not in filled:
            raise ModelError(f"fold {folds[0].path} has no tensor {name}, which the base has; train it again")


def _mean(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of float32 tensors, with one running sum in memory; ModelError where their shapes differ."""
    total: torch.Tensor | None = None
    count = 0
    for tensor in tensors:
        if total is not None and total.shape != tensor.shape:
            raise ModelError(
                f"folds disagree on a tensor's shape: {tuple(total.shape)} and {tuple(tensor.shape)}"
            )
        total = tensor.clone() if total is None else total.add_(tensor)
        count += 1
    if total is None:
        raise ModelError("no folds to merge; train at least one")
    return total.div_(count)


def _store(target: Mapping[str, torch.Tensor], name: str, value: torch.Tensor, fold: Fold) -> None:
    if name not in target:
        raise ModelError(f"fold {fold.path} has {name}, which the base has not; merge into its own base")
    if target[name].shape != value.shape:
        raise ModelError(
            f"fold {fold.path}: {name} is {tuple(value.shape)}, the base's is {tuple(target[name].shape)}; "
            "merge into its own base"
        )
    target[name].copy_(value)
