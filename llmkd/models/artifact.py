"""Reading a finished classifier or language model from disk, also one quantized by GPTQ, without the library
that packed it.

On a CPU the packed weights are unpacked once, at load: the numbers are those of the quantized model, the
speed is that of a float one. Layout of the packed tensors: AutoGPTQ's and gptqmodel's, int32 words,
`qweight` [in / n, out] and `qzeros` [groups, out / n] with n = 32 / bits values a word, lowest bits first,
`scales` [groups, out] in float16, `g_idx` [in] the group of each input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKED = ("qweight", "qzeros", "scales", "g_idx")
BITS = (4, 8)
# What a format adds to a stored zero point. v1 stores them less one, in whole words: the borrow between
# neighbouring values is undone by adding to whole words too.
ZERO_OFFSETS = {"gptq": {4: 0x11111111, 8: 0x01010101}, "gptq_v2": {4: 0, 8: 0}}
BLOCK = 8  # packed words unpacked at a time: few enough that no second copy of a layer stands beside it
UNLOADABLE = (OSError, ValueError, LookupError, RuntimeError, ImportError, AttributeError)
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens*",
)


def load_artifact(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    causal: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | dict[str, Any]]:
    """A classifier (or a causal LM) and its tokenizer from a Hugging Face directory, in evaluation mode.

    One of the package's nets comes with its features' spec in place of a tokenizer.

    Args:
        path: the directory. Only safetensors are read.
        device: a GPTQ-quantized model is unpacked to float on a CPU and stays packed elsewhere.
        dtype: of the weights; by default float32 for an unpacked model, else the one it was saved in.
        causal: whether it is a language model.
        trust_remote_code: whether Python code that lies in the directory may be run.

    Raises ModelError for a missing or damaged directory, no tokenizer, weights that are missing,
    unexpected or of the wrong shape (the head's among them), and for quantized formats other than GPTQ.
    """
    import torch

    from llmkd import features
    from llmkd.models.hub import register_nets, say_trusted

    register_nets()
    if trust_remote_code:
        say_trusted(str(path))
    directory = Path(path)
    packing = read_json(directory / "config.json").get("quantization_config")
    weight_files(directory)
    is_net = (directory / features.FILE).is_file()
    reader = features.load(directory) if is_net else _tokenizer(directory, trust_remote_code)
    if packing and packing.get("quant_method") == "gptq" and torch.device(device).type == "cpu":
        model = _load_unpacked(directory, packing, dtype or torch.float32, causal, trust_remote_code)
    else:
        model = _load_stored(directory, device, dtype, causal, trust_remote_code)
    model.train(False)
    return model, reader


def size_bytes(path: Path | str) -> int:
    """Bytes of the weight files of a model directory."""
    return sum(file.stat().st_size for file in weight_files(Path(path)))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError where there is no such file or it holds something else."""
    if not file.is_file():
        raise ModelError(f"{file.parent} has no {file.name}; name a directory that holds a saved model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; save the model again")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, shards in order; ModelError where one is missing."""
    index = directory / "model.safetensors.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else []
    missing = [name for name in names or ["model.safetensors"] if not (directory / name).is_file()]
    if not missing:
        return [directory / name for name in names or ["model.safetensors"]]
    if any(directory.glob("*.bin")) and not names:
        raise ModelError(
            f"{directory} holds pickled weights (.bin), which are not read; "
            "load it where you trust it and save_pretrained() it, which writes safetensors"
        )
    raise ModelError(f"{directory} has no {missing[0]}; save the model again, or copy the whole directory")


@contextmanager
def open_tensors(directory: Path) -> Iterator[dict[str, Callable[[], torch.Tensor]]]:
    """Every tensor of a model directory by name, each read from disk when it is called."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        tensors: dict[str, Callable[[], torch.Tensor]] = {}
        for file in weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ModelError(f"{file} is damaged ({error}); save the model again") from error
            tensors |= {
                key: lambda key=key, handle=handle: handle.get_tensor(key) for key in list(handle.keys())
            }
        yield tensors


def _tokenizer(directory: Path, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(f"{directory} has no tokenizer; save the tokenizer beside the model")
    load = AutoTokenizer.from_pretrained
    tokenizer: PreTrainedTokenizerBase = _checked(
        directory, lambda: load(directory, local_files_only=True, trust_remote_code=trust), trust
    )
    return tokenizer


def _checked(directory: Path, load: Callable[[], Any], trust: bool = False) -> Any:
    """The result of `load`; what the libraries raise about a directory becomes one line that names it."""
    from safetensors import SafetensorError

    from llmkd.models.hub import wants_trust

    raised = (Exception,) if trust else (*UNLOADABLE, SafetensorError)  # code of others' may raise anything
    try:
        return load()
    except raised as error:
        if wants_trust(error):
            raise ModelError(
                f"{directory} cannot be loaded: it needs Python code that lies in it, and none is run "
                "unasked; read it, then say --trust-remote-code to llmkd predict or evaluate, in Python "
                "trust_remote_code=True"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{directory} cannot be loaded: {type(error).__name__}: {reason}") from error


def is_causal(path: Path) -> bool:
    """Whether a model directory says that it holds a language model."""
    return str((read_json(path / "config.json").get("architectures") or [""])[0]).endswith("ForCausalLM")


def _load_stored(
    directory: Path, device: str | torch.device, dtype: torch.dtype | None, causal: bool, trust: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model, loading = _checked(
        directory,
        lambda: auto.from_pretrained(
            directory,
            dtype=dtype or "auto",
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust,  # never None, which asks on the terminal
            output_loading_info=True,
        ),
        trust,
    )
    _check_complete(directory, loading, causal)
    return model  # type: ignore[no-any-return]


def _load_unpacked(
    directory: Path, packing: Mapping[str, Any], dtype: torch.dtype, causal: bool, trust: bool
) -> PreTrainedModel:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    bits, offset = _format(directory, packing)
    config = _checked(
        directory,
        lambda: AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust),
        trust,
    )
    del config.quantization_config
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    own = (getattr(config, "auto_map", None) or {}).get(auto) if trust else None
    if type(config) not in mapping and own is None:
        raise ModelError(f"{directory}: {config.model_type} has no {_kind(causal)}; name another model")
    kind: Any = mapping[type(config)] if own is None else _own_class(directory, own, trust)
    state = _unpacked_state(directory, bits, offset, dtype)
    # The model takes the tensors over rather than copies them, so this holds the weights once.
    model, loading = _checked(
        directory,
        lambda: kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        ),
        trust,
    )
    _check_complete(directory, loading, causal)
    return model  # type: ignore[no-any-return]


def _own_class(directory: Path, name: str, trust: bool) -> Any:
    """A class of the code that lies in the directory, and nowhere else."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if "--" in name:
        raise ModelError(
            f"{directory}: its auto_map names {name}, which lies elsewhere; put that code beside it"
        )
    return _checked(
        directory,
        lambda: get_class_from_dynamic_module(name, str(directory), local_files_only=True),
        trust,
    )


def _format(directory: Path, packing: Mapping[str, Any]) -> tuple[int, int]:
    bits = packing.get("bits")
    name = packing.get("checkpoint_format") or packing.get("format") or "gptq"
    if bits not in BITS or name not in ZERO_OFFSETS:
        raise ModelError(
            f"{directory} is packed in {bits} bits as {name!r}; read are 4 and 8 as gptq or gptq_v2"
        )
    return bits, ZERO_OFFSETS[name][bits]


def _unpacked_state(directory: Path, bits: int, offset: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight by the name it has in the float model; packed layers are unpacked one by one."""
    # Opened twice: the model keeps views of the mapped file, and of the same mapping also the packed pages.
    with open_tensors(directory) as plain, open_tensors(directory) as tensors:
        packed = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in PACKED}
        if not packed:
            raise ModelError(f"{directory} says it is quantized but holds no qweight; quantize it again")
        kept = [name for name in plain if name.rpartition(".")[2] not in PACKED]
        state = {name: _cast(plain[name](), dtype) for name in kept}
        for layer in sorted(packed):
            state[f"{layer}.weight"] = unpack_layer(layer, tensors, bits, offset, dtype).T
    return state


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def unpack_layer(
    layer: str,
    tensors: Mapping[str, Callable[[], torch.Tensor]],
    bits: int,
    offset: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One packed layer [in, out], transposed in memory: scales[g] * (q - zeros[g]) with g = g_idx[input].

    `offset` is added to the words of the zero points (see ZERO_OFFSETS). Computed in float32, a block of
    inputs at a time, and held in `dtype`, by default float32. Raises ModelError where one of the four
    tensors is missing or their shapes do not belong together.
    """
    import torch

    missing = [part for part in PACKED if f"{layer}.{part}" not in tensors]
    if missing:
        raise ModelError(f"packed layer {layer} lacks {missing[0]}; quantize the model again")
    words, zero_words, scales, groups = (tensors[f"{layer}.{part}"]() for part in PACKED)
    zeros = unpack_words((zero_words + offset).T, bits).T
    groups, size = groups.long(), 32 // bits
    fit = (len(words) * size, words.shape[1]) == (len(groups), scales.shape[1])
    if not fit or zeros.shape != scales.shape or not 0 <= groups.min() <= groups.max() < len(scales):
        raise ModelError(
            f"packed layer {layer} does not fit {bits} bits and its groups; quantize the model again"
        )
    weight = torch.empty(words.shape[1], len(groups), dtype=dtype or torch.float32)
    for begin in range(0, len(words), BLOCK):
        values = unpack_words(words[begin : begin + BLOCK], bits)
        at = slice(begin * size, begin * size + len(values))
        block = (values - zeros[groups[at]]).float() * scales[groups[at]].float()
        weight[:, at] = block.T
    return weight.T


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [n, m] to the unsigned values [n * 32 / bits, m] packed in them, lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
    values: torch.Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)  # masks the sign that >> drags in
    return values.reshape(-1, words.shape[1])


def _kind(causal: bool) -> str:
    return "language model" if causal else "sequence classifier"


def _check_complete(directory: Path, loading: Mapping[str, Any], causal: bool) -> None:
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in loading.get(f"{kind}_keys", ()))
        if names:
            raise ModelError(
                f"{directory}: weights {kind} for a {_kind(causal)}: {', '.join(names[:5])}"
                f"{' and more' if len(names) > 5 else ''}; save the whole model with its head again"
            )
