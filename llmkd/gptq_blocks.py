"""A quantization's finished blocks on disk: one that was cut off goes on behind the last of them.

Each block is a checkpoint of its own (`llmkd.checkpoint`): of every layer its codes and what unpacks them.
Of a block that is found there, only the one forward pass to the next block is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from llmkd import checkpoint, interrupt
from llmkd.checkpoint import over, under
from llmkd.errors import ModelError, Stopped

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def kept(blocks: Sequence[nn.Module], directory: Path, of: str) -> Iterator[None]:
    """While optimum quantizes these blocks: each is saved in `directory`, or taken from there if it is whole.

    of: a digest of what is quantized, how and by which rows. Raises ModelError where another quantization's
    blocks lie there, and Stopped after a block where a signal waits.
    """
    from optimum.gptq.quantizer import GPTQ

    with ExitStack() as stack:
        deferring = stack.enter_context(ExitStack())
        deferring.enter_context(interrupt.deferred())
        keeper = _Keeper(blocks, directory, of, deferring)
        stack.enter_context(patch.object(GPTQ, "fasterquant", keeper.around(GPTQ.fasterquant)))
        for index, block in enumerate(blocks):
            forward = partial(keeper.forward, index, block.forward)
            stack.enter_context(patch.object(block, "forward", forward))
        yield


class _Keeper:
    """Where optimum stands: it runs a block over all rows for each of its layers in turn, then once more."""

    def __init__(self, blocks: Sequence[nn.Module], directory: Path, of: str, deferring: ExitStack) -> None:
        from optimum.gptq.utils import get_layers

        self.directory, self.of, self.deferring = directory, of, deferring
        self.layers = [{layer: name for name, layer in get_layers(block).items()} for block in blocks]
        self.index = self.left = -1  # the block at hand, and how many of its layers are not quantized yet
        self.tensors: dict[str, Tensor] = {}  # of that block, what is saved of it
        self.found: dict[str, Any] | None = None  # its checkpoint's facts, where one was found

    def forward(
        self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A block's own, but for a block that is found: its layers ask for no Hessian, so nothing is run."""
        if index != self.index:
            self._begin(index)
        return hidden if self.found and self.left else forward(hidden, *args, **kwargs)

    def around(self, quantize: Callable[..., Any]) -> Callable[..., Any]:
        """GPTQ's method, with its result saved, or in its place one that was."""

        def fasterquant(task: Any, **settings: Any) -> Any:
            layer, config = task.module, task.qcfg
            name = self.layers[self.index][layer]
            if self.found:
                found = under(name, self.tensors)  # copied, or they would hold on to the file that is mapped
                found = {key: one.to(layer.weight.device, copy=True) for key, one in found.items()}
                layer.weight.data = unpacked(found)
                result: Any = (found["scale"], found["zero"], found["g_idx"])
                config.mock_quantization = self.found["mock"]
            else:
                result = quantize(task, **settings)
                self.tensors |= over(name, packed(layer.weight.data, *result[:3]))
            self.left -= 1
            if not self.left:
                self._end(config)
            return result

        return fasterquant

    def _begin(self, index: int) -> None:
        self.index, self.left = index, len(self.layers[index])
        self.tensors, self.found = checkpoint.read(self._place()) or ({}, None)
        if self.found and self.found["of"] != self.of:
            raise ModelError(
                f"{self.directory}: another quantization's blocks; remove that directory to begin anew"
            )

    def _end(self, config: Any) -> None:
        if not self.found:
            # gptqmodel sets it where a layer's losses are NaN, and all later layers are then but rounded
            facts = {"of": self.of, "mock": bool(config.mock_quantization)}
            checkpoint.write(self._place(), self.index + 1, self.tensors, facts)
        self.tensors = {}
        if self.index + 1 == len(self.layers):
            self.deferring.close()  # what is left cannot be gone on with: a signal ends it at once
        if signal := interrupt.asked():
            raise Stopped(signal, f"block {self.index + 1} of {len(self.layers)} is saved")

    def _place(self) -> Path:
        return self.directory / f"block{self.index + 1}"


def packed(weight: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor) -> dict[str, Tensor]:
    """A quantized layer, on the CPU; its weight (out, in) a byte each, where that gives it back exactly.

    scale and zero: (out, groups); g_idx: (in,), the group of each input.
    """
    group = g_idx.long()
    codes = ((weight / scale[:, group]).round() + zero[:, group]).to(torch.uint8)
    found = {"codes": codes, "scale": scale, "zero": zero, "g_idx": g_idx}
    if not torch.equal(unpacked(found), weight):
        found = {"weight": weight, "scale": scale, "zero": zero, "g_idx": g_idx}
    return {name: tensor.cpu() for name, tensor in found.items()}


def unpacked(tensors: dict[str, Tensor]) -> Tensor:
    """The weight (out, in) of what `packed` made of it, by the operations that gptqmodel quantizes with."""
    if "weight" in tensors:
        return tensors["weight"]
    group = tensors["g_idx"].long()
    return tensors["scale"][:, group] * (tensors["codes"] - tensors["zero"][:, group])
