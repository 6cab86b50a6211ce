"""What of a token's next-token distribution is kept, and how it lies in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmkd.errors import ConfigError

BITS = (8, 16, 32)  # of a probability: a code of its logarithm, or float32 as it is


@dataclass(frozen=True)
class Layout:
    """How a token's distribution lies in bytes. how: "topk", k words of a vocabulary of `vocab`, or
    "sampled", at least k; bits of a probability: 8, 16 or 32; taken at `temperature`.

    Raises ConfigError where k is beyond the vocabulary, or a value is none of these.
    """

    how: str
    k: int
    vocab: int
    bits: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.how not in ("topk", "sampled"):
            raise ConfigError(f"cache: how = {self.how!r}; known are topk and sampled")
        if not 1 <= self.k <= self.vocab:
            raise ConfigError(f"cache: k = {self.k} of a vocabulary of {self.vocab}; take k from 1 to that")
        if self.bits not in BITS:
            raise ConfigError(f"cache: bits = {self.bits}; known are 8, 16 and 32")

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab - 1).bit_length())

    @property
    def tail_bits(self) -> int:
        return max(16, self.bits) if self.how == "topk" else 0

    @property
    def token_bytes(self) -> int:
        """62 for topk with k = 19, 63 for sampled with k = 21, at 128,256 words and 8 bits."""
        most = self._sampled_bits(self.k, self.k - 1)
        bits = self.tail_bits + self.k * (self.id_bits + self.bits) if self.how == "topk" else most
        return -(-bits // 8)

    @property
    def kept_bits(self) -> int:
        """Of the number of words that a sample keeps as they are, 0 to k - 1."""
        return (self.k - 1).bit_length()

    @cached_property
    def words(self) -> list[int]:
        """By the number that is kept: as many words of a sample as fit; 32 down to 21 at 128,256 words.

        Where all but one are kept that one stands for the whole rest, so that none is ever drawn twice.
        """
        found = []
        for kept in range(self.k - 1):
            count = self.k
            while count < self.vocab and self._sampled_bits(count + 1, kept) <= 8 * self.token_bytes:
                count += 1
            found.append(count)
        return [*found, self.k]

    def _sampled_bits(self, count: int, kept: int) -> int:
        """Number kept, the drawn words' weight, ids, whether each was kept, the kept ones' weights."""
        return self.kept_bits + self.bits + sum(self.id_parts(count)) + count + kept * self.bits

    def id_parts(self, count: int) -> tuple[int, int]:
        """Bits of `count` sorted ids: their lower parts', and the marks of their upper ones."""
        low = max(0, (self.vocab // count).bit_length() - 1)
        return count * low, count + ((self.vocab - 1) >> low) + 1
