"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) of a classifier or a causal LM, its head kept in float.

Runs through optimum and gptqmodel, as transformers' GPTQConfig does. gptqmodel alone would take the
classifier for a language model and drop its head without a word.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.digests import sha
from llmkd.errors import ModelError
from llmkd.gptq import Batch, import_quietly, run_gptq
from llmkd.models.artifact import (
    TOKENIZER_FILES,
    ZERO_OFFSETS,
    is_causal,
    open_tensors,
    read_json,
    size_bytes,
    unpack_layer,
)
from llmkd.run import checkpoint_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BITS = (4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what gptqmodel's kernels take, besides -1: a whole column
WORD = 32  # gptqmodel packs widths in words of 32 values


def quantize_gptq(
    model_dir: Path,
    out_dir: Path,
    calibration: Sequence[Sequence[int]],
    *,
    bits: int = 8,
    group_size: int = 128,
    symmetric: bool = True,
    desc_act: bool = False,
    damp: float = 0.1,
    batch_tokens: int = 4096,
    trust_remote_code: bool = False,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Quantize the linear layers of the blocks of a classifier or a causal LM; all else stays as it is.

    Args:
        model_dir: a float model with its tokenizer, in safetensors.
        out_dir: where the quantized model is written, in the GPTQ layout of transformers and `load_artifact`:
            checkpoint format `gptq` if symmetric, else `gptq_v2`, which alone holds every zero point.
        calibration: token ids of training rows. Rows of one length run together and nothing is ever
            padded, so that padding does not enter the Hessians.
        bits: 4 or 8.
        group_size: inputs that share a scale; -1 for one scale a row.
        desc_act: quantize inputs by falling Hessian diagonal; closer, and slower to run when packed.
        damp: share of the mean Hessian diagonal added to it.
        batch_tokens: most tokens in one calibration batch (a longer row runs alone).
        trust_remote_code: whether Python code that lies in `model_dir` may be run; it then goes along.
        checkpoints: a directory in which each finished block is kept, a byte a weight. Called again with the
            same model, rows and settings after it was cut off, it goes on behind the last of them, to the
            same bytes; blocks of anything else, of other versions of the libraries or of another kind of
            device are done anew. On a signal it finishes its block and raises Stopped. The caller removes it.

    Returns seconds, bytes before and after, calibration rows and tokens, the number of quantized layers
    and of their weights, and the relative weight errors |W - Q| / |W| (Frobenius): mean, max, worst layer.
    The computation runs in float32, on the GPU block by block where there is one; it is deterministic.
    Raises ModelError before the run for anything that could not be quantized as asked, and after it if
    a weight that was to be kept has changed.
    """
    start = time.monotonic()
    _check_settings(bits, group_size, damp, batch_tokens)
    settings = {
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": desc_act,
        "act_group_aware": not desc_act and group_size > 0,
        "damp_percent": damp,
        "true_sequential": True,
    }
    import_quietly()
    layers, batches = _write(
        model_dir, out_dir, calibration, settings, batch_tokens, trust_remote_code, checkpoints
    )
    _let_go()
    errors = _compare(model_dir, out_dir, sorted(layers), bits, symmetric)
    worst = max(errors, key=lambda name: errors[name])
    return {
        "seconds": time.monotonic() - start,
        "bytes_before": size_bytes(model_dir),
        "bytes_after": size_bytes(out_dir),
        "calibration_rows": sum(len(batch["input_ids"]) for batch in batches),
        "calibration_tokens": sum(len(row) for batch in batches for row in batch["input_ids"]),
        "layers": len(layers),
        "quantized_weights": _weights(layers),
        "weight_error_mean": sum(errors.values()) / len(errors),
        "weight_error_max": errors[worst],
        "worst_layer": worst,
    }


def _write(
    model_dir: Path,
    out_dir: Path,
    calibration: Sequence[Sequence[int]],
    settings: dict[str, Any],
    batch_tokens: int,
    trust: bool,
    checkpoints: Path | None,
) -> tuple[dict[str, tuple[int, int]], list[Batch]]:
    """Load, quantize and save; the widths of what was quantized, and what it was calibrated on."""
    model = _load(model_dir, trust)
    stack = _block_stack(model)
    layers = _linear_layers(model, stack)
    _check_widths(layers, settings["group_size"])
    batches = _batches(calibration, model.config.get_text_config().vocab_size, batch_tokens)
    settings = {**settings, "block_name_to_quantize": stack}
    keep = (checkpoints, _made_from(model_dir, settings, batches)) if checkpoints else None
    run_gptq(model, stack, batches, settings, _weights(layers), keep)
    _restore_dtypes(model, model_dir)
    _save(model, model_dir, out_dir, settings, trust)
    return layers, batches


def _made_from(model_dir: Path, settings: Mapping[str, Any], batches: Sequence[Batch]) -> str:
    """sha256 of what a quantization is made from, and by what: no block of another is taken for its own."""
    by = {name: version(name) for name in ("torch", "transformers", "optimum", "gptqmodel")}
    by["device"] = _device()
    return sha(json.dumps([checkpoint_digest(model_dir), settings, batches, by], sort_keys=True).encode())


def _device() -> str:
    """The kind of device on which optimum will quantize."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _let_go() -> None:
    """The model goes before its files are read: cycles hold it, then glibc its smaller tensors' memory."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _weights(layers: Mapping[str, tuple[int, int]]) -> int:
    return sum(width * height for width, height in layers.values())


def _check_settings(bits: int, group_size: int, damp: float, batch_tokens: int) -> None:
    # optimum swallows arguments it does not know and lets bad values through to fail late.
    if bits not in BITS:
        raise ModelError(f"quantize.bits is {bits}; use 8 or 4")
    if group_size != -1 and group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ModelError(f"quantize.group_size is {group_size}; use -1 or one of {sizes}")
    if not 0 < damp < 1:
        raise ModelError(f"quantize damp is {damp}; use a share between 0 and 1, such as 0.1")
    if batch_tokens < 1:
        raise ModelError(f"quantize batch_tokens is {batch_tokens}; use 1 or more")


def _load(model_dir: Path, trust: bool) -> PreTrainedModel:
    import torch

    from llmkd.models.artifact import load_artifact

    if read_json(model_dir / "config.json").get("quantization_config"):
        raise ModelError(f"{model_dir} is quantized already; quantize the merged float model")
    causal = is_causal(model_dir)
    model, _ = load_artifact(model_dir, dtype=torch.float32, causal=causal, trust_remote_code=trust)
    return model


def _block_stack(model: PreTrainedModel) -> str:
    """Name of the list of blocks, such as `model.layers` or `bert.encoder.layer`."""
    from torch import nn

    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    stacks: list[str] = [name for name in outer if _linear_layers(model, name)]
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if len(stacks) != 1 or len(model.get_submodule(stacks[0])) != blocks:  # type: ignore[arg-type]
        raise ModelError(
            f"{type(model).__name__} is not one stack of {blocks} blocks (found: {', '.join(stacks)}); "
            "GPTQ is offered only for models that are"
        )
    return stacks[0]


def _linear_layers(model: PreTrainedModel, stack: str) -> dict[str, tuple[int, int]]:
    """Input and output width of every layer that will be quantized, by name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    widths: dict[str, tuple[int, int]] = {}
    for name, module in model.get_submodule(stack).named_modules():
        if type(module) is nn.Linear:  # not its subclasses: routers and the like
            widths[f"{stack}.{name}"] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # packs, but transformers cannot load what it packed
            raise ModelError(
                f"{type(model).__name__} has Conv1D layers; GPTQ is offered only for linear ones"
            )
    return widths


def _check_widths(layers: Mapping[str, tuple[int, int]], group_size: int) -> None:
    for name, (width, height) in layers.items():
        if width % WORD or height % WORD:
            raise ModelError(
                f"{name} is {height} x {width}; GPTQ packs multiples of {WORD}, choose such widths"
            )
    if group_size == -1:
        return
    for name, (width, _) in layers.items():
        if width % group_size:
            best = max(size for size in GROUP_SIZES if not any(w % size for w, _ in layers.values()))
            raise ModelError(
                f"{name} has {width} inputs, which group_size {group_size} does not divide; "
                f"the largest quantize.group_size that fits this model is {best}"
            )


def _batches(calibration: Sequence[Sequence[int]], vocabulary: int, batch_tokens: int) -> list[Batch]:
    rows = sorted((list(map(int, row)) for row in calibration if len(row)), key=len)
    if not rows:
        raise ModelError("there is no calibration row; raise quantize.calibration_rows")
    strange = next((i for row in rows for i in row if not 0 <= i < vocabulary), None)
    if strange is not None:
        raise ModelError(f"calibration holds token id {strange} of {vocabulary}; use its own tokenizer")
    groups: list[list[list[int]]] = []
    for row in rows:
        if groups and len(groups[-1][0]) == len(row) and (len(groups[-1]) + 1) * len(row) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [{"input_ids": group, "attention_mask": [[1] * len(row) for row in group]} for group in groups]


def _restore_dtypes(model: PreTrainedModel, model_dir: Path) -> None:
    """What was not quantized goes back to the dtype it was stored in: exact, since it was only widened."""
    with open_tensors(model_dir) as stored:
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.data = parameter.data.to(stored[name]().dtype)
    model.config.dtype = read_json(model_dir / "config.json").get("dtype", model.config.dtype)


def _save(
    model: PreTrainedModel, model_dir: Path, out_dir: Path, settings: Mapping[str, Any], trust: bool
) -> None:
    import gptqmodel
    import optimum.version
    import torch

    name = "gptq" if settings["sym"] else "gptq_v2"
    for module in model.modules():
        if isinstance(zeros := getattr(module, "qzeros", None), torch.Tensor):  # gptqmodel works in v2
            module.qzeros = zeros - ZERO_OFFSETS[name][settings["bits"]]
    versions = [f"optimum:{optimum.version.__version__}", f"gptqmodel:{gptqmodel.__version__}"]
    # Not what optimum would write: that holds the calibration rows.
    model.config.quantization_config = {
        "quant_method": "gptq",
        "checkpoint_format": name,
        **settings,
        "meta": {"quantizer": versions},
    }
    model.save_pretrained(out_dir)
    for pattern in (*TOKENIZER_FILES, "chat_template*", *(["*.py"] if trust else [])):
        for file in model_dir.glob(pattern):
            shutil.copy2(file, out_dir / file.name)


def _compare(
    model_dir: Path, out_dir: Path, layers: Sequence[str], bits: int, symmetric: bool
) -> dict[str, float]:
    """Relative weight error of each quantized layer; ModelError where any other weight changed or is gone."""
    import torch

    offset = ZERO_OFFSETS["gptq" if symmetric else "gptq_v2"][bits]
    errors: dict[str, float] = {}
    with open_tensors(model_dir) as before, open_tensors(out_dir) as after:
        for name, read in before.items():
            layer, _, kind = name.rpartition(".")
            if layer in layers and kind == "weight":
                errors[layer] = _weight_error(read(), unpack_layer(layer, after, bits, offset).T)
            elif name not in after:
                raise ModelError(f"{name} of {model_dir} was lost; save_pretrained() the model first")
            elif layer not in layers and not torch.equal(read(), after[name]()):
                # the biases of quantized layers do change: the format keeps them in float16
                raise ModelError(
                    f"{name} of {model_dir} was changed by quantization; only layers of blocks may be"
                )
    return errors


def _weight_error(weight: torch.Tensor, unpacked: torch.Tensor) -> float:
    weight = weight.float()
    return float((weight - unpacked).norm() / weight.norm().clamp_min(1e-12))
