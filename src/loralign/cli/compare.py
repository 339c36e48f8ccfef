"""`loralign compare`: run a study with one or several workers, then say what came out."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from loralign.types import LoralignError, WorkFailed

if TYPE_CHECKING:
    from loralign.compare.spec import Outcome, Spec, Trial

log = logging.getLogger("loralign")

PARENT, SESSION = "LORALIGN_PARENT", "LORALIGN_SESSION"
"""In the environment of a worker: the process that started it, and the run of the command that it is part of."""


def specs_of(study: Path, overrides: Sequence[str], *, reading: bool = False) -> tuple[Spec, ...]:
    from loralign.config.study_file import read_study

    read_study(study, overrides)  # what is wrong with the file is said before the libraries load
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise LoralignError(f'compare needs {error.name}: pip install "loralign[compare]"') from error
    from loralign.config.study import load_study

    return load_study(study, overrides, reading=reading)


def say(text: str) -> None:
    print(text, flush=True)


def run(study: Path, overrides: Sequence[str], *, workers: int, worker: bool, only_report: bool) -> None:
    """The command: work, then say what came out. WorkFailed names arms that are left out."""
    if worker and PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    specs = specs_of(study, overrides, reading=only_report)
    if worker:
        work_as_one_of_many(specs)
        return
    if not only_report and workers > 1:
        run_workers(study, overrides, workers, specs)
    elif not only_report:
        run_alone(specs)
    say_results(specs)
    if not only_report:
        check_failed(failed_arms(specs))


def run_alone(specs: Sequence[Spec]) -> None:
    """This process is the only worker here, and shows what is done, task by task."""
    from loralign.compare.live import watched

    started, session = time.monotonic(), uuid4().hex
    for spec in specs:
        with watched(spec, say, session=session):
            work_here(spec, started, session)


def work_as_one_of_many(specs: Sequence[Spec]) -> None:
    """This process works and says what it finished itself."""
    from loralign.compare.live import line

    started, session = time.monotonic(), os.environ.get(SESSION) or uuid4().hex

    def tell(trial: Trial, outcome: Outcome, number: int, total: int) -> None:
        say(line(trial, outcome, number, total))

    for spec in specs:
        work_here(spec, started, session, tell)
    if SESSION not in os.environ:
        check_failed(failed_arms(specs, session))


def _end_with(parent: int) -> None:
    """Stop this worker when the process that started it is gone, however it ended: first in order, then for good."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30.0)
    os.kill(os.getpid(), signal.SIGKILL)


def failed_arms(specs: Sequence[Spec], session: str | None = None) -> dict[str, str]:
    """Arms that are left out, of every task, and why. session: of one run of the command alone."""
    from loralign.compare.failures import standing
    from loralign.compare.store import Store

    found: dict[str, str] = {}
    for spec in specs:
        store = Store(spec)
        _, out = standing(spec, store.outcomes(), store.failures(), session)
        found |= {(f"{spec.task_name}: {arm}" if spec.task_name else arm): f.said for arm, f in out.items()}
    return found


def check_failed(failed: Mapping[str, str]) -> None:
    """Raise WorkFailed that names the arms that are left out, the first with its sentence."""
    if failed:
        first, many = next(iter(failed.values())), len(failed) > 1
        named = f"{len(failed)} arms ({', '.join(failed)}) failed and are" if many else "1 arm failed and is"
        raise WorkFailed(f"{named} left out, the same command tries again: {first}")


def work_here(spec: Spec, started: float, session: str, on_done: object = None) -> bool:
    """Work until nothing is left or the budget is spent; True when the study is complete."""
    from loralign.compare.residents import Residents
    from loralign.compare.schedule import wanted
    from loralign.compare.store import Store
    from loralign.compare.study import work

    done = Store(spec).outcomes()
    if all(t.key in done for t in wanted(spec, done)):
        return True
    with _said_once():
        return work(spec, Residents(spec).run, on_done=on_done, started=started, session=session)  # type: ignore[arg-type]


@contextmanager
def _said_once() -> Iterator[None]:
    """Within: what every trial says of itself is for --debug alone, and what it warns of is said once."""
    if log.getEffectiveLevel() != logging.INFO:
        yield
        return
    level, once = log.level, _Once()
    log.setLevel(logging.WARNING)
    log.addFilter(once)
    try:
        yield
    finally:
        log.removeFilter(once)
        log.setLevel(level)


class _Once(logging.Filter):
    """What every trial would warn of again is said by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        known, self.said = record.getMessage() in self.said, self.said | {record.getMessage()}
        return not known


def run_workers(study: Path, overrides: Sequence[str], count: int, specs: Sequence[Spec]) -> None:
    """`count` processes on this machine; GPUs are dealt out round robin. A worker that fails fails the command, unless
    the others came to the study's end.

    What a worker says goes to `worker-N.log` in the (first task's) folder; here the whole study is shown.
    """
    import torch

    from loralign.compare.live import watched
    from loralign.compare.study import is_complete, warn_of_idle_arms

    warn_of_idle_arms(specs[0])
    gpus, session = torch.cuda.device_count(), uuid4().hex
    command = [sys.executable, "-P", "-m", "loralign", "compare", str(study), "--worker"]  # -P: no modules from here
    command += [part for text in overrides for part in ("--set", text)]
    with ExitStack() as stack:
        for spec in specs:
            stack.enter_context(watched(spec, say, session=session))
        logs: list[IO[str]] = []
        workers: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, workers)
        for i in range(count):
            given = {PARENT: str(os.getpid()), SESSION: session}
            given |= {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus > 1 else {}
            logs.append(stack.enter_context((specs[0].output / f"worker-{i + 1}.log").open("w+", encoding="utf-8")))
            workers.append(
                subprocess.Popen(command, env={**os.environ, **given}, stdout=logs[-1], stderr=subprocess.STDOUT)
            )
        codes = [w.wait() for w in workers]
        failed = [(code, _last_words(code, said)) for code, said in zip(codes, logs, strict=True) if code]
    if failed:
        code, said = failed[0]
        told = f"{len(failed)} of {count} workers failed, what they finished is kept; the first {said}"
        if not all(is_complete(spec, session) for spec in specs):
            raise (LoralignError if code == 2 else WorkFailed)(told)
        log.warning("%s; the others came to the end", told)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask them to stop, then make them: after ten seconds, or at once where this process is told to stop again."""
    left = [worker for worker in workers if worker.poll() is None]
    try:
        for worker in left:
            worker.terminate()
        until = time.monotonic() + 10
        for worker in left:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, until - time.monotonic()))
    finally:
        for worker in left:
            worker.kill()


def _last_words(code: int, said: IO[str]) -> str:
    """How a worker ended that failed: by which signal, else its last line."""
    if code < 0:
        memory = ", as by a system that is out of memory: take fewer `--workers`" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{memory}"
    said.seek(0)
    lines = [text for text in said.read().splitlines() if text.strip()]
    return f"said: {lines[-1].removeprefix('loralign: ') if lines else 'nothing'}"


def say_results(specs: Sequence[Spec]) -> None:
    """Write the reports, of every task and over all, and print tables and sentences."""
    from rich.console import Console

    from loralign.compare.overall import overall_table, report_tasks
    from loralign.compare.report import report
    from loralign.compare.tables import sentences, terminal_tables

    console = Console() if sys.stdout.isatty() else Console(width=180)
    shown = []
    for spec in specs:
        shown.append(report(spec))
        result = shown[-1].result
        if spec.task_name:
            say(f"== {spec.task_name}")
        for table in terminal_tables(result) if result.arms else ():
            console.print(table)
        for text in sentences(result):
            say(text)
        _say_files(spec)
    if len(specs) < 2:
        return
    if overall := report_tasks(shown):
        console.print(overall_table(overall, shown))
    say(f"over all tasks: {specs[0].output.parent / 'report.html'}")


def _say_files(spec: Spec) -> None:
    from loralign.compare.report import FILES

    say(f"written to {spec.output}: {', '.join(n for n in FILES if (spec.output / n).exists())}")
