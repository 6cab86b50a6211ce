"""A decoder classifier's last layer, worked out for the pooled token alone.

Its head reads one token's vector. Of the last layer that takes keys and values of all tokens, but queries,
attention, output projection, MLP and norms of that token only: the others' have no reader and no gradient.
Of L layers that saves most of one, forward and backward. Numbers stay, to rounding, but for dropout's draws:
an adapter in that layer drops other entries, as it draws for fewer tokens.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.models.blocks import is_traced

FAMILIES = ("gemma2", "llama", "qwen2")  # whose layers are made alike: see `_layer`
WAYS = ("eager", "sdpa")  # of attention, which take any mask


def shorten(body: Any) -> bool:
    """Teach a decoder's last layer the argument `pooled_at`; whether it can take it now.

    Not where something looks at the hidden states (a hook), where ZeRO-3 has cut up the weights, with
    dropout of attention, in a family that is not known, or off the CPU.
    """
    config = body.config
    family = getattr(config, "model_type", "")
    if family not in FAMILIES or config._attn_implementation not in WAYS or is_traced():
        return False
    layer = body.layers[config.num_hidden_layers - 1]
    own = type(layer).__module__ == f"transformers.models.{family}.modeling_{family}"
    if not own or (body.training and config.attention_dropout) or _is_watched(body, layer):
        return False
    if "forward" not in layer.__dict__:
        layer.forward = partial(_layer, layer)
    return getattr(layer.forward, "func", None) is _layer


def _is_watched(body: Any, layer: nn.Module) -> bool:
    part: Any
    for part in (body, body.norm, *layer.modules()):
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if any(hooks) or hasattr(part, "_hf_hook"):  # accelerate's, of a model spread over devices
            return True
    first: Any = next(layer.parameters())
    return hasattr(first, "ds_id") or first.device.type != "cpu"


def _layer(layer: Any, hidden: Tensor, *args: Any, pooled_at: Tensor | None = None, **more: Any) -> Tensor:
    """hidden (B, L, H), pooled_at (B,) -> (B, 1, H)"""
    if pooled_at is None:
        return type(layer).forward(layer, hidden, *args, **more)
    rows = torch.arange(len(hidden))
    own = hidden[rows, pooled_at][:, None]  # (B, 1, H)
    norm = layer.input_layernorm
    found = _attention(layer.self_attn, norm(own), norm(hidden), rows, pooled_at, **more)
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 2, which norms what a part gives, too
        own = own + layer.post_attention_layernorm(found)
        found = layer.mlp(layer.pre_feedforward_layernorm(own))
        return own + layer.post_feedforward_layernorm(found)
    own = own + found
    return own + layer.mlp(layer.post_attention_layernorm(own))


def _attention(
    module: Any,
    own: Tensor,
    hidden: Tensor,
    rows: Tensor,
    pooled_at: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **more: Any,
) -> Tensor:
    """One query a row, own (B, 1, H), over all keys, hidden (B, L, H) -> (B, 1, H)

    Without a mask the rows are not padded, so the last token sees every key.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    library: Any = sys.modules[type(module).__module__]
    query, key, value = (
        layer(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)  # (B, heads, 1 or L, D)
        for layer, x in ((module.q_proj, own), (module.k_proj, hidden), (module.v_proj, hidden))
    )
    cos, sin = (angle.expand(len(hidden), -1, -1) for angle in position_embeddings)  # (B, L, D)
    here = cos[rows, pooled_at][:, None], sin[rows, pooled_at][:, None]  # (B, 1, D)
    mask = None if attention_mask is None else attention_mask[rows, :, pooled_at][:, :, None]  # (B, 1, 1, L)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, library.eager_attention_forward
    )
    capped = {"softcap": module.attn_logit_softcapping} if hasattr(module, "attn_logit_softcapping") else {}
    found, _ = attend(
        module,
        _turned(query, here, library),
        _turned(key, (cos, sin), library),
        value,
        mask,
        dropout=0.0,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", None),
        **capped,
    )
    return module.o_proj(found.reshape(*own.shape[:2], -1))


def _turned(x: Tensor, angles: tuple[Tensor, Tensor], library: Any) -> Tensor:
    """transformers' `apply_rotary_pos_emb`, of one tensor: (B, heads, L, D)"""
    cos, sin = angles  # (B, L, D)
    return x * cos[:, None] + library.rotate_half(x) * sin[:, None]
