"""Running optimum's GPTQ over a model: quietly, and with each block called as the model calls it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Batch = dict[str, list[list[int]]]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# gptqmodel compiles a C++ packer at first use, for about 25 s on a CPU. Its Python packer does some
# 12 million weights a second, so fewer than this are packed sooner without it.
COMPILE_FROM = 300_000_000


def run_gptq(
    model: PreTrainedModel,
    stack: str,
    batches: list[Batch],
    settings: Mapping[str, Any],
    weights: int,
    keep: tuple[Path, str] | None = None,
) -> None:
    """Quantize in place the linear layers of the blocks in the list named `stack`.

    `batches` hold unpadded rows of one length each, shortest first; `settings` are GPTQQuantizer's;
    `weights` is how many will be quantized; `keep`, a directory and a digest, is for `gptq_blocks.kept`.
    `import_quietly` comes before it.
    """
    from optimum.gptq import GPTQQuantizer

    from llmkd.gptq_blocks import kept

    quantizer = GPTQQuantizer(dataset=batches, **settings)
    blocks = list(model.get_submodule(stack).children())
    with (
        _own_arguments(model, blocks, batches),
        _quiet_run(),
        _packer(compiled=weights >= COMPILE_FROM),
        kept(blocks, *keep) if keep else nullcontext(),
    ):
        quantizer.quantize_model(model)


def import_quietly() -> None:
    """gptqmodel without its banner and its root log handler; errors still show, and later warnings too.

    Call it before a model is loaded: it keeps the exception of a failed import of its own, with all frames
    that were open then and what they held.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with open(os.devnull, "w", encoding="utf-8") as sink, redirect_stdout(sink):
        from logbar import LogBar  # type: ignore[import-untyped]

        log = LogBar.shared()
        log.setLevel(logging.ERROR)
        logging.disable(logging.WARNING)
        try:
            import gptqmodel  # noqa: F401
            import optimum.gptq  # noqa: F401
        finally:
            logging.disable(logging.NOTSET)
            root.handlers[:], root.level = handlers, level
    log.setLevel(logging.WARNING)


@contextmanager
def _quiet_run() -> Iterator[None]:
    from optimum.gptq import quantizer
    from tqdm.auto import tqdm

    quantizer.tqdm = partial(tqdm, disable=None)  # a bar on a terminal, nothing in a log file
    try:
        with warnings.catch_warnings():  # optimum touches deprecated properties of every module
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        quantizer.tqdm = tqdm


@contextmanager
def _packer(compiled: bool) -> Iterator[None]:
    """gptqmodel's compiled packer or its Python one; GPTQMODEL_DISABLE_PACK_EXT, where set, decides."""
    name = "GPTQMODEL_DISABLE_PACK_EXT"
    if compiled or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _own_arguments(model: PreTrainedModel, blocks: list[nn.Module], batches: list[Batch]) -> Iterator[None]:
    """Give every block the arguments the model itself gives it, while optimum runs the blocks one by one.

    optimum gives all of them the keyword arguments of the first, and drops positional ones. That calibrates
    wrongly where blocks differ in mask or rotary base (Gemma 3, ModernBERT, Gemma 2 beyond its window).
    Without padding these arguments depend on the batch's shape only, so they are recorded by shape.
    """
    first, *others = _record(model, blocks, batches[-1])  # the longest rows: where masks differ if they do
    if not first[0] and all(_same(own, first) for own in others):
        yield
        return
    by_shape = {_shape(batch): batch for batch in batches}
    table = {shape: _record(model, blocks, batch) for shape, batch in by_shape.items()}
    hooks = [_replacer(index, table) for index in range(len(blocks))]
    handles = [
        block.register_forward_pre_hook(hook, with_kwargs=True)
        for block, hook in zip(blocks, hooks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacer(index: int, table: Mapping[tuple[int, int], list[Arguments]]) -> Any:
    from optimum.gptq.utils import nested_move_to

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        hidden = args[0] if args else kwargs["hidden_states"]
        own_args, own_kwargs = table[tuple(hidden.shape[:2])][index]
        moved = {name: nested_move_to(value, hidden.device) for name, value in own_kwargs.items()}
        return (hidden, *nested_move_to(own_args, hidden.device)), moved

    return hook


def _shape(batch: Batch) -> tuple[int, int]:
    return len(batch["input_ids"]), len(batch["input_ids"][0])


def _record(model: PreTrainedModel, blocks: list[nn.Module], batch: Batch) -> list[Arguments]:
    """What each block is called with beside the hidden states: positional and keyword arguments."""
    import torch

    seen: list[Arguments] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    cache, model.config.use_cache = getattr(model.config, "use_cache", None), False
    try:
        with torch.no_grad():  # the backbone only: a head on a batch would want a pad token
            model.base_model(**{name: torch.tensor(value) for name, value in batch.items()})
    finally:
        model.config.use_cache = cache
        for handle in handles:
            handle.remove()
    return seen


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one is other or bool(one == other)
