"""What a causal LM says: judged against text and teachers, and continued."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from llmkd import ranks
from llmkd.batches import Examples, Rows, sorted_batches
from llmkd.chunked import tokens_at_once
from llmkd.errors import DataError, ModelError
from llmkd.losses import ce, kl
from llmkd.models.head import (
    Head,
    head_of,
    hidden_states,
    inner,
    predicting_states,
    target_mask,
    with_heads,
)
from llmkd.models.lora import sharded
from llmkd.train import inference


def evaluate_lm(
    model: nn.Module,
    examples: Examples,
    rows: Rows,
    *,
    batch_tokens: int,
    vocab: int,
    teachers: Mapping[str, nn.Module] | None = None,
    precision: str = "fp32",
    chunk: int | None = None,
    timed: bool = True,
) -> dict[str, float]:
    """Means over all targets of `rows`, each counted once, whatever the ranks.

    {"nll", "perplexity", "tokens": the targets, "tokens_per_second": real tokens read by the model alone,
    on this rank; where `timed`, which costs one more forward}, and for each teacher {"kl/name": KL(teacher ||
    model), "agreement/name": the share of targets whose top word is the teacher's}. In nats, at temperature
    1, over the first `vocab` words.
    Raises DataError without rows, ModelError naming the row where a target's loss is not finite.
    """
    chunk = chunk or tokens_at_once(vocab)
    if not len(rows):
        raise DataError("no rows to evaluate a language model on; check the test part")
    teachers = teachers or {}
    batches = sorted_batches(rows, examples.lengths, batch_tokens)
    fill = -len(batches) % ranks.world()  # ZeRO-3: equally many forwards on every rank
    mine = [*range(len(batches)), *[len(batches) - 1] * fill][ranks.rank() :: ranks.world()]
    found: dict[int, dict[str, float]] = {}
    tokens, seconds = 0, 0.0
    with inference(model):
        if timed:  # the first forward is slow
            _sums(model, {}, examples, batches[-1], vocab, precision, chunk)
        for number in mine:
            found[number], took = _sums(model, teachers, examples, batches[number], vocab, precision, chunk)
            tokens, seconds = tokens + int(examples.lengths[batches[number]].sum()), seconds + took
    merged = {number: sums for part in ranks.gather(found) for number, sums in part.items()}
    totals = {name: math.fsum(sums[name] for sums in merged.values()) for name in found[mine[0]]}
    count = totals.pop("tokens")
    means = {name: total / count for name, total in totals.items()}
    speed = {"tokens": count, **({"tokens_per_second": tokens / seconds} if timed else {})}
    return {**means, "perplexity": math.exp(means["nll"]), **speed}


def _sums(
    model: nn.Module,
    teachers: Mapping[str, nn.Module],
    examples: Examples,
    rows: Rows,
    vocab: int,
    precision: str,
    chunk: int,
) -> tuple[dict[str, float], float]:
    """A batch's sums over targets, and the seconds that the model alone took."""
    inputs, real = batch_inputs(model, examples, rows)
    targets = inputs["input_ids"][:, 1:][real]  # (N,)
    sums = dict.fromkeys(
        ["nll", *(f"{what}/{name}" for name in teachers for what in ("kl", "agreement"))], 0.0
    )
    seconds, began = 0.0, _now(real)
    states = predicting_states(model, inputs, real, precision)  # (N, H)
    seconds += _now(real) - began
    theirs = {name: predicting_states(teacher, inputs, real, precision) for name, teacher in teachers.items()}

    def body() -> None:
        nonlocal seconds
        head = head_of(model, vocab).to(states.dtype)
        heads = {name: head_of(teacher, vocab).to(states.dtype) for name, teacher in teachers.items()}
        for begin in range(0, len(targets), chunk):
            part, began = slice(begin, begin + chunk), _now(real)
            logits = head.logits(states[part])  # (n, vocab)
            losses = ce(logits, targets[part])  # (n,)
            if not (finite := losses.isfinite()).all():
                refuse_row(examples, rows, real, begin + int(finite.int().argmin()))
            sums["nll"] += float(losses.double().sum())
            seconds += _now(real) - began
            for name, of in heads.items():
                teacher = of.logits(theirs[name][part])  # (n, vocab)
                sums[f"kl/{name}"] += float(kl(logits, teacher).double().sum())
                sums[f"agreement/{name}"] += int((logits.argmax(-1) == teacher.argmax(-1)).sum())

    with_heads([model, *teachers.values()], states, body)
    return {**sums, "tokens": len(targets)}, seconds


def refuse_row(examples: Examples, batch: Rows, real: Tensor, target: int) -> NoReturn:
    """Raise ModelError naming the row of a batch that holds its real target number `target`."""
    row = batch[int(real.nonzero()[target, 0])]  # real (rows, L): targets lie row by row
    raise ModelError(
        f"next-token logits of row {examples.ids[row]!r} are not finite; try precision: fp32, or look at it"
    )


def batch_inputs(model: nn.Module, examples: Examples, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """What a model reads of a batch, and which positions predict a target, (B, L - 1), on its device."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in examples.inputs(rows).items()}
    marked = examples.beside["targets"](rows)["mask"].to(device) if "targets" in examples.beside else None
    return readable(inputs), target_mask(inputs, marked)


def readable(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's inputs as a model is given them: of packed documents (tasks/causal_lm.py) no attention mask,
    or transformers would not look at their position_ids for where one ends."""
    packed = "position_ids" in inputs
    return {name: tensor for name, tensor in inputs.items() if not packed or name != "attention_mask"}


def check_packing(model: nn.Module, tolerance: float = 1e-2) -> None:
    """Whether a pack's documents do not see one another in this model, by its own states of two of them.

    Raises ModelError where it, or its attention's implementation, does not go by position_ids.
    A model that ZeRO-3 has cut up cannot be asked before its training, and says so.
    """
    device, kind = next(model.parameters()).device, inner(model).config.model_type
    if sharded(model):
        if ranks.is_main():
            print(f"{kind}: whether a pack's documents see one another is asked in stage 06", flush=True)
        return
    ids = torch.arange(3, 11, device=device)[None]  # any words
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)
    with inference(model):
        together = hidden_states(model, {"input_ids": ids, "position_ids": places})[0, 3:].float()
        alone = hidden_states(model, {"input_ids": ids[:, 3:]})[0].float()
    if not torch.allclose(together, alone, rtol=0, atol=tolerance * float(alone.abs().max())):
        raise ModelError(
            f"{kind}: documents of one pack see one another, whatever their position_ids; set task.pack: "
            "false, or try another attention:"
        )


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab: int,
    pad_id: int,
    eos_id: int | None,
    sample: bool = False,
) -> list[list[int]]:
    """What the model says after each prompt, up to and with eos: greedily, or drawn at temperature 1.

    Only the first `vocab` words are said. Raises DataError for an empty prompt.
    """
    if not all(map(len, prompts)):
        raise DataError("a prompt has no tokens; begin it with the tokenizer's bos token")
    causal = inner(model)
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    # padded on the left, as what follows stands on the right
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = _rows(head_of(model))
    choice: dict[str, Any] = {"do_sample": sample}
    if sample:  # the model's own distribution, whatever its generation config says
        choice |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with inference(model):
        found = causal.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            suppress_tokens=list(range(vocab, rows)) or None,
            pad_token_id=pad_id,
            eos_token_id=eos_id,
            **choice,
        )
    said = found[:, longest:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in said]


def _rows(head: Head) -> int:
    weight: Any = head.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])
