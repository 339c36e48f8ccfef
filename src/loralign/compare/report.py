"""Files and words of a study: results.json, results.csv, three pictures, a terminal table and one sentence per arm."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loralign.compare.plots import plot_rates, plot_seconds, plot_steps
from loralign.compare.rates import Rate
from loralign.compare.spec import Outcome, Spec
from loralign.compare.statistics import Curve, Interval
from loralign.compare.study import Store, in_order, rate_trials, seed_trials
from loralign.compare.verdict import ArmResult, StudyResult, summarise
from loralign.io.provenance import environment, write_json, write_text

COLUMNS = (
    "arm", "verdict", "lr", "seeds", "final", "final_low", "final_high", "best", "gap_closed", "gap_low", "gap_high",
    "metric", "metric_mean", "metric_low", "metric_high",
    "steps_to_lora", "steps_to_full", "lr_decades", "trainable", "exported_rank", "peak_gib", "init_s", "step_s",
    "seconds_to_lora", "flags",
)  # fmt: skip
TIMES = frozenset({"init_s", "step_s", "seconds_to_lora", "peak_gib"})
"""Columns that a repeated run does not give again bit by bit."""


def collect(spec: Spec, done: Mapping[str, Outcome]) -> tuple[list[Curve], list[Rate], dict[str, str]]:
    """Finished outcomes as the statistics take them, and the arms whose best rate is still at an edge."""
    found = dict(done)
    trials, edges = rate_trials(spec, found)
    finished = [t for t in trials if t.key in found]
    if len(finished) == len(trials):
        found |= in_order(spec, found, trials)
    rates = [_rate(t.arm, t.lr, found[t.key]) for t in finished]
    if len(finished) < len(trials):
        return [], rates, {}
    seeds = [t for t in seed_trials(spec, found, trials) if t.key in found]
    return [_curve(spec, t.arm, t.lr, t.seed, found[t.key]) for t in seeds], rates, edges


def _rate(arm: str, lr: float, o: Outcome) -> Rate:
    return Rate(arm, lr, o.losses[-1] if o.losses else math.inf, o.diverged, o.pruned)


def _curve(spec: Spec, arm: str, lr: float, seed: int, o: Outcome) -> Curve:
    losses = o.losses or (math.inf,)
    return Curve(
        arm, lr, seed, o.steps or (0,), o.seconds or (0.0,), losses, final=losses[-1], best=min(losses),
        init_s=o.init_s, init_tokens=o.init_tokens, peak_bytes=o.peak_bytes, step_s=o.step_s, trainable=o.trainable,
        exported_rank=o.rank, diverged=o.diverged, step_tokens=spec.batch_size * spec.task.length,
        metrics=dict(o.metrics),
    )  # fmt: skip


def report(spec: Spec) -> tuple[StudyResult, dict[str, str]]:
    """Write everything that the finished trials allow into the study's folder; returns the result and the flags."""
    done = Store(spec).outcomes()
    curves, rates, edges = collect(spec, done)
    result = summarise(curves, rates)
    rows = [row(arm) for arm in result.arms]
    out = spec.output
    write_text(out / "results.csv", as_csv(rows))
    body = {"result": plain(result), "edges": edges, "study": dict(spec.source), "timing": timing(done)}
    write_json(out / "results.json", {**body, "environment": environment()})
    if rates:
        plot_rates(rates, out / "rates.png")
    if curves:
        plot_steps(curves, out / "steps.png")
        plot_seconds(curves, out / "seconds.png")
    return result, edges


def row(arm: ArmResult) -> dict[str, Any]:
    """One line of results.csv."""
    to_lora, to_full = arm.steps_to.get("lora"), arm.steps_to.get("full")
    seconds = arm.seconds_to.get("lora")
    metric, measured = next(iter(arm.metrics.items()), ("", None))
    measures = (metric, measured.mean, measured.low, measured.high) if measured else ("", None, None, None)
    figures = (
        arm.arm, arm.kind, arm.lr, arm.seeds, arm.final.mean, arm.final.low, arm.final.high, arm.best.mean,
        arm.gap.value, arm.gap.low, arm.gap.high, *measures, reached(to_lora), reached(to_full),
        arm.sensitivity.decades if arm.sensitivity else None, arm.costs.get("trainable"),
        arm.costs.get("exported_rank"), arm.costs.get("peak_bytes", 0.0) / 2**30, arm.costs.get("init_s"),
        arm.costs.get("step_s"), reached(seconds), "; ".join(arm.flags),
    )  # fmt: skip
    return dict(zip(COLUMNS, figures, strict=True))


def reached(time: Any) -> str:
    """A time, or "> bound" where it was not reached."""
    if time is None:
        return ""
    return f"{time.value:.1f}" if time.reached else f"> {time.value:.1f}"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def timing(done: Mapping[str, Outcome]) -> dict[str, float]:
    """Seconds per trial and between trials, over all finished ones."""
    if not done:
        return {}
    total, between = [o.total_s for o in done.values()], [o.between_s for o in done.values()]
    mean = {"seconds_per_trial": sum(total) / len(total), "seconds_between_trials": sum(between) / len(between)}
    return {"trials": float(len(done)), **mean, "summed_hours": sum(total) / 3600}


def plain(value: Any) -> Any:
    """Dataclasses and infinities as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def terminal_table(result: StudyResult, edges: Mapping[str, str]) -> Table:
    """What people read first."""
    made = Table(title="Final loss on test rows at each arm's own best rate, 95 % over seeds")
    metrics = list(dict.fromkeys(name for arm in result.arms for name in arm.metrics))
    for name in ("arm", "lr", "final loss", *metrics, "gap closed", "steps to lora's", "params", "init s", "flags"):
        made.add_column(name, justify="left" if name in ("arm", "flags") else "right")
    for arm in result.arms:
        gap = "–" if arm.gap.value is None else f"{arm.gap.value:.0%}"
        edge = f"best rate at the {edges[arm.arm]} edge" if arm.arm in edges else ""
        flags = "; ".join(dict.fromkeys(f for f in (*arm.flags, edge) if f))
        measured = [spread(arm.metrics[name]) if name in arm.metrics else "–" for name in metrics]
        cells = (f"{arm.lr:g}" if arm.lr else "–", spread(arm.final), *measured, gap)
        cells += (reached(arm.steps_to.get("lora")),)
        costs = (f"{arm.costs.get('trainable', 0) / 1e6:.2f} M", f"{arm.costs.get('init_s', 0):.1f}")
        made.add_row(arm.arm, *cells, *costs, flags)
    return made


def spread(x: Interval) -> str:
    if x.n == 0:
        return "–"
    return f"{x.mean:.4f}" + (f" ± {(x.high - x.low) / 2:.4f}" if x.n > 1 else "")


def sentences(result: StudyResult) -> list[str]:
    """One plain sentence per arm, then notes about the whole."""
    return [*(f"{arm.arm}: {arm.sentence}" for arm in result.arms), *result.notes]


def load_result(folder: Path) -> dict[str, Any]:
    """results.json of a study."""
    body: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return body
