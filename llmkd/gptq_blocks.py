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

import torch

from llmkd import checkpoint, interrupt
from llmkd.checkpoint import over, under
from llmkd.errors import Stopped

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def kept(blocks: Sequence[nn.Module], directory: Path, of: str) -> Iterator[None]:
    """While optimum quantizes these blocks: each is saved in `directory`, or taken from there if it is whole.

    of: a digest of what is quantized, how and by which rows. A block of another quantization is said, left
    aside and done anew, as a damaged one is. Raises Stopped after a block where a signal waits.
    """
    from optimum.gptq.quantizer import GPTQ

    with ExitStack() as stack:
        deferring = stack.enter_context(ExitStack())
        deferring.enter_context(interrupt.deferred())
        keeper = _Keeper(blocks, directory, of, deferring)
        replaced(stack, GPTQ, "fasterquant", keeper.around(GPTQ.fasterquant))
        for index, block in enumerate(blocks):
            replaced(stack, block, "forward", partial(keeper.forward, index, block.forward))
        yield


def replaced(stack: ExitStack, owner: Any, name: str, new: Any) -> None:
    """An attribute, until the stack closes; where it is only inherited, it is inherited again."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, new)


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
                device = layer.weight.device
                # copied, or they would hold on to the file that is mapped
                found = {key: one.clone() for key, one in under(name, self.tensors).items()}
                layer.weight.data = unpacked(found).to(device)  # on the CPU, as `packed` tried it
                result: Any = tuple(found[key].to(device) for key in ("scale", "zero", "g_idx"))
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
            told = "another quantization's, or by other libraries or another device"
            print(f"{self._place()}: {told}, left aside: this block is done anew", flush=True)
            self.tensors, self.found = {}, None

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

    scale and zero: (out, groups); g_idx: (in,), the group of each input. They may lie on several devices:
    gptqmodel goes on on the CPU where a GPU's memory runs out, and brings only the weight back.
    """
    weight, scale, zero, g_idx = (one.cpu() for one in (weight, scale, zero, g_idx))
    group = g_idx.long()
    codes = ((weight / scale[:, group]).round() + zero[:, group]).to(torch.uint8)
    found = {"codes": codes, "scale": scale, "zero": zero, "g_idx": g_idx}
    if not torch.equal(unpacked(found), weight):
        found = {"weight": weight, "scale": scale, "zero": zero, "g_idx": g_idx}
    return found


def unpacked(tensors: dict[str, Tensor]) -> Tensor:
    """The weight (out, in) of what `packed` made of it, by the operations that gptqmodel quantizes with."""
    if "weight" in tensors:
        return tensors["weight"]
    group = tensors["g_idx"].long()
    return tensors["scale"][:, group] * (tensors["codes"] - tensors["zero"][:, group])
