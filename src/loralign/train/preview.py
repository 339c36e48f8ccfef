"""What a run would read and learn: the rows of a job as `train` has them, before packing; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from loralign.data.answers import common
from loralign.data.chat import Fit, learnt
from loralign.train.job import Job
from loralign.train.model import load_tokenizer
from loralign.train.tokens import measured, place, tokens
from loralign.train.validation import apart

Part = tuple[str, bool]
"""A piece of text, and whether it is learnt."""


@dataclass(frozen=True)
class ShownRow:
    """A row of training.

    source, number: where it stands. learnt: how many of its tokens have loss. cut: it was longer than
    `data.max_length`. end_learnt: what is learnt last ends with a token that ends answers. parts: the text of all
    tokens; learnt and not learnt alternate.
    """

    source: str
    number: int
    tokens: int
    learnt: int
    cut: bool
    end_learnt: bool
    parts: list[Part]
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class FromSource:
    """What is trained of a source."""

    source: str
    read: int
    taken: int
    rows: int


@dataclass(frozen=True)
class Preview:
    """The first rows, and all of them in numbers.

    rows, tokens, learnt, longest: of what is trained, after cutting, dropping and splitting. read: rows that came in.
    set_apart: of the rows, those that the method's rule decides by instead. cut, dropped, split: as `Fit` has them.
    sources: of each in turn, its rows, those taken into the mix, and those of `rows` that are from it.
    """

    first: list[ShownRow]
    read: int
    rows: int
    tokens: int
    learnt: int
    cut: int
    dropped: int
    split: int
    longest: int
    set_apart: int
    max_length: int
    packing: bool
    sources: list[FromSource]


def preview(job: Job, count: int) -> Preview:
    """The first `count` training rows of a job, and all of them in numbers.

    Raises:
        LoralignError: what `train` would raise for these rows, this tokenizer and this config of a model.
    """
    job, model = measured(job)
    tokenizer = load_tokenizer(job.model, **place(job))
    made = tokens(job, tokenizer, model)
    fitted = made.train
    _, deciding = apart(fitted.dataset, job.recipe)
    assert job.data.max_length is not None
    return Preview(
        first=shown(fitted, tokenizer, count),
        read=fitted.rows,
        rows=len(fitted.dataset),
        tokens=fitted.tokens,
        learnt=fitted.supervised,
        cut=fitted.cut,
        dropped=fitted.dropped,
        split=fitted.split,
        longest=pc.max(pc.list_value_length(fitted.dataset.data.column("input_ids"))).as_py(),
        set_apart=0 if deciding is None else len(deciding),
        max_length=job.data.max_length,
        packing=job.data.packing,
        sources=[
            FromSource(part.source.name, part.rows, part.taken, trained)
            for part, trained in zip(made.parts, fitted.places.counts(), strict=True)
        ],
    )


def shown(fitted: Fit, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownRow]:
    """The first rows of the dataset."""
    cut, ends = set(fitted.shortened[:count]), set(tokenizer.convert_tokens_to_ids(list(fitted.prompts.ends)))
    found = []
    for number, row in enumerate(fitted.dataset.select(range(min(count, len(fitted.dataset))))):
        ids, labels = row["input_ids"], row["labels"]
        places = learnt(labels)
        end = _is_ended([ids[i] for i in places], ends, tokenizer)
        parts = _parts(ids, set(places), tokenizer)
        found.append(ShownRow(*fitted.places[number], len(ids), len(places), number in cut, end, parts, ids, labels))
    return found


def _is_ended(ids: Sequence[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing but white space and special tokens follows the last end token."""
    last = max((i for i, token in enumerate(ids) if token in ends), default=None)
    return last is not None and not tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).strip()


def _parts(ids: Sequence[int], places: set[int], tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """A character of several tokens belongs to the part in which it ends."""
    options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **options)
    turns = [i for i in range(1, len(ids)) if (i in places) != (i - 1 in places)]
    stops = [0, *(common(tokenizer.decode(ids[:i], **options), text) for i in turns), len(text)]
    return [(text[a:b], i in places) for (a, b), i in zip(pairwise(stops), [0, *turns], strict=True)]
