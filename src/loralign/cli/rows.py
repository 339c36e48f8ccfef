"""`loralign rows`: the rows of a recipe as they will be trained, with what is learnt marked."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from loralign.cli.parameters import AsJson, Overrides, Recipe
from loralign.cli.run import file_of, say

if TYPE_CHECKING:
    from loralign.train.preview import Preview, ShownRow

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and line feed: a terminal obeys them instead of showing them."""


def rows(
    recipe: Recipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=0, help="Rows to show; the numbers are of all.")] = 3,
    as_json: AsJson = False,
) -> None:
    """The first rows as the model will read them, what it learns between ⟦ and ⟧, and all rows in numbers.

    Rows, tokenizer and chat template are read as `train` reads them; no weights are loaded, nothing is written.
    """
    file, _ = file_of(recipe, overrides)
    from loralign.config.recipe import to_job
    from loralign.train.preview import preview

    found = preview(to_job(file, hidden_size=2000), count)  # the width is for the learning rate, which is not asked for
    if as_json:
        say(json.dumps(asdict(found), ensure_ascii=False))
        return
    for number, row in enumerate(found.first, 1):
        say(f"training row {number} ({row.source}, row {row.number}): {_told(row)}\n{_marked(row)}\n")
    say(_summary(found))


def _told(row: ShownRow) -> str:
    end = "the end token is learnt" if row.end_learnt else "no end token is learnt"
    return f"{row.tokens} tokens{' (cut)' if row.cut else ''}, {row.learnt} learnt, {end}"


def _marked(row: ShownRow) -> str:
    """The text; where it reaches a terminal, what is learnt is bold, and green unless NO_COLOR is set."""
    green = None if os.environ.get("NO_COLOR") else "green"
    parts = [(UNSEEN.sub(lambda c: f"\\x{ord(c[0]):02x}", text), learnt) for text, learnt in row.parts]
    return "".join(typer.style(f"⟦{text}⟧", fg=green, bold=True) if learnt else text for text, learnt in parts)


def _summary(found: Preview) -> str:
    came = "" if found.read == found.rows else f" of {found.read:,} that were read"
    said = (
        f"all: {found.rows:,} rows{came}, {found.tokens:,} tokens, {found.learnt:,} learnt "
        f"({100 * found.learnt / found.tokens:.1f} %); longest {found.longest:,} tokens; "
        f"{found.cut:,} rows cut at {found.max_length:,} tokens, {found.dropped:,} dropped"
    )
    if found.split:
        said += f"; {found.split:,} split into one for each answer"
    if len(found.sources) > 1:
        said += "; " + ", ".join(f"{part.rows:,} of {part.source}" for part in found.sources)
    if found.set_apart:
        said += f"; {found.set_apart:,} kept apart for the method to decide by"
    return said + ("; packed in training" if found.packing else "")
