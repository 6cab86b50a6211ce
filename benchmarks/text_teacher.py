"""A real teacher for sparse_cache.py: a local causal LM over texts, and a small Llama that reads the same."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkd.models.head import head_of, hidden_states

LENGTH, AT_ONCE = 128, 16  # tokens of a row; rows that the teacher reads together
Steps = Iterator[tuple[Tensor, Tensor]]  # contexts, and the teacher's logits of them (n, V)


class Lesson(NamedTuple):
    """What one seed's students have in common.

    start: the student before it learns. rate: the first learning rate. count: of `steps`, which all students
    learn; they are judged on `fresh`, whose real next words are `words` (n,), if there are.
    """

    start: nn.Module
    rate: float
    count: int
    steps: Steps
    fresh: Steps
    words: Tensor | None = None


class Read(NamedTuple):
    """Rows of tokens (R, LENGTH), and what the teacher's head reads at each (R, LENGTH, H), bf16."""

    ids: Tensor
    states: Tensor


class Reader(nn.Module):
    """A small Llama of random weights, its embedding tied to its head."""

    def __init__(self, vocab: int, hidden: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        more = {"num_attention_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": LENGTH}
        self.model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **more))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, LENGTH) -> logits of every next token, (B · (LENGTH - 1), V)"""
        states = hidden_states(self.model, {"input_ids": ids})[:, :-1].flatten(0, 1)
        return head_of(self.model).logits(states)


class TextTeacher:
    """The model in `directory`, in bf16, and its tokenizer beside it."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = directory.name
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self.head = head_of(self.model)

    @torch.no_grad()
    def read(self, data: Path, tokens: int, keep: Path | None) -> Read:
        """At most that many tokens of the texts, one after the other; what `keep` holds is not read again."""
        ids = self._rows(data, tokens)
        kept = keep / f"{self.name}-{data.stem}-{tokens}.pt" if keep else None
        if kept and kept.exists():
            found = Read(**torch.load(kept))
            if torch.equal(found.ids, ids):
                return found
        found = Read(
            ids, torch.cat([hidden_states(self.model, {"input_ids": x}) for x in ids.split(AT_ONCE)])
        )
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found._asdict(), kept)
        return found

    def _rows(self, data: Path, tokens: int) -> Tensor:
        import pyarrow.parquet as pq

        found: list[int] = []
        for text in pq.read_table(data, columns=["text"])["text"].to_pylist():
            found += [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
            if len(found) >= tokens:
                break
        return torch.tensor(found[: min(tokens, len(found)) // LENGTH * LENGTH]).view(-1, LENGTH)

    @torch.no_grad()
    def steps(self, read: Read, order: Tensor) -> Steps:
        """Row by row: its tokens (1, LENGTH), and the teacher's logits of each next one, (LENGTH - 1, V)."""
        for row in order.tolist():
            yield read.ids[row : row + 1], self.head.logits(read.states[row, :-1]).float()


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a real teacher's directory")
    parser.add_argument("--data", type=Path, help="texts that it and the students read")
    parser.add_argument("--held", type=Path, help="texts to judge on")
    parser.add_argument("--keep", type=Path, help="a directory for what the teacher has read")
    parser.add_argument("--tokens", type=int, default=102_400, help="at most, of --data")
    parser.add_argument("--held-tokens", type=int, default=8_192, help="at most, of --held")


def of_text(asked: Namespace) -> Callable[[int], Lesson]:
    """What the real teacher teaches at a seed."""
    teacher = TextTeacher(asked.model)
    read = teacher.read(asked.data, asked.tokens, asked.keep)
    held = teacher.read(asked.held, asked.held_tokens, asked.keep)
    vocab, hidden = teacher.head.size, 2 * asked.hidden
    tokens = read.ids.numel()
    print(f"{tokens} tokens, {tokens / vocab:.2f} a word of {vocab}, students of {hidden} hidden units")
    print(how_sure(teacher.steps(held, torch.arange(len(held.ids)))), flush=True)

    def lesson(seed: int) -> Lesson:
        torch.manual_seed(seed)
        start, order = Reader(vocab, hidden), torch.randperm(len(read.ids))
        fresh, words = teacher.steps(held, torch.arange(len(held.ids))), held.ids[:, 1:].flatten()
        return Lesson(start, 3e-3, len(order), teacher.steps(read, order), fresh, words)

    return lesson


def how_sure(steps: Steps) -> str:
    entropies, shares = [], []
    for _, logits in steps:
        p = logits.softmax(-1)  # (n, V)
        entropies.append(-torch.xlogy(p, p).sum(-1))
        shares.append(p.topk(64).values.sum(-1))
    entropy, share = (float(torch.cat(parts).mean()) for parts in (entropies, shares))
    return f"the teacher's entropy {entropy:.2f} nats, {share:.1%} of its mass on its 64 likeliest words"
