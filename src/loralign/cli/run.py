"""What every command shares: errors to exit codes, progress to bars or lines, files to jobs, folders to models."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from loralign.train.job import Job

Progress = Callable[[str, int, int], None]


FIRST = os.environ.get("RANK", "0") == "0"
"""Under `accelerate launch` or torchrun the first process speaks for all; errors come from each."""


def say(text: str) -> None:
    """One line of output."""
    if FIRST:
        typer.echo(text)


# ----------------------------------------------------------------------------------------------------------- exit codes


STOPPED = 130


def guarded(app: typer.Typer, argv: list[str]) -> int:
    """Run the application; an exception becomes one sentence on stderr and an exit code."""
    debug, words = "--debug" in argv, [word for word in argv if word != "--debug"]
    try:
        with _quiet(debug):
            done = app(args=words or ["--help"], prog_name="loralign", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        done = STOPPED
    except BrokenPipeError:  # the reader of our output has seen enough, as in `loralign methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except Exception as error:
        code, text = explained(error)
        if debug:
            traceback.print_exc()
        typer.echo(f"loralign: {text}", err=True)
        return code
    if done == STOPPED:  # typer's own answer to Ctrl-C, too
        typer.echo("loralign: stopped", err=True)
    return done if isinstance(done, int) else 0


BAD_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and sentence of an exception."""
    usage: Any = getattr(error, "format_message", None)  # a mistake on the command line, found by typer
    if usage is not None:
        page = getattr(getattr(error, "ctx", None), "command_path", "loralign")
        return 2, f"{usage().replace('Value error, ', '').rstrip('.')} (see {page} --help)"
    from loralign.io.folder import disk_full
    from loralign.types import LoralignError, VerificationFailed, WorkFailed

    said = " ".join(str(error).split())
    if isinstance(error, LoralignError):
        return (3 if isinstance(error, VerificationFailed) else 1 if isinstance(error, WorkFailed) else 2), said
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            1,
            "out of memory: lower train.micro_batch_size or set train.gradient_checkpointing; `loralign plan` tells",
        )
    if reason := disk_full(error):
        return 1, f"writing failed ({reason}): free some space, then try again"
    read_only = getattr(error, "errno", None) == errno.EROFS
    if isinstance(error, OSError) and (read_only or isinstance(error, BAD_PATH)) and error.filename:
        return 2, f"{error.filename}: {(error.strerror or 'not usable').lower()}; name another path"
    if isinstance(error, OSError) and error.filename:
        return 1, f"{error.filename}: {error.strerror}"
    return 1, f"unexpected {type(error).__name__}: {said or 'no message'}; --debug shows where, please report it"


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Our log on stderr; warnings of other libraries only with --debug, their bars only on a terminal."""
    handler, log = _Stderr(), logging.getLogger("loralign")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO if FIRST else logging.WARNING)
    with warnings.catch_warnings(), ExitStack() as stack:
        if not debug:
            warnings.simplefilter("ignore")
            stack.enter_context(_hushed(bars=sys.stderr.isatty()))
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)


@contextmanager
def _hushed(*, bars: bool) -> Iterator[None]:
    """Transformers says errors only, and draws no bars where none are wanted; datasets neither."""
    import datasets
    from transformers.utils import logging as transformers

    level, drawn = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    if not bars:
        transformers.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        if drawn and not bars:
            transformers.enable_progress_bar()
            datasets.enable_progress_bars()


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage(), err=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if not path.parent.is_dir():
        from loralign.types import LoralignError

        raise LoralignError(f"no such folder: {path.parent}; make it first")
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def job_of(path: Path, overrides: Sequence[str] | None) -> Job:
    """The run of a recipe file, and one line about its learning rate."""
    from loralign.config.recipe import load, to_job
    from loralign.train.model import hidden_size

    file = load(path, overrides or ())
    hidden = 2000
    if file.train.learning_rate is None:
        hidden = hidden_size(file.model, revision=file.revision, trust_remote_code=file.trust_remote_code)
    job = to_job(file, hidden)
    say(f"{job.recipe.name}: learning rate {job.training.learning_rate:.3g} ({job.training.lr_source})")
    return job


def opened(folder: Path, base: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Adapted model, tokenizer, and the base's name and revision as the folder has them."""
    from loralign.train.use import open_adapter

    model, tokenizer = open_adapter(folder, base)
    config = model.peft_config["default"]
    return model, tokenizer, {"base_id": config.base_model_name_or_path, "revision": config.revision}
