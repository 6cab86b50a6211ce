"""What arithmetic and memory depend on in a model: its shape, told by its config, without one weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkd.models.scaled import scaled_by

DECODERS = ("llama", "mistral", "qwen2", "gemma2")  # counted by formula, as encoders are
ENCODERS = ("bert", "deberta-v2")
BIASED = ("phi", "gptj", "codegen")  # their language models' heads have a bias
EAGER = ("gemma2", "deberta-v2")  # transformers computes their attention as a matrix of L x L


@dataclass(frozen=True)
class Shape:
    """A transformer: sizes of a block, and what stands around the blocks. One of the package's nets has
    no blocks that this describes: its three last fields are counted on the meta device.

    linears: (path in a block, inputs, outputs); outside: those beside the blocks (a pooler);
    around: parameters of neither linears nor vocabulary table (biases, norms, positions);
    counted: parameters without a head, where a formula would guess.
    """

    family: str
    layers: int
    hidden: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    intermediate: int = 0
    vocab: int = 0
    linears: tuple[tuple[str, int, int], ...] = ()
    outside: tuple[tuple[str, int, int], ...] = ()
    around: int = 0
    small: int = 0  # of `around`, each block's
    head_extra: int = 0  # a classifier's further layers, outside its backbone
    encoder: bool = False
    tied: bool = False
    eager: bool = False
    softcap: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    counted: int | None = None
    whole_logits: bool = False
    saved_bytes: float = 0.0  # of a net: saved for backward, a token, float32
    net_flops: float = 0.0  # of a net: one forward, a token

    @property
    def attention(self) -> int:
        return self.heads * self.head_dim

    @property
    def gated(self) -> bool:
        return not self.encoder

    @property
    def block(self) -> int:
        """Weights of one block's linear layers."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def backbone(self) -> int:
        """Parameters without any head."""
        if self.counted is not None:
            return self.counted
        outside = sum(inputs * outputs for _, inputs, outputs in self.outside)
        return self.vocab * self.hidden + self.layers * self.block + outside + self.around

    def head(self, classes: int | None) -> int:
        """Parameters of the head: of so many classes, or of next tokens for None, where it is not tied."""
        if classes is None:
            return 0 if self.tied else self.vocab * self.hidden
        return self.hidden * classes + (classes if self.encoder else 0) + self.head_extra

    def targeted(self, targets: str | list[str]) -> list[tuple[int, int, int]]:
        """(how often, inputs, outputs) of each linear layer that PEFT adapts for these `targets`."""
        places = [(f"layers.0.{path}", self.layers, i, o) for path, i, o in self.linears]
        places += [(path, 1, i, o) for path, i, o in self.outside]
        return [(often, i, o) for path, often, i, o in places if _matches(path, targets)]

    def read(self, targets: str | list[str]) -> list[tuple[int, int]]:
        """(which tensor, its width) that each adapted layer of a block reads: q, k, v the same one, 0, the
        next layer another, 1, gate and up one, 2, and the last, 3."""
        readers = [0, 0, 0, 1, *([2, 2] if self.gated else [2]), 3]
        layers = zip(readers, self.linears, strict=True)
        return [(reader, i) for reader, (path, i, _) in layers if _matches(f"layers.0.{path}", targets)]


def _matches(path: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, f"model.{path}") is not None
    return any(f".{path}".endswith(f".{target}") for target in targets)


def from_config(config: Mapping[str, Any]) -> Shape:
    """The shape of a transformers config as a plain dict. Raises KeyError on one without the usual sizes."""
    kind = config["model_type"]
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    encoder = kind in ENCODERS or (kind not in DECODERS and "num_key_value_heads" not in config)
    inner = config.get("intermediate_size") or 4 * hidden
    widths = (hidden, heads * head_dim, kv_heads * head_dim, inner)
    small = _encoder_small(hidden, inner) if encoder else _decoder_small(kind, widths)
    capped = config.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None) is not None
    chosen = config.get("_attn_implementation") or ("eager" if kind in EAGER else "sdpa")
    return Shape(
        family=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=config["vocab_size"],
        linears=_encoder_linears(kind, *widths) if encoder else _decoder_linears(*widths),
        outside=(("pooler.dense", hidden, hidden),) if kind == "bert" else (),
        around=layers * small + (_encoder_rest(kind, config) if encoder else hidden),
        small=small,
        head_extra=hidden * hidden + hidden if kind == "deberta-v2" else 0,
        encoder=encoder,
        tied=bool(config.get("tie_word_embeddings", kind == "gemma2" or encoder)),
        eager=kind in EAGER or chosen == "eager",
        softcap=capped,
        hidden_dropout=config.get("hidden_dropout_prob", 0.1) if encoder else 0.0,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1) if encoder else 0.0,
        whole_logits=kind in BIASED or scaled_by(config) is not None,
    )


def _decoder_linears(hidden: int, wide: int, narrow: int, inner: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("self_attn.q_proj", hidden, wide),
        ("self_attn.k_proj", hidden, narrow),
        ("self_attn.v_proj", hidden, narrow),
        ("self_attn.o_proj", wide, hidden),
        ("mlp.gate_proj", hidden, inner),
        ("mlp.up_proj", hidden, inner),
        ("mlp.down_proj", inner, hidden),
    )


def _encoder_linears(
    kind: str, hidden: int, wide: int, narrow: int, inner: int
) -> tuple[tuple[str, int, int], ...]:
    names = ("query_proj", "key_proj", "value_proj") if kind == "deberta-v2" else ("query", "key", "value")
    return (
        *((f"attention.self.{name}", hidden, wide) for name in names),
        ("attention.output.dense", wide, hidden),
        ("intermediate.dense", hidden, inner),
        ("output.dense", inner, hidden),
    )


def _decoder_small(kind: str, widths: tuple[int, ...]) -> int:
    """A block's norms, and the biases that Qwen2 has."""
    hidden, wide, narrow, _ = widths
    return (4 if kind == "gemma2" else 2) * hidden + (wide + 2 * narrow if kind == "qwen2" else 0)


def _encoder_small(hidden: int, inner: int) -> int:
    """A block's six biases and two norms."""
    return 9 * hidden + inner


def _encoder_rest(kind: str, config: Mapping[str, Any]) -> int:
    """Positions, token types, the norm of embeddings, and the bias of a pooler inside the backbone."""
    hidden = int(config["hidden_size"])
    if kind == "deberta-v2":  # relative positions and their norm stand in for a table of positions
        return 2 * hidden + 2 * int(config.get("position_buckets", 256)) * hidden + 2 * hidden
    rows = int(config.get("max_position_embeddings", 512)) + int(config.get("type_vocab_size", 2))
    return rows * hidden + 2 * hidden + hidden
