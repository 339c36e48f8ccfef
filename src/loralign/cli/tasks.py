"""`loralign tasks`: a classifier learns tasks in sequence; what every task's accuracy was after every task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralign.cli.parameters import Overrides
from loralign.cli.run import progress, say


def tasks(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A tasks file (YAML).")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
) -> None:
    """Train a classifier on tasks in sequence; accuracy on every task seen and a plain adapter after each."""
    from loralign.config.tasks_file import load_tasks, to_tasks

    settings = load_tasks(file, overrides or ())
    hidden = 2000
    if settings.train.learning_rate is None:
        from loralign.train.model import hidden_size

        hidden = hidden_size(settings.model, revision=settings.revision)
    job = to_tasks(settings, hidden)
    context.obj.output = job.output
    say(f"{job.recipe.name}: learning rate {job.training.learning_rate:.3g} ({job.training.lr_source})")
    from loralign.train.task_text import run_text

    with progress() as report:
        result = run_text(job, resume=resume, progress=report)
    for moment, row in enumerate(result.matrix, 1):
        when = f"after task {moment}" if len(result.matrix) > 1 else "all tasks"
        say(f"{when}: {' '.join(f'{100 * a:.1f}' for a in row)} %")
    for name in ("average", "anytime", "forgetting"):
        say(f"{name}: {100 * getattr(result.scores, name):.2f} %")
    said = "Verified" if result.verified else "Written"
    say(f"{said}: {', '.join(folder.name for folder in result.moments)} in {job.output}")
