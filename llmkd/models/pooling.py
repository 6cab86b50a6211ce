"""From token ids to class logits, in one place for training, capture and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Position of each row's last token that is not padding. (B, L) -> (B,)

    By the mask, never by the pad token's id: a text may end in the token that also pads
    (pad == eos), and rows may be padded on either side or not at all.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(-1)


def class_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Raw float32 logits (B, C) of any classifier, wrapped by PEFT or not, from its own inputs.

    A decoder's head (`score`) is applied to the last real token's hidden state alone.
    """
    outer: Any = model
    inner = outer.get_base_model() if hasattr(model, "get_base_model") else outer
    head = getattr(inner, "score", None)
    if head is None:  # encoders, and nets over numbers or pixels, pool in their own ways
        return inner(**inputs).logits.float()
    attention_mask = inputs["attention_mask"]  # (B, L)
    backbone = getattr(inner, inner.base_model_prefix)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
    rows = torch.arange(len(hidden), device=hidden.device)
    pooled = hidden[rows, last_real_token(attention_mask)]  # (B, H)
    # a head kept in float32 over a bf16 backbone; under autocast the cast is without effect
    return head(pooled.to(head.weight.dtype)).float()  # (B, C)


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[object]:
    """bf16 arithmetic over weights kept as they are, or nothing. precision: "bf16" or "fp32"."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def resolve_precision(precision: str) -> str:
    """ "auto" is bf16 where the processor computes it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
