"""Bytes that stand only while a model computes: what its backward pass needs, and passing tensors.

Counted as Korthikanti et al. count them (2022, arXiv 2205.05198, section 4): the tensors that each operation
keeps for its backward pass, here as transformers, PEFT, autocast and this package's own really keep them.
"""

from __future__ import annotations

from llmkd.planning.shapes import Shape
from llmkd.planning.way import Micro, Way, adapters

# Of modules that must not be imported here, as they import torch:
CHUNK, FEW = 128, 2**22  # tokens, and logits where words are few, of llmkd.chunked
WIDE = 2**20  # numbers of a pass in llmkd.closed_form
QUERIES = 128  # of llmkd.models.blocks
NUMBERS = 2**18  # of a block in llmkd.models.passes, on one thread


def block_saved(shape: Shape, way: Way, length: int) -> float:
    """Bytes a token that one block keeps for its backward pass, in rows of `length` tokens.

    H hidden, m intermediate, a = heads x head_dim, e bytes of the arithmetic (2 in bf16). Korthikanti's
    34 s b h + 5 a s^2 b (their equation 1) is the case of a GPT in 16 bits; here, term by term:
    inputs of linear layers (`_inputs`); norms, `_norm`; a gated MLP 3 m e, or 2 where it is this package's,
    GELU m e; queries, keys (repeated to all heads), values 3 a e; the result a e where no linear layer keeps
    it; the scores where attention is a matrix, `_scores`; dropout's masks.
    """
    e = 2 if way.precision == "bf16" else 4
    h, m, a = shape.hidden, shape.intermediate, shape.attention
    full = way.lora is None
    if shape.encoder:
        residual = 4 if way.device == "cuda" or e == 4 or full else 2  # CUDA's autocast norms in float32
        masks = 2 * h * (1 if way.device == "cuda" else e) if shape.hidden_dropout else 0
        norms = 2 * h * residual + masks
    else:
        norms = (4 if shape.family == "gemma2" else 2) * h * _norm(shape, way)
    act = (2 if _tuned(shape, way) else 3 if shape.gated else 1) * m * e
    math = not shape.eager and way.device == "cpu" and shape.attention_dropout > 0
    attention = 3 * a * (4 if math else e) + _scores(shape, way, length, e, math)
    kept = way.lora and fused(way) and 1 in dict(shape.read(way.lora["targets"]))  # by the output projection
    if not shape.eager and not math and way.lora and not kept:
        attention += a * e
    return _inputs(shape, way, e) + norms + act + attention


def _last_saved(shape: Shape, way: Way) -> float | None:
    """`block_saved` of a classifier's last block where it works for one token a row: of the others the first
    norm, what keys and values are made of, and these (`llmkd.models.last_layer`). None where it does not."""
    able = way.classes is not None and way.device == "cpu" and way.zero.stage < 3 and not way.states
    if not able or shape.family not in ("gemma2", "llama", "qwen2") or shape.attention_dropout:
        return None
    e = 2 if way.precision == "bf16" else 4
    return shape.hidden * (_norm(shape, way) + e) + 2 * shape.attention * e


def fused(way: Way) -> bool:
    """Whether base and adapter compute as one operation (`llmkd.models.lora_linear`)."""
    return way.zero.stage < 3 and way.load_in == way.precision


def _tuned(shape: Shape, way: Way) -> bool:
    """Whether attention, gated MLP and frozen norms are this package's own (`llmkd.models.gemma2`)."""
    return shape.family == "gemma2" and way.device == "cpu"


def _norm(shape: Shape, way: Way) -> int:
    """Bytes of a number that an RMSNorm keeps: computed in float32, twice where its weight learns; this
    package's keeps its input as it came."""
    if way.lora is None:
        return 8
    return 2 if _tuned(shape, way) and fused(way) and way.precision == "bf16" else 4


def _merged(shape: Shape) -> float:
    """Bytes of the widest layer's weight with its adapter added, as float32 computes without dropout."""
    return 4.0 * max(i * o for _, i, o in shape.linears)


def _inputs(shape: Shape, way: Way, e: int) -> float:
    """What linear layers keep: their inputs, if their weight learns, one copy for layers that read the same
    tensor; under autocast each its own. LoRA as one operation keeps each input once, and the places of
    dropout's zeros, 8 bytes each, or on CUDA a byte an entry; PEFT's A its own copy behind dropout, and
    dropout's mask."""
    if way.lora is None:
        every = sum(inputs for _, inputs, _ in shape.linears)
        readers = 2 + shape.gated  # that read what q, or the gate, has read: k, v and up
        return e * (every - readers * shape.hidden) if e == 4 else e * every
    aimed, dropout = shape.read(way.lora["targets"]), way.lora["dropout"]
    widths, low = sum(width for _, width in aimed), way.lora["r"] * e * len(aimed)
    apart = not fused(way) and (e == 2 or dropout)
    kept = e * (widths if apart else sum(dict(aimed).values()))
    entry = 1 if way.device == "cuda" else 4 if apart else 8 * dropout
    return kept + low + entry * widths * bool(dropout)


def _scores(shape: Shape, way: Way, length: int, e: int, math: bool) -> float:
    """Of L x L a head: softmax in float32, its copy in bf16, soft-capping's tanh, dropout's mask and result.
    Fused attention keeps its row sums alone, and the padding mask; Gemma 2's of this package (on a CPU)
    tanh and shares, of blocks of queries up to the diagonal."""
    if math:
        return 12.0 * shape.heads * length
    if not shape.eager:
        return 4.0 * shape.heads + e * length
    if _tuned(shape, way):
        return e * shape.heads * float(length + min(length, QUERIES))
    copies = 4 + (e if e == 2 else 0) + (e if shape.softcap else 0)
    if shape.attention_dropout:
        copies += e + (1 if way.device == "cuda" else e)
    if shape.family == "deberta-v2":
        copies += 2 * e  # the two further products of disentangled attention
    return float(shape.heads * length * copies)


def activations(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of one micro-batch between its forward and its backward pass, at their peak.

    Without checkpointing all blocks' `block_saved`. With it (Chen et al. 2016, arXiv 1604.06174) each
    block's input, and one block in full while it is computed again. Under autocast weights held in float32
    have a copy in bf16. The passing tensors of one block's backward come on top.
    """
    rows, length = micro
    tokens = rows * length
    if not shape.hidden:
        return shape.saved_bytes * tokens * 1.25
    e = 2 if way.precision == "bf16" else 4
    full, h = way.lora is None, shape.hidden
    saved = tokens * block_saved(shape, way, length)
    casts = 2.0 * shape.block if e == 2 and (full or way.load_in == "fp32") else 0.0
    if way.lora and e == 2:
        casts += 2.0 * adapters(shape, way.lora) / shape.layers
    around = tokens * h * 4.0 * (3 if shape.encoder else 2)
    passing = tokens * shape.intermediate * float(e)
    if full:
        passing += max(i * o for _, i, o in shape.linears) * (4.0 if e == 4 else 6.0)
    elif fused(way):
        passing *= 2
        if e == 4 and not (way.lora and way.lora["dropout"]):
            passing += _merged(shape)
    else:  # PEFT's adapters compute in float32
        passing += tokens * shape.intermediate * 8.0
    if _tuned(shape, way):  # of a block's gated MLP, five in float32
        passing += 20.0 * min(tokens * shape.intermediate, NUMBERS)
    if way.load_in == "nf4":  # a layer is unpacked while it computes
        passing += 2.0 * max(i * o for _, i, o in shape.linears)
    if not way.checkpointing:
        short = _last_saved(shape, way)
        last = saved if short is None else min(saved, tokens * short)
        return (shape.layers - 1) * saved + last + shape.layers * casts + around + passing
    inputs = shape.layers * tokens * h * (2.0 if e == 2 and way.load_in != "fp32" and not full else 4.0)
    forward = shape.layers * casts + passing if full else 0.0  # autocast keeps them until its end
    return inputs + around + max(forward, saved + casts + passing)


def head(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of a language model's head: logits of 128 tokens, four float32 passes over some of them, and the
    head's own gradient if it learns. With teachers beside, 16 bytes a word of 128 tokens, more than of up
    to three, or of any divergence. Logits of all tokens where its own
    model alone can compute them. A classifier has none to speak of."""
    if way.classes is not None:
        return 0.0
    tokens, v, h = micro[0] * micro[1], shape.vocab, shape.hidden
    bf16, learns = way.precision == "bf16", way.lora is None
    copy = 2.0 * v * h if bf16 and learns else 0.0
    at_once = float(min(max(CHUNK, FEW // v), tokens) * v)
    own = copy + (4.0 * v * h if learns else 0.0)
    if way.compared:
        return 16.0 * (at_once + min(at_once, 2.0**22)) + own
    if shape.whole_logits:  # with log-softmax and its gradient
        return tokens * v * (10.0 if bf16 else 12.0) + own
    passes = min(at_once, float(WIDE * (4 if way.device == "cuda" else 1)))
    return at_once * (2 if bf16 else 4) + 16.0 * passes + own


def running(shape: Shape, way: Way, micro: Micro) -> float:
    """Bytes of a forward pass without gradients: the residual stream, and one block's widest moment."""
    rows, length = micro
    if not shape.hidden:
        return shape.saved_bytes * rows * length
    e = 2 if way.precision == "bf16" else 4
    matrix = shape.heads * length * (4 + 2 * e) if shape.eager else 0
    widest = max((3 if shape.gated else 2) * shape.intermediate * e, 5 * shape.attention * e + matrix)
    v = shape.vocab
    chunk = 12.0 * min(max(CHUNK, FEW // v), rows * length) * v if way.classes is None else 0.0
    unpacked = 2.0 * max(i * o for _, i, o in shape.linears) if way.load_in in ("nf4", "int8") else 0.0
    if way.lora and e == 4 and fused(way):
        unpacked = _merged(shape)
    return rows * length * (2 * shape.hidden * 4 + widest) + chunk + unpacked
