"""From token ids to class logits, in one place for training, capture and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.models.gemma2 import tune
from llmkd.models.last_layer import shorten


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
    inner = unwrapped(model)
    if not is_decoder(inner):  # encoders, and nets over numbers or pixels, pool in their own ways
        return inner(**inputs).logits.float()
    body, mask = backbone(inner), inputs["attention_mask"]
    if shorten(body):  # then the last layer gives that token's state alone: (B, 1, H)
        hidden = body(**inputs, use_cache=False, pooled_at=last_real_token(mask)).last_hidden_state
        return head_logits(inner.score, hidden[:, 0])
    hidden = body(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
    return head_logits(inner.score, pooled(inner, hidden, mask))


def logits_and_states(
    model: nn.Module, layers: Sequence[int], **inputs: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """`class_logits`, (B, C), and the hidden states of some layers, {layer: (B, L, H)}, of one forward.

    Layer 0 is the embeddings, i the output of layer i. A decoder's last has passed its final norm, as
    transformers gives it. `layers` names at least one, none beyond the model's `depth`.
    """
    inner = unwrapped(model)
    wanted: dict[str, Any] = {"output_hidden_states": sorted(set(layers))}  # no other is kept in memory
    if not is_decoder(inner):
        outputs = inner(**inputs, **wanted)
        return outputs.logits.float(), {layer: outputs.hidden_states[layer] for layer in layers}
    outputs = backbone(inner)(**inputs, use_cache=False, **wanted)
    vectors = pooled(inner, outputs.last_hidden_state, inputs["attention_mask"])
    return head_logits(inner.score, vectors), {layer: outputs.hidden_states[layer] for layer in layers}


def unwrapped(model: nn.Module) -> Any:
    """The transformers model itself, with the adapters that PEFT put inside it."""
    outer: Any = model
    return outer.get_base_model() if hasattr(model, "get_base_model") else outer


def is_decoder(model: nn.Module) -> bool:
    return hasattr(unwrapped(model), "score")


def backbone(model: nn.Module) -> Any:
    """What lies between a model's inputs and its head."""
    inner = unwrapped(model)
    tune(inner)
    return getattr(inner, inner.base_model_prefix)


def depth(model: nn.Module) -> int:
    """Layers of a transformer; 0 of a net that has no hidden states to give."""
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    if not isinstance(body, PreTrainedModel):
        return 0
    return int(getattr(inner.config.get_text_config(), "num_hidden_layers", 0))


def pooled(model: nn.Module, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The vector that stands for a row: a decoder's last real token, an encoder's first. -> (B, H)"""
    if not is_decoder(model):
        return hidden[:, 0]
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last_real_token(attention_mask)]


def head_logits(head: Any, vectors: Tensor) -> Tensor:
    """(B, H) -> raw float32 logits (B, C)"""
    # a head may be kept in float32 over a bf16 backbone, and under ZeRO-3 its dtype is that of the shards;
    # under autocast the cast is without effect
    held = getattr(head.weight, "ds_tensor", head.weight)
    return head(vectors.to(held.dtype)).float()


def without_dropout(model: nn.Module) -> None:
    """Evaluation mode, but for nf4 layers.

    They stay in training mode: in evaluation bitsandbytes repacks them for the CPU, which breaks the next
    backward and widths below a block. They hold no dropout, so nothing else depends on it.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True


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
