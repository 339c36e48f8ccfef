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
    studies = "studies"


def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; default: stdout.")] = None,
    of: Annotated[Files, typer.Option(help="recipes, or the files of `loralign tasks` or `compare`.")] = Files.recipes,
    as_text: Annotated[bool, typer.Option("--text", help="The keys to read, not as JSON for editors.")] = False,
) -> None:
    """Every key of recipe, tasks or study files: as a JSON schema for editors, or as text."""
    from loralign.config import recipe, study_file, tasks_file

    if as_text:
        from loralign.config.keys import keys_text

        files = (recipe.RunFile, tasks_file.TasksFile, study_file.StudyFile)
        text = keys_text(files[list(Files).index(of)]) + "\n"
    else:
        text = {Files.recipes: recipe, Files.tasks: tasks_file, Files.studies: study_file}[of].schema_text()
    if out is None:
        say(text.rstrip())
    else:
        replace_text(out, text)
