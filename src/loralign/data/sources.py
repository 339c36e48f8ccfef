"""Rows of several sources as the rows of one.

Which rows are left out, or taken once more than others, is drawn by the seed. The sources are spread evenly over the
order of the rows: the first n rows hold each at about its part of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from loralign.data.mix import Mix, Part, Source, share_faults, sources_of, taken
from loralign.data.rows import has_turns, read_trl
from loralign.data.table import Rows, joined
from loralign.maths.draws import keyed_generator
from loralign.types import LoralignError

log = logging.getLogger("loralign")

MOST_TIMES = 100
"""A row that would be taken more often is hardly meant."""


def read_source(source: str | Path | Source) -> Rows:
    """The rows of one source as conversations, prompts and completions, or text."""
    (one,) = sources_of(source)
    return read_trl(one.name, one.columns, one.split)


def read_sources(
    given: str | Path | Source | Sequence[Source], *, mix: Mix = "once", seed: int = 0
) -> tuple[Rows, tuple[Part, ...]]:
    """The rows of all sources, and how many are taken of each; what several gave is said in one line.

    Without shares all rows of all.

    Raises:
        LoralignError: what `share_faults` says, a source that cannot be read, one whose share is less than a row, one
            whose rows would be taken more than MOST_TIMES times, or text beside turns.
    """
    sources = sources_of(given)
    if wrong := share_faults(sources):
        raise LoralignError(f"`data.train` {wrong}")
    read = [read_source(source) for source in sources]
    if len(sources) == 1:
        return read[0], (Part(sources[0], len(read[0]), len(read[0])),)
    _check_one_form(read)
    counts = taken([len(rows) for rows in read], [source.share for source in sources], mix)
    parts = tuple(Part(s, len(rows), n) for s, rows, n in zip(sources, read, counts, strict=True))
    for part in parts:
        _check(part, mix)
    total = sum(counts)
    left = sum(max(0, part.rows - part.taken) for part in parts)
    mend = "; `data.mix: all` leaves none out and repeats rows instead" if left and mix == "once" else ""
    log.info("training rows: %s; %s in all%s", "; ".join(p.said(total) for p in parts), f"{total:,}", mend)
    chosen, first = [], 0
    for place, part in enumerate(parts):
        chosen.append([first + i for i in _drawn(part, seed, place)])
        first += part.rows
    return joined(read).select(_spread(chosen)), parts


def _check(part: Part, mix: Mix) -> None:
    if not part.taken:
        raise LoralignError(
            f"`data.train`: {part.source.name} has a share of {part.source.share:g}, less than a row of so small a "
            "mix: raise it, give more rows, or set `data.mix: all`, which repeats rows of the other sources"
        )
    if part.times > MOST_TIMES:
        raise LoralignError(
            f"`data.train`: each of the {part.rows:,} rows of {part.source.name} would be taken {part.times:,} times "
            f"(at most {MOST_TIMES}): lower its share, or set `data.mix: once`, which repeats no row"
        )


def _check_one_form(read: Sequence[Rows]) -> None:
    turns = [has_turns(rows[0]) for rows in read]
    if len(set(turns)) > 1:
        chat, text = read[turns.index(True)].name, read[turns.index(False)].name
        raise LoralignError(
            f"`data.train`: {chat} has rows of turns, {text} of text: give all in one form; with `columns: "
            f"{{instruction: …, output: …}}` two columns of text go through the chat template"
        )


def _drawn(part: Part, seed: int, place: int) -> list[int]:
    """Which rows of a source are taken, in order; each as often as all others, or once more."""
    often, more = divmod(part.taken, part.rows)
    draw = keyed_generator(seed, "rows of a mix", place)
    again = set(torch.randperm(part.rows, generator=draw)[:more].tolist())
    return [i for i in range(part.rows) for _ in range(often + (i in again))]


def _spread(chosen: Sequence[Sequence[int]]) -> list[int]:
    """All of these, each list in its order and spread evenly over the whole."""
    where = [((n + 0.5) / len(part), k, i) for k, part in enumerate(chosen) for n, i in enumerate(part)]
    return [i for _, _, i in sorted(where)]
