"""Batches of few shapes: padded to one of at most four lengths, or packed rows of one length.

What is compiled or recorded is made for one shape, and padding to the longest row of each batch gives as many shapes as
lengths. The lengths here are those by which drawn batches compute the least. Padding changes no
loss: its labels are ignored, its positions masked, and in packed rows it is a document of its own after all others.

TRL joins the packed rows of a batch to a single one, whose mask grows with the square of the batch and whose length is
another one each time; here they stay rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loralign.data.chat import IGNORED
from loralign.maths.draws import keyed_generator

MOST = 4
EIGHT = 8
"""Lengths are multiples of it, which tensor cores and masks like."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Widths:
    """Lengths of batches. padding: share of what a step computes that is none of the rows', expected. least: the same
    where every batch is padded to its own longest row."""

    lengths: tuple[int, ...]
    padding: float
    least: float

    def of(self, longest: int) -> int:
        """The length for a batch; its own where it is longer than all."""
        return next((n for n in self.lengths if n >= longest), longest)


def widths(lengths: Sequence[int], size: int, most: int, seed: int = 0) -> Widths:
    """At most four lengths for batches of `size` rows of these lengths, none above `most` or the longest row."""
    rows = torch.tensor(lengths)
    batches = -(-2000 // size)
    draw = keyed_generator(seed, "lengths of batches")
    drawn = rows[torch.randint(len(rows), (batches, size), generator=draw)]
    longest = drawn.max(1).values
    top = max(most, int(rows.max()))
    ends = [min(top, -(-int(n) // EIGHT) * EIGHT) for n in (*longest.tolist(), int(rows.max()))]
    found = _fewest(Counter(ends), MOST)
    taken = torch.tensor([next(n for n in found if n >= end) for end in longest.tolist()])
    real = float(drawn.sum())
    return Widths(found, 1 - real / float(taken.sum() * size), 1 - real / float(longest.sum() * size))


def _fewest(batches: Mapping[int, int], most: int) -> tuple[int, ...]:
    """At most so many of these lengths, the longest among them, that batches padded up to them compute the least.

    batches: how many there are of each length.
    """
    ends = sorted(batches)
    before = [0, *accumulate(batches[end] for end in ends)]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *((math.inf, ()) for _ in ends)]
    """For the first 0, 1, 2, … lengths: what they compute, and by which of them."""
    for _ in range(most):
        grown = best[:1]
        for n, end in enumerate(ends, 1):
            made = ((best[k][0] + end * (before[n] - before[k]), (*best[k][1], end)) for k in range(n))
            grown.append(min([best[n], *made]))
        best = grown
    return best[-1][1]


@dataclass(frozen=True)
class Padded:
    """TRL's collator of rows, at one of few lengths."""

    plain: DataCollatorForLanguageModeling
    widths: Widths

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, Any] = replace(self.plain, pad_to_multiple_of=self.widths.of(longest))(examples)
        return batch


@dataclass(frozen=True)
class Packed:
    """Packed rows as rows of one length; their documents know of themselves by positions that start again.

    What fills a row is a document without a loss, for which any token does: a tokenizer's pad token may be one that the
    model does not embed.
    """

    length: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        made = [self._row(example) for example in examples]
        return {key: torch.stack([row[key] for row in made]) for key in ("input_ids", "labels", "position_ids")}

    def _row(self, example: Mapping[str, Any]) -> dict[str, Tensor]:
        ids = torch.as_tensor(example["input_ids"])
        rest = max(0, self.length - len(ids))
        labels = torch.as_tensor(example.get("labels", ids))
        sizes = [*example.get("seq_lengths", [len(ids)]), rest]
        positions = torch.cat([torch.arange(n) for n in sizes])
        labels = torch.cat([labels, labels.new_full((rest,), IGNORED)])
        return {
            "input_ids": torch.cat([ids, ids.new_zeros(rest)]),
            "labels": labels.masked_fill(positions == 0, IGNORED),  # no document predicts the next one's beginning
            "position_ids": positions,
        }
