"""What every command is run within: errors to exit codes and one sentence, signals to an orderly stop, other libraries
kept quiet."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import typer

from loralign.cli.stop import Signals

FIRST = os.environ.get("RANK", "0") == "0"
"""Under `accelerate launch` or torchrun the first process speaks for all; errors come from each."""
LONGEST = 290
"""Characters of a sentence about an error."""

# ----------------------------------------------------------------------------------------------------------- exit codes


def guarded(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run the application; an exception becomes one sentence on stderr and an exit code."""
    debug, words = "--debug" in argv, [word for word in argv if word != "--debug"]
    stop = Signals()
    try:
        with stop.handled():
            code, text = _outcome(app, words, debug, stop)
            if text:
                _tell(f"loralign: {clipped(text)}")
            if sys.stdout is not None:  # closed by whoever started us
                sys.stdout.flush()
    except KeyboardInterrupt:  # a second one, while the first was answered
        return stop.code
    except BrokenPipeError:  # the reader of our output has seen enough, as in `loralign methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # stdout is closed, or a disk that is full
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _tell(f"loralign: cannot write to standard output: {error.strerror or error}")
        return 1
    return code


def _tell(text: str) -> None:
    """The last line, where there is still a terminal to read it."""
    with suppress(OSError):
        typer.echo(text, err=True)


def _outcome(app: typer.Typer, words: list[str], debug: bool, stop: Signals) -> tuple[int, str]:
    """Exit code of a call, and what is to be said of it."""
    try:
        check_words(words)
        with _quiet(debug):
            done = app(args=words or ["--help"], prog_name="loralign", standalone_mode=False, obj=stop)
    except (KeyboardInterrupt, typer.Abort):
        return stop.code, stop.answer(words)
    except BrokenPipeError:
        raise
    except SystemExit as left:
        return (left.code if isinstance(left.code, int) else int(left.code is not None)), ""
    except Exception as error:
        if stop.received:
            return stop.code, stop.answer(words)
        if debug:
            traceback.print_exc()
        return explained(error)
    if done == 130:  # typer's own answer to Ctrl-C
        return stop.code, stop.answer(words)
    return (done if isinstance(done, int) else 0), ""


def check_words(words: Sequence[str]) -> None:
    """Refuse words that no file and no program can read as text."""
    for word in words:
        if not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word):
            raise typer.BadParameter(f"{word!a} is not UTF-8 text: rename the file, or give another text")


BAD_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
BAD_PATH_NUMBERS = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO)
OUT_OF_MEMORY = re.compile(r"(?i)out of memory|can't allocate memory|not enough memory|unable to allocate")


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and sentence of an exception."""
    usage: Any = getattr(error, "format_message", None)  # a mistake on the command line, found by typer
    if usage is not None:
        ctx: Any = getattr(error, "ctx", None)
        page = getattr(ctx, "command_path", "loralign")
        setting = type(error).__name__ in ("NoSuchOption", "UsageError") and _takes_set(ctx)
        hint = "; a setting of the file is given as --set key=value" if setting else ""
        return (
            2,
            f"{clipped(usage().replace('Value error, ', '').rstrip('.'), 240 - len(hint))}{hint} (see {page} --help)",
        )
    from loralign.io.folder import disk_full
    from loralign.types import LoralignError, VerificationFailed, WorkFailed

    said = " ".join(str(error).split())
    if isinstance(error, LoralignError):
        return (3 if isinstance(error, VerificationFailed) else 1 if isinstance(error, WorkFailed) else 2), said
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or OUT_OF_MEMORY.search(said):
        return (
            1,
            "out of memory: lower `rank` or `train.micro_batch_size`, or set `train.gradient_checkpointing`; "
            "`loralign plan` tells what is needed",
        )
    if reason := disk_full(error):
        return 1, f"writing failed ({reason}): free some space, then try again"
    if isinstance(error, OSError) and error.filename:
        if isinstance(error, BAD_PATH) or error.errno in BAD_PATH_NUMBERS:
            return 2, f"{_named(error.filename)}: {(error.strerror or 'not usable').lower()}; name another path"
        return 1, f"{_named(error.filename)}: {error.strerror}"
    if isinstance(error, RuntimeError) and "home directory" in said:
        return 2, "a path begins with ~ and a user without a home: write the folder out"
    if isinstance(error, UnicodeEncodeError) and "utf" not in error.encoding.lower():
        wrong = ascii(error.object[error.start : error.start + 1])
        return 2, f"this locale ({error.encoding}) has no {wrong}, which a path or a text holds: set PYTHONUTF8=1"
    fault = clipped(f"{type(error).__name__}: {said or 'no message'}", 200)
    return 1, f"unexpected {fault}; --debug shows where, please report it"


def _takes_set(ctx: Any) -> bool:
    """Whether a command takes settings of a file."""
    return any("--set" in p.opts for p in getattr(getattr(ctx, "command", None), "params", ()))


def _named(path: object) -> str:
    return clipped(os.fsdecode(path) if isinstance(path, bytes) else str(path), 120)


def clipped(text: str, longest: int = LONGEST) -> str:
    """At most so many characters: long words lose their middle, then the sentence does; its end holds the mend."""
    if len(text) <= longest:
        return text
    text = re.sub(r"\S{60,}", lambda word: f"{word[0][:40]}…{word[0][-12:]}", text)
    head = longest * 3 // 5
    return text if len(text) <= longest else f"{text[:head].rstrip()} … {text[head + 3 - longest :].lstrip()}"


# --------------------------------------------------------------------------------------------------------------- quiet


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Our log on stderr; what other libraries warn of only with --debug, their bars only on a terminal."""
    handler, log = _Stderr(), logging.getLogger("loralign")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO if FIRST else logging.WARNING)
    with warnings.catch_warnings(), ExitStack() as stack:
        if not debug:
            warnings.simplefilter("ignore")
            stack.enter_context(_hushed(bars=bool(sys.stderr and sys.stderr.isatty())))
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)


@contextmanager
def _hushed(*, bars: bool) -> Iterator[None]:
    """Other libraries say errors only; transformers and datasets draw no bars where none are wanted.

    Libraries that are not loaded yet, and most commands load few, read it from the environment. Most log by the handler
    of last resort; transformers and torch have their own.
    """
    wanted = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_LOGS": os.environ.get("TORCH_LOGS") or "-all"}
    if not bars:
        wanted |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with _hushed_transformers(bars), _hushed_datasets(bars), _hushed_others():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _hushed_transformers(bars: bool) -> Iterator[None]:
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging as transformers

    level, drawn = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    if not bars:
        transformers.disable_progress_bar()
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        if drawn and not bars:
            transformers.enable_progress_bar()


@contextmanager
def _hushed_datasets(bars: bool) -> Iterator[None]:
    if "datasets" not in sys.modules:
        yield
        return
    import datasets

    drawn = datasets.are_progress_bars_disabled() is False
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn and not bars:
            datasets.enable_progress_bars()


@contextmanager
def _hushed_others() -> Iterator[None]:
    last = logging.lastResort
    if last is None:
        yield
        return
    level = last.level
    last.setLevel(logging.ERROR)
    try:
        yield
    finally:
        last.setLevel(level)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """By sys.stderr itself, which a bar replaces while it is drawn: lines then go above it."""
        if sys.stderr is not None:
            print(record.getMessage(), file=sys.stderr, flush=True)
