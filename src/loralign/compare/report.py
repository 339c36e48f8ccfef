"""Files of a study: report.html, results.json, results.csv, results.md and three pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from loralign.compare.curves import Curve, Interval, loss_at
from loralign.compare.failures import standing
from loralign.compare.figures import styles
from loralign.compare.page.build import Shown, page
from loralign.compare.plots import plot_ranks, plot_rates, plot_seconds, plot_steps
from loralign.compare.rates import Rate
from loralign.compare.schedule import in_order, rate_trials, rates_of, seed_trials, wanted
from loralign.compare.spec import Outcome, Spec, Trial, arm_of
from loralign.compare.store import Store
from loralign.compare.tables import as_markdown, reached
from loralign.compare.verdict import ArmResult, StudyResult, summarise
from loralign.io.json_file import read_json
from loralign.io.provenance import environment, write_json, write_text
from loralign.io.public import scrub

COLUMNS = (
    "arm", "family", "verdict", "lr", "steps", "charged_steps", "seeds", "diverged", "final", "final_low", "final_high",
    "best", "best_low", "best_high", "metric", "metric_mean", "metric_low", "metric_high", "difference",
    "difference_low", "difference_high", "p_final", "steps_ratio", "p_steps", "shrunken", "shrunken_low",
    "shrunken_high", "p_better", "gap_closed", "gap_low", "gap_high", "steps_to_lora", "steps_to_full", "lr_decades",
    "trainable", "exported_rank", "slots_begun", "slots_ended", "init_tokens", "peak_gib", "init_s", "step_s",
    "seconds_to_lora", "seconds_to_full", "flags",
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
    found = in_order(spec, done, trials)
    rates = [rate for arm in spec.arms for rate in rates_of(spec, arm, found, here)]
    if len(here) < len(trials):
        return Finished([], rates, {}, len(trials) - len(here), found)
    seeds = [t for t in seed_trials(spec, found, trials) if t.key in found]
    lowest = {t.arm: _lowest_step(spec, t, trials, found) for t in seeds}
    curves = [_curve(spec, t, lowest[t.arm], found[t.key]) for t in seeds]
    return Finished(curves, rates, edges, 0, found)


def _lowest_step(spec: Spec, chosen: Trial, trials: Sequence[Trial], done: Mapping[str, Outcome]) -> int:
    """The evaluation with the lowest mean validation loss at an arm's chosen rate."""
    runs = [done[t.key] for t in trials if (t.arm, t.index) == (chosen.arm, chosen.index)]
    runs = [o for o in runs if not o.diverged]
    last = min(len(o.losses) for o in runs)
    means = [sum(o.losses[i] for o in runs) / len(runs) for i in range(last)]
    return runs[0].steps[means.index(min(means))]


def _curve(spec: Spec, t: Trial, lowest: int, o: Outcome) -> Curve:
    losses, steps = o.losses or (math.inf,), o.steps or (0,)
    made = Curve(
        t.arm, t.lr, t.seed, steps, o.seconds or (0.0,), losses, final=losses[-1], best=loss_at(steps, losses, lowest),
        init_s=o.init_s, init_tokens=o.init_tokens, peak_bytes=o.peak_bytes, step_s=o.step_s, trainable=o.trainable,
        exported_rank=o.rank, diverged=o.diverged, step_tokens=o.step_tokens, metrics=dict(o.metrics),
        ranks=o.ranks, begun_slots=o.begun_slots,
    )  # fmt: skip
    if spec.charge == "none" or not made.sound:
        return made
    return replace(made, final=loss_at(made.charged_steps, losses, spec.steps))


FILES = (
    *("report.html", "results.json", "results.csv", "results.md"),
    *("rates.png", "steps.png", "seconds.png", "ranks.png"),
)
"""What `report` writes; pictures where there is something to show."""


def report(spec: Spec) -> Shown:
    """Write everything that the finished trials allow into the study's folder."""
    store = Store(spec)
    done = store.outcomes()
    spec, failures = standing(spec, done, store.failures())
    found = collect(spec, done)
    result = StudyResult((), {}, ())
    if not found.missing:
        result = summarise(found.curves, found.rates, family={arm.name: arm.family for arm in spec.arms})
    failed = {arm: failure.said for arm, failure in failures.items()}
    result = replace(result, notes=(*notes(spec, done, found, failed), *result.notes), failed=failed)
    out = spec.output
    write_text(out / "results.md", as_markdown(result))
    write_text(out / "results.csv", as_csv([row(arm) for arm in result.arms]))
    body = {"result": plain(result), "edges": found.edges, "study": dict(spec.source), "timing": timing(done)}
    data = scrub({**body, "environment": environment(), **listed(found.trials)})
    write_json(out / "results.json", data)
    look = styles([arm.name for arm in spec.arms])
    if found.rates:
        plot_rates(found.rates, out / "rates.png", look)
    if found.curves:
        budget = spec.steps if spec.charge != "none" else math.inf
        plot_steps(found.curves, out / "steps.png", look, budget)
        plot_seconds(found.curves, out / "seconds.png", look, budget)
    if ranks := {a.arm: a.ranks for a in result.arms if a.ranks}:
        plot_ranks(ranks, out / "ranks.png")
    arms = {arm.name for arm in spec.arms}
    ran = {key: o for key, o in found.trials.items() if arm_of(key) in arms}
    shown = Shown(spec, result, found.curves, found.rates, ran, data)
    write_text(out / "report.html", page([shown]))
    return shown


def notes(spec: Spec, done: Mapping[str, Outcome], found: Finished, failed: Mapping[str, str]) -> list[str]:
    """What a reader must know about the whole."""
    said = [f"failed and left out: {why}" for why in failed.values()]
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
    said += [text for text in (charging(spec, found.curves), _tuned_here(spec)) if text]
    if not spec.references:
        said.append("`lora` and `full` were not added (`references: false`)")
    if spec.shared_rows:
        said.append(f"{spec.shared_rows} test rows stand in the training or validation rows, too")
    devices = sorted({o.device for o in done.values() if o.device})
    if len(devices) > 1:
        said.append(f"trials ran on {', '.join(devices)}: their seconds are not comparable")
    return said


def charging(spec: Spec, curves: Sequence[Curve]) -> str:
    """How what a start reads was paid for, where an arm's does and it was not by training fewer steps."""
    read = sorted({f"{c.arm} ({c.ahead:.0f})" for c in curves if c.ahead})
    if not read or spec.charge == "steps":
        return ""
    if spec.charge == "none":
        return f"same steps for every arm: what a start read is not charged, in steps: {', '.join(read)}"
    return (
        "the starts' tokens are charged by reading the final loss at the step where they are paid for; the schedule "
        f"went on to the last step, which is hard on them, in steps: {', '.join(read)}"
    )


def _tuned_here(spec: Spec) -> str:
    here = {
        arm.name: name for arm in spec.arms for name, rows in arm.tuned_on if rows == spec.content.get("task.train")
    }
    if not here:
        return ""
    task = next(iter(here.values()))
    return f"the rates of {', '.join(here)} are centred where they were tuned on this very task: {task}"


def row(arm: ArmResult) -> dict[str, Any]:
    """One line of results.csv."""
    metric, measured = next(iter(arm.metrics.items()), ("", None))
    c, e, peak = arm.comparison, arm.effect, arm.costs.get("peak_bytes")
    shrunken = (e.mean, e.low, e.high, e.better) if e else (None,) * 4
    slots = (arm.ranks.begun, arm.ranks.ended) if arm.ranks else (None, None)
    figures = (
        arm.arm, arm.family, arm.kind, arm.lr, arm.steps, arm.charged_steps, arm.seeds, arm.diverged,
        *_bounds(arm.final), *_bounds(arm.best), metric, *_bounds(measured), *_bounds(c.final if c else None),
        c.p[0] if c else None, c.steps.mean if c else None, c.p[1] if c else None, *shrunken, arm.gap.value,
        arm.gap.low, arm.gap.high, reached(arm.steps_to.get("lora")), reached(arm.steps_to.get("full")),
        arm.sensitivity.decades if arm.sensitivity else None,
        *(arm.costs.get(k) for k in ("trainable", "exported_rank")), *slots,
        arm.costs.get("init_tokens"), peak / 2**30 if peak else None,
        *(arm.costs.get(k) for k in ("init_s", "step_s")), reached(arm.seconds_to.get("lora")),
        reached(arm.seconds_to.get("full")), "; ".join(arm.flags),
    )  # fmt: skip
    return dict(zip(COLUMNS, figures, strict=True))


def _bounds(x: Interval | None) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % limits, those that there are."""
    if x is None or not x.n:
        return None, None, None
    return x.mean, *((x.low, x.high) if x.n > 1 else (None, None))


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


def listed(trials: Mapping[str, Outcome]) -> dict[str, Any]:
    """The trials of results.json; their ranks are in the order of `modules`, whose names stand there once."""
    modules = list(dict.fromkeys(m for key in sorted(trials) for m in trials[key].ranks or {}))
    made = {}
    for key in sorted(trials):
        ranks = trials[key].ranks
        made[key] = {**plain(trials[key]), "ranks": [ranks.get(m) for m in modules] if ranks else None}
    return {"modules": modules, "trials": made}


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


def repeatable(folder: Path) -> dict[str, Any]:
    """What a study must give again to the last bit, however it was interrupted: all of its results but the times."""
    body: dict[str, Any] = read_json(folder / "results.json")
    result = body["result"]
    for arm in result["arms"]:
        costs = {k: v for k, v in arm["costs"].items() if k not in ("init_s", "step_s", "peak_bytes")}
        arm.update(seconds_to=None, sentence=None, costs=costs)  # the sentence names seconds
        arm["comparison"] = {**arm["comparison"], "seconds": None} if arm["comparison"] else None
    kept = (
        "steps",
        "losses",
        "metrics",
        "diverged",
        "pruned",
        "init_tokens",
        "step_tokens",
        "trainable",
        "rank",
        "ranks",
    )
    trials = {key: {k: trial[k] for k in kept} for key, trial in body["trials"].items()}
    table = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text(encoding="utf-8"))))
    rows = [{k: v for k, v in line.items() if k not in TIMES} for line in table]
    return {"result": result, "edges": body["edges"], "trials": trials, "table": rows}
