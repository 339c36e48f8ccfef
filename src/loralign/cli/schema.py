"""`loralign schema`: the JSON schemas of the files that editors help with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loralign.cli.run import replace_text, say


class Files(StrEnum):
    recipes = "recipes"
    tasks = "tasks"


def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; default: stdout.")] = None,
    of: Annotated[Files, typer.Option(help="recipes, or the files of `loralign tasks`.")] = Files.recipes,
) -> None:
    """The JSON schema of recipe files, for editors."""
    from loralign.config import recipe, tasks_file

    text = (tasks_file if of is Files.tasks else recipe).schema_text()
    if out is None:
        say(text.rstrip())
    else:
        replace_text(out, text)
