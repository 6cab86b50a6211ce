"""Dropout's zeros as what they are on a CPU: few, so drawn and written one by one.

torch draws a random number for each entry, on one core whatever their count, and that takes as long as a
narrow layer's products. Here the gaps between zeros are drawn, a twentieth as many at p = 0.05, and a
zero's place is all that is kept for the gradient. Which entries fall is as random as torch's, each with
probability p and by itself, but from one seed other ones. Elsewhere than on a CPU it is a mask, a byte an
entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drawn(x: Tensor, p: float) -> Tensor:
    """The zeros of a dropout of x with probability p, 0 < p < 1: places in x laid flat, rising, or a mask."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(p)
    return places(x.numel(), p)


def without(x: Tensor, dropped: Tensor) -> Tensor:
    """x with zeros where they fell."""
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped.reshape(x.shape), 0)
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def zero_(x: Tensor, dropped: Tensor) -> Tensor:
    """The same in place; x is contiguous."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped.reshape(x.shape), 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def places(count: int, p: float) -> Tensor:
    """Those of 0, 1, ..., count - 1 that fall, each with probability p: (k,), rising.

    Between two that fall there are as many others as there are failures before a success, of which
    floor(log(U) / log(1 - p)) is a draw, U uniform (Devroye 1986, Non-Uniform Random Variate Generation,
    chapter X, section 2).
    """
    parts, last = [], -1
    while last < count - 1:
        expected = (count - last) * p
        many = math.ceil(expected + 4 * math.sqrt(expected)) + 8  # seldom too few
        others = torch.rand(many, dtype=torch.float32).neg_().log1p_().div_(math.log1p(-p)).clamp_(max=count)
        parts.append(others.long().add_(1).cumsum(0).add_(last))
        last = int(parts[-1][-1])
    found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    return found[: int(torch.searchsorted(found, count))]
