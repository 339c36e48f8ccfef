"""How far a study is, read from its journal: a table that is drawn anew on a terminal, one line per trial elsewhere.

Whoever runs a study sees all of it, also what other workers do: the table knows only the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean, median

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loralign.compare.failures import standing
from loralign.compare.numbers import loss
from loralign.compare.schedule import best_index, in_order, rate_trials, wanted
from loralign.compare.spec import BASELINE, Failure, Outcome, Spec, Trial
from loralign.compare.store import Store

EVERY_S = 2.0
Running = Mapping[str, tuple[float, int]]


def board(spec: Spec, done: Mapping[str, Outcome], running: Running, out: Mapping[str, Failure] | None = None) -> Table:
    """Every arm's rates from low to high with their validation losses, the best one bold, and its seeds so far. out:
    arms that failed."""
    plan, (trials, _) = wanted(spec, done), rate_trials(spec, done)
    searched = all(t.key in done for t in trials)
    judged = in_order(spec, done, trials) if searched else dict(done)
    made = Table(title=headline(spec, done, running), box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("arm", "validation loss by rate", "test loss by seed"):
        made.add_column(head)
    for arm in spec.arms:
        best = best_index(spec, arm, judged, trials) if searched else None
        rates = sorted((t for t in trials if t.arm == arm.name), key=lambda t: (t.lr, t.seed))
        cells = [f"{t.lr:g} {_cell(t, judged, running, spec.steps, t.index == best)}" for t in rates]
        seeds = [t for t in plan if t.arm == arm.name and t.phase == "seed"]
        here = [done[t.key].losses[-1] for t in seeds if t.key in done and not done[t.key].diverged]
        mean = f"mean {loss(fmean(here))}" if here else ""
        waiting = [_cell(t, done, running, spec.steps, False) for t in seeds]
        made.add_row(Text(arm.name), " · ".join(cells), " ".join((*waiting, mean)))
    for name, failure in (out or {}).items():
        made.add_row(Text(name), Text(f"failed, is left out: {failure.said}", style="red"), "")
    return made


def _cell(trial: Trial, done: Mapping[str, Outcome], running: Running, steps: int, best: bool) -> str:
    if trial.key in running and trial.key not in done:
        return f"[cyan]{100 * running[trial.key][1] // steps} %[/]"
    if trial.key not in done:
        return "[dim]…[/]"
    text = end_of(done[trial.key])
    return f"[bold]{text}[/]" if best else text


def end_of(outcome: Outcome) -> str:
    """How a trial ended, in a word or a number."""
    if outcome.diverged:
        return "diverged"
    return "given up" if outcome.pruned else loss(outcome.losses[-1])


def reported(spec: Spec) -> int:
    """Runs of phase "seed" when every arm has a rate."""
    return sum(spec.baseline_seeds if arm.name == BASELINE else spec.seeds for arm in spec.arms)


def totals(spec: Spec, done: Mapping[str, Outcome]) -> tuple[int, int, bool]:
    """Trials finished and needed, and whether the search may still add some; its seeds are counted from the start."""
    plan = wanted(spec, done)
    finished = sum(t.key in done for t in plan)
    searching = all(t.phase == "rate" for t in plan)
    return finished, len(plan) + (reported(spec) if searching else 0), searching


def headline(spec: Spec, done: Mapping[str, Outcome], running: Running) -> str:
    """Trials done, running and to come, and about how long that takes."""
    finished, total, searching = totals(spec, done)
    said = f"{finished} of {'at least ' if searching else ''}{total} trials done"
    if running:
        said += f", {len(running)} running"
    if finished and finished < total:
        usual = median([o.total_s for o in done.values()])
        ahead = (total - finished) * usual - sum(min(usual, elapsed) for elapsed, _ in running.values())
        said += f", about {max(1, round(ahead / 60 / max(1, len(running))))} min to go"
    return said


def line(trial: Trial, outcome: Outcome, number: int, total: int) -> str:
    """What is printed about a finished trial where no table is drawn."""
    final = trial.phase == "seed"
    ended = ("test loss " if final else "validation loss ") * (not outcome.diverged and not outcome.pruned)
    where = f"seed {trial.seed}" if final else f"choosing its rate, seed {trial.seed}"
    said = f"{trial.arm} at {trial.lr:g}, {where}: {ended}{end_of(outcome)}"
    return f"[{number}/{total}] {said} in {outcome.total_s:.0f} s"


@contextmanager
def watched(
    spec: Spec, say: Callable[[str], None], console: Console | None = None, *, session: str | None = None
) -> Iterator[None]:
    """Within: progress of the study is shown, drawn by a thread, whoever works on it.

    session: the run of the command that is shown: an arm that failed in an earlier one is tried again, and counts.
    """
    console = console or Console()
    show = _Drawn(spec, console, session) if console.is_terminal else _Said(spec, say, session)
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(EVERY_S):
            show.now()

    thread = threading.Thread(target=loop, daemon=True)
    with show:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            show.now()


class _Drawn:
    def __init__(self, spec: Spec, console: Console, session: str | None) -> None:
        self.spec, self.store, self.session = spec, Store(spec), session
        self.live = Live(self._board(), console=console, auto_refresh=False)

    def _board(self) -> Table:
        done = self.store.outcomes()
        spec, out = standing(self.spec, done, self.store.failures(), self.session)
        return board(spec, done, self.store.running(), out)

    def now(self) -> None:
        self.live.update(self._board(), refresh=True)

    def __enter__(self) -> None:
        self.live.start()

    def __exit__(self, *error: object) -> None:
        self.live.stop()


class _Said:
    def __init__(self, spec: Spec, say: Callable[[str], None], session: str | None) -> None:
        self.spec, self.say, self.store, self.session = spec, say, Store(spec), session
        self.known = set(self.store.outcomes())
        self.failed = set(self.store.failures())

    def now(self) -> None:
        done, failures = self.store.outcomes(), self.store.failures()
        for failure in (f for f in failures if f not in self.failed):
            self.failed.add(failure)
            self.say(f"failed: {failure.said}")
        spec, _ = standing(self.spec, done, failures, self.session)
        plan = {t.key: t for t in wanted(spec, done)}
        _, total, _ = totals(spec, done)
        for key in done:
            if key not in self.known and key in plan:
                self.known.add(key)
                self.say(line(plan[key], done[key], sum(k in self.known for k in plan), total))

    def __enter__(self) -> None:
        done = self.store.outcomes()
        self.say(headline(self.spec, done, self.store.running()))

    def __exit__(self, *error: object) -> None:
        pass
