"""Bad inputs by the hundred, seeded: every command must refuse them in one short sentence and never hang.

    python scripts/fuzz.py [--seed 0] [--only KIND] [--number N] [--share 0.1] [--summary FILE]

Each input knows whether it is bad. A failure is: an exit code other than 0, 1, 2, 3 or 130; 0 for a bad input; another
than 0 for a good one; "please report it"; a traceback; a sentence of 300 characters or more; no answer (60 s of work).
Most inputs run in this process, two of every kind as `python -m loralign`. The table counts inputs and failures by
kind; a failed one is run again by its kind, seed and number. Exit code 1 where any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fuzz_artefacts import ARTEFACTS
from fuzz_inputs import INPUTS
from fuzz_rows import ROWS
from fuzz_studies import STUDIES
from fuzz_world import CASE, Input, Kind, build
from loralign.cli.app import main as command

SECONDS = 60
"""Of processor time; the clock may show ten times as many on a machine that has other work."""
MEMORY = 24 << 30
CODES = {0, 1, 2, 3, 130}
PROCESSES = 2
"""Inputs of every kind that are run as a process of their own."""


class HangError(BaseException):
    """An input got no answer in time."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise HangError


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Within: HangError after some time, and the end of this process where even that is not heard."""
    before = {number: signal.signal(number, _ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(10 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before.items():
            signal.signal(number, handler)


def here(words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a call in this process."""
    error = io.StringIO()
    with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = command(words)
    return code, error.getvalue()


def apart(words: list[str]) -> tuple[int, str]:
    """The same as a process, as people run it."""
    try:
        called = [sys.executable, "-m", "loralign", *words]
        done = subprocess.run(called, capture_output=True, timeout=10 * SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise HangError from None
    return done.returncode, done.stderr.decode(errors="replace")


def judged(one: Input, code: int, error: str) -> str:
    """What is wrong with the answer, or ""."""
    said = [line for line in error.splitlines() if line.startswith("loralign: ")]
    if code not in CODES:
        return f"exit code {code}"
    if "Traceback" in error:
        return "a traceback"
    if "please report" in error:
        return "reported as our own fault"
    if code and len(said) != 1:
        return f"{len(said)} sentences"
    if said and len(said[-1].removeprefix("loralign: ")) >= 300:
        return f"a sentence of {len(said[-1])} characters"
    if one.bad and code == 0:
        return "accepted silently"
    if one.bad is False and code:
        return f"a good input refused ({code})"
    return ""


def run(kind: Kind, seed: int, number: int, *, process: bool) -> tuple[str, str, list[str]]:
    """One input of a kind: what failed or "", what was said, and the words of the call."""
    shutil.rmtree(CASE, ignore_errors=True)
    CASE.mkdir()
    one = kind.make(random.Random(f"{kind.name} {seed} {number}"), number)
    try:
        code, error = (apart if process else here)(one.words)
    except HangError:
        return f"no answer in {SECONDS} s", "", one.words
    except BaseException as left:  # what must never reach the caller of `main`
        return f"raised {type(left).__name__}", str(left), one.words
    last = (error.strip().splitlines() or [""])[-1]
    return judged(one, code, error), f"{code}: {last}", one.words


def table(kinds: list[Kind], seen: Counter[str], failed: Counter[str], seconds: dict[str, float]) -> str:
    lines = ["| kind | inputs | failures | seconds |", "|---|---:|---:|---:|"]
    rows = [(k.name, seen[k.name], failed[k.name], seconds[k.name]) for k in kinds if seen[k.name]]
    rows.append(("all", seen.total(), failed.total(), sum(seconds.values())))
    return "\n".join([*lines, *(f"| {name} | {n} | {bad} | {took:.0f} |" for name, n, bad, took in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="inputs of one kind; may be repeated")
    parser.add_argument("--number", type=int, help="one input of that kind")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of every kind")
    parser.add_argument("--summary", type=Path, help="file for the table")
    args = parser.parse_args()
    summary = args.summary.resolve() if args.summary else None
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    kinds = [k for k in (*INPUTS, *ROWS, *ARTEFACTS, *STUDIES) if not args.only or k.name in args.only]
    if not kinds:
        parser.error(f"no such kind; there are {', '.join(k.name for k in (*INPUTS, *ROWS, *ARTEFACTS, *STUDIES))}")
    seen: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory(prefix="loralign-fuzz-") as folder:
        os.chdir(folder)
        build(Path(folder))
        for kind in kinds:
            numbers = [args.number] if args.number is not None else range(max(1, int(kind.count * args.share)))
            alone = set(numbers[:: max(1, len(numbers) // PROCESSES)]) if len(numbers) > PROCESSES else set()
            for number in numbers:
                began = time.perf_counter()
                wrong, said, words = run(kind, args.seed, number, process=number in alone)
                seconds[kind.name] += time.perf_counter() - began
                seen[kind.name] += 1
                failed[kind.name] += bool(wrong)
                if wrong or args.number is not None:
                    print(
                        f"{kind.name} {number}: {wrong or 'fine'} | {' '.join(map(ascii, words))[:300]} | {said[:400]}"
                    )
                    sys.stdout.flush()
        os.chdir("/")
    found = table(kinds, seen, failed, seconds)
    print(found)
    if summary:
        summary.write_text(f"seed {args.seed}\n\n{found}\n", encoding="utf-8")
    return int(failed.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
