"""What every command shares: progress to bars or lines, files to jobs, folders to models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loralign.cli.guard import FIRST

if TYPE_CHECKING:
    from loralign.config.recipe import RunFile
    from loralign.train.job import Job

Progress = Callable[[str, int, int], None]


def say(text: str) -> None:
    """One line of output."""
    if FIRST:
        typer.echo(text)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if not path.parent.is_dir():
        from loralign.types import LoralignError

        raise LoralignError(f"no such folder: {path.parent}; make it first")
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
        return
    from loralign.io.provenance import write_text

    write_text(path, text)


# ------------------------------------------------------------------------------------------------------------- progress


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback (what, done, total): bars on a terminal, else a line per tenth of the way."""
    if not FIRST or not sys.stderr.isatty():
        yield Lines() if FIRST else (lambda what, done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield update


class Lines:
    """Progress as plain lines on stderr: at the tenths of the way, at most every few seconds, and at the end."""

    least_s, every_s = 3.0, 60.0

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, float]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth, now = 10 * done // max(1, total), time.monotonic()
        last, when = self._said.get(what, (0, now))
        if done >= total or (tenth > last and now - when > self.least_s) or now - when > self.every_s:
            typer.echo(f"{what}: {done}/{total}", err=True)
            last, when = tenth, now
        self._said[what] = (last, when)


# ------------------------------------------------------------------------------------------------------- files, folders


def file_of(path: Path, overrides: Sequence[str] | None, **where: Any) -> tuple[RunFile, str]:
    """A recipe file, and who chose its method where it left that open. where: what `recommended.resolved` takes."""
    from loralign.cli import recommended
    from loralign.config.recipe import parse, read

    content = read(path, overrides or ())
    if recommended.asks(content):
        return recommended.resolved(content, path.name, **where)
    return parse(content, path.name), ""


def job_of(path: Path, overrides: Sequence[str] | None, *, resume: bool = False) -> Job:
    """The run of a recipe file, one line about its learning rate, and one about its method where that was chosen."""
    from loralign.config.recipe import to_job

    file, chosen = file_of(path, overrides, resume=resume)
    hidden = 2000
    if file.train.learning_rate is None:
        from loralign.train.model import hidden_size

        hidden = hidden_size(file.model, revision=file.revision, trust_remote_code=file.trust_remote_code)
    job = to_job(file, hidden)
    if chosen:
        job = replace(job, chosen_by=chosen, once=True)
        say(chosen)
    say(f"{job.recipe.name}: learning rate {job.training.learning_rate:.3g} ({job.training.lr_source})")
    return job


def opened(folder: Path, base: str | None, quantize: str | None, out: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Adapted model, tokenizer, and the base's name and revision as the folder has them; `out` must be another one, and
    writable."""
    from loralign.io.folder import check_place
    from loralign.train.use import open_adapter
    from loralign.types import LoralignError

    if out.is_dir() and folder.is_dir() and out.samefile(folder):
        raise LoralignError(f"{out} is the adapter that is exported: name another folder")
    check_place(out)
    model, tokenizer = open_adapter(folder, base, quantize)
    config = model.peft_config["default"]
    return model, tokenizer, {"base_id": config.base_model_name_or_path, "revision": config.revision}
