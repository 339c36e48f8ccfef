"""Files and words of a study: results.json, results.csv, three pictures, a terminal table and one sentence per arm."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from loralign.compare.plots import plot_rates, plot_seconds, plot_steps
from loralign.compare.rates import Rate
from loralign.compare.spec import Outcome, Spec
from loralign.compare.statistics import Curve, Interval
from loralign.compare.store import Store
from loralign.compare.study import in_order, rate_trials, seed_trials, wanted
from loralign.compare.verdict import ArmResult, StudyResult, summarise
from loralign.io.provenance import environment, write_json, write_text

COLUMNS = (
    "arm", "verdict", "lr", "seeds", "diverged", "final", "final_low", "final_high", "best", "best_low", "best_high",
    "metric", "metric_mean", "metric_low", "metric_high", "difference", "difference_low", "difference_high", "p_final",
    "steps_ratio", "p_steps", "gap_closed", "gap_low", "gap_high", "steps_to_lora", "steps_to_full", "lr_decades",
    "trainable", "exported_rank", "init_tokens", "peak_gib", "init_s", "step_s", "seconds_to_lora", "seconds_to_full",
    "flags",
)  # fmt: skip
TIMES = frozenset({"init_s", "step_s", "seconds_to_lora", "seconds_to_full", "peak_gib"})
"""Columns that a repeated run does not give again bit by bit."""


@dataclass(frozen=True)
class Finished:
    """What the finished trials allow to say. rates: of the search, curves: at the best rates, none before the search is
    over. edges: arms whose best rate is still at an edge. missing: trials of the search that are not finished yet.
    trials: all outcomes by key, as one worker would have had them once the search is over."""

    curves: list[Curve]
    rates: list[Rate]
    edges: dict[str, str]
    missing: int
    trials: dict[str, Outcome]


def collect(spec: Spec, done: Mapping[str, Outcome]) -> Finished:
    """Finished outcomes as the statistics take them."""
    trials, edges = rate_trials(spec, done)
    here = [t for t in trials if t.key in done]
    if len(here) < len(trials):
        return Finished([], [_rate(t.arm, t.lr, done[t.key]) for t in here], {}, len(trials) - len(here), dict(done))
    found = {**done, **in_order(spec, done, trials)}
    seeds = [t for t in seed_trials(spec, found, trials) if t.key in found]
    curves = [_curve(t.arm, t.lr, t.seed, found[t.key]) for t in seeds]
    return Finished(curves, [_rate(t.arm, t.lr, found[t.key]) for t in trials], edges, 0, found)


def _rate(arm: str, lr: float, o: Outcome) -> Rate:
    return Rate(arm, lr, o.losses[-1] if o.losses else math.inf, o.diverged, o.pruned)


def _curve(arm: str, lr: float, seed: int, o: Outcome) -> Curve:
    losses = o.losses or (math.inf,)
    return Curve(
        arm, lr, seed, o.steps or (0,), o.seconds or (0.0,), losses, final=losses[-1], best=min(losses),
        init_s=o.init_s, init_tokens=o.init_tokens, peak_bytes=o.peak_bytes, step_s=o.step_s, trainable=o.trainable,
        exported_rank=o.rank, diverged=o.diverged, step_tokens=o.step_tokens, metrics=dict(o.metrics),
    )  # fmt: skip


def report(spec: Spec) -> StudyResult:
    """Write everything that the finished trials allow into the study's folder."""
    done = Store(spec).outcomes()
    found = collect(spec, done)
    result = summarise(found.curves, found.rates) if not found.missing else StudyResult((), {}, ())
    result = replace(result, notes=(*notes(spec, done, found), *result.notes))
    out = spec.output
    write_text(out / "results.csv", as_csv([row(arm) for arm in result.arms]))
    body = {"result": plain(result), "edges": found.edges, "study": dict(spec.source), "timing": timing(done)}
    trials = {key: plain(found.trials[key]) for key in sorted(found.trials)}
    write_json(out / "results.json", {**body, "environment": environment(), "trials": trials})
    if found.rates:
        plot_rates(found.rates, out / "rates.png")
    if found.curves:
        plot_steps(found.curves, out / "steps.png")
        plot_seconds(found.curves, out / "seconds.png")
    return result


def notes(spec: Spec, done: Mapping[str, Outcome], found: Finished) -> list[str]:
    """What a reader must know about the whole."""
    said = []
    if found.missing:
        known = len(found.rates) + found.missing
        said.append(
            f"the search for learning rates is unfinished, {len(found.rates)} of {known} trials are done: nothing is "
            "compared yet"
        )
    seeds = [t for t in wanted(spec, done) if t.phase == "seed"]
    if left := sum(t.key not in done for t in seeds):
        said.append(
            f"the seeds are unfinished, {len(seeds) - left} of {len(seeds)} trials are done; run again to go on"
        )
    if not spec.references:
        said.append("`lora` and `full` were not added (`references: false`)")
    if spec.shared_rows:
        said.append(f"{spec.shared_rows} test rows stand in the training or validation rows, too")
    devices = sorted({o.device for o in done.values() if o.device})
    if len(devices) > 1:
        said.append(f"trials ran on {', '.join(devices)}: their seconds are not comparable")
    return said


def row(arm: ArmResult) -> dict[str, Any]:
    """One line of results.csv."""
    metric, measured = next(iter(arm.metrics.items()), ("", None))
    c, peak = arm.comparison, arm.costs.get("peak_bytes")
    figures = (
        arm.arm, arm.kind, arm.lr, arm.seeds, arm.diverged, *_bounds(arm.final), *_bounds(arm.best), metric,
        *_bounds(measured), *_bounds(c.final if c else None), c.p[0] if c else None, c.steps.mean if c else None,
        c.p[1] if c else None, arm.gap.value, arm.gap.low, arm.gap.high, reached(arm.steps_to.get("lora")),
        reached(arm.steps_to.get("full")), arm.sensitivity.decades if arm.sensitivity else None,
        *(arm.costs.get(k) for k in ("trainable", "exported_rank", "init_tokens")), peak / 2**30 if peak else None,
        *(arm.costs.get(k) for k in ("init_s", "step_s")), reached(arm.seconds_to.get("lora")),
        reached(arm.seconds_to.get("full")), "; ".join(arm.flags),
    )  # fmt: skip
    return dict(zip(COLUMNS, figures, strict=True))


def _bounds(x: Interval | None) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % limits, those that there are."""
    if x is None or not x.n:
        return None, None, None
    return x.mean, *((x.low, x.high) if x.n > 1 else (None, None))


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
    """Medians over all finished trials: a whole one, and what one costs beside training and evaluations."""
    if not done:
        return {}
    total, between = [o.total_s for o in done.values()], [o.between_s for o in done.values() if o.steps]
    found = {"trials": float(len(done)), "seconds_per_trial": median(total), "summed_hours": sum(total) / 3600}
    return {**found, **({"seconds_between_trials": median(between)} if between else {})}


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


def terminal_tables(result: StudyResult) -> list[Table]:
    """What people read first: results, then costs; columns in which no arm has anything are left out."""
    metrics = list(dict.fromkeys(name for arm in result.arms for name in arm.metrics))
    heads = ("arm", "lr", "final loss", *metrics, "gap closed", "steps to lora's", "to full's")
    results = [_results(arm, metrics) for arm in result.arms]
    costs = [_costs(arm) for arm in result.arms]
    title = "Loss on test rows at each arm's own best rate; ± 95 % over seeds"
    return [
        _table(title, heads, results),
        _table("Costs", ("arm", "parameters", "exported rank", "peak memory", "init", "step"), costs),
    ]


def _table(title: str, heads: Sequence[str], lines: Sequence[tuple[str, ...]]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown = [i for i in range(len(heads)) if any(line[i] not in ("", "–") for line in lines)]
    for i in shown:
        made.add_column(heads[i], justify="right" if i else "left", no_wrap=True)
    for line in lines:
        made.add_row(*(Text(line[i]) for i in shown))  # no markup: an arm may be called [a]
    return made


def _results(arm: ArmResult, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{arm.lr:g}" if arm.lr else "–",
        spread(arm.final),
        *(spread(arm.metrics[name], 3) if name in arm.metrics else "–" for name in metrics),
        "–" if arm.gap.value is None else f"{arm.gap.value:.0%}",
        reached(arm.steps_to.get("lora")),
        reached(arm.steps_to.get("full")),
    )


def _costs(arm: ArmResult) -> tuple[str, ...]:
    costs = arm.costs
    return (
        arm.arm,
        _count(costs["trainable"]) if costs else "–",
        f"{costs['exported_rank']:.0f}" if costs.get("exported_rank") else "–",
        f"{costs['peak_bytes'] / 2**30:.1f} GiB" if costs.get("peak_bytes") else "–",
        f"{costs['init_s']:.1f} s" if costs else "–",
        f"{1000 * costs['step_s']:.0f} ms" if costs else "–",
    )


def _count(n: float) -> str:
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n / 1e3:.1f} k"


def spread(x: Interval, decimals: int = 4) -> str:
    if x.n == 0:
        return "–"
    return f"{x.mean:.{decimals}f}" + (f" ± {(x.high - x.low) / 2:.{decimals}f}" if x.n > 1 else "")


def sentences(result: StudyResult) -> list[str]:
    """One plain sentence per arm, its flags, then notes about the whole."""
    said = []
    for arm in result.arms:
        said += [f"{arm.arm}: {arm.sentence}", *(f"  ! {flag}" for flag in arm.flags)]
    return [*said, *(f"note: {note}" for note in result.notes)]


def repeatable(folder: Path) -> dict[str, Any]:
    """What a study must give again to the last bit, however it was interrupted: all of its results but the times."""
    body: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    result = body["result"]
    for arm in result["arms"]:
        costs = {k: v for k, v in arm["costs"].items() if k not in ("init_s", "step_s", "peak_bytes")}
        arm.update(seconds_to=None, sentence=None, costs=costs)  # the sentence names seconds
        arm["comparison"] = {**arm["comparison"], "seconds": None} if arm["comparison"] else None
    kept = ("steps", "losses", "metrics", "diverged", "pruned", "init_tokens", "step_tokens", "trainable", "rank")
    trials = {key: {k: trial[k] for k in kept} for key, trial in body["trials"].items()}
    table = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text(encoding="utf-8"))))
    rows = [{k: v for k, v in line.items() if k not in TIMES} for line in table]
    return {"result": result, "edges": body["edges"], "trials": trials, "table": rows}
