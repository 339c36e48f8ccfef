"""The result of a study: one line per arm with figures, flags and a plain sentence. Pure functions, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loralign.compare.curves import Curve, Interval, Reach, interval, to_target
from loralign.compare.hierarchy import Effect, effects
from loralign.compare.inference import moderated
from loralign.compare.numbers import decimals, loss, number
from loralign.compare.ranks import Ranks, ranks_of
from loralign.compare.rates import Rate, Sensitivity, check_equal_trials, choose_rate, edge, sensitivity
from loralign.compare.statistics import CONTROL, FINAL, PRIMARY, Comparison, Gap, compare, gap_closed, samples, stable

Kind = Literal["baseline", "better", "worse", "sooner", "later", "no difference", "unstable", "untested"]
FEW_SEEDS = 3
LEVEL = f"{100 * (1 - FINAL):.0f} %"
"""Of the intervals of differences, for a whole family together."""
FIXED = "Only seeds were drawn anew: all of it is of this task, these rows and this model."


@dataclass(frozen=True)
class ArmResult:
    """One line of the table. steps_to, seconds_to: medians over seeds by target; costs: means over seeds, peak_bytes
    the largest; lr None where no rate finished. Intervals of `final` and `best` are over seeds that did not diverge."""

    arm: str
    kind: Kind
    sentence: str
    flags: tuple[str, ...]
    lr: float | None
    seeds: int
    diverged: int
    final: Interval
    best: Interval
    steps_to: Mapping[str, Reach]
    seconds_to: Mapping[str, Reach]
    gap: Gap
    sensitivity: Sensitivity | None
    comparison: Comparison | None
    costs: Mapping[str, float]
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    """At the end, over seeds that did not diverge."""
    family: str = PRIMARY
    effect: Effect | None = None
    """baseline − arm, shrunken (`hierarchy.py`); none for the control."""
    steps: int = 0
    """Trained."""
    charged_steps: float = 0.0
    """What its start read, in steps."""
    ranks: Ranks | None = None
    """At the end, where a rule decided about them or modules differ."""


@dataclass(frozen=True)
class StudyResult:
    """arms: in the order of the study. targets: mean final loss of baseline and reference. notes: about the whole.
    failed: what is said of arms that are left out."""

    arms: tuple[ArmResult, ...]
    targets: Mapping[str, float]
    notes: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def summarise(
    curves: Sequence[Curve],
    rates: Sequence[Rate] = (),
    *,
    family: Mapping[str, str] | None = None,
    baseline: str = "lora",
    reference: str = "full",
) -> StudyResult:
    """Everything that a report prints. LoralignError when the arms did not get the same number of rate trials."""
    names = list(dict.fromkeys([r.arm for r in rates] + [c.arm for c in curves]))
    trials = {n: [r for r in rates if r.arm == n] for n in names}
    if rates:
        check_equal_trials({n: len(own) for n, own in trials.items()})
    arms = {n: [c for c in curves if c.arm == n] for n in names}
    finals = {n: interval([c.final for c in own if c.sound]) for n, own in arms.items()}
    targets = {n: finals[n].mean for n in (baseline, reference) if n in finals and finals[n].n}
    comparisons = compare(arms, baseline, rates=rates, family=family, reference=reference)
    raw = samples(stable(arms, baseline), rates)
    quiet = dict(zip(raw, moderated(list(raw.values())), strict=True))
    shrunken = effects([{n: s for n, s in quiet.items() if n != reference}], baseline)
    results = []
    for n in names:
        gap = gap_closed(quiet.get(n), quiet.get(baseline), quiet.get(reference))
        result = _arm_result(n, arms[n], trials[n], finals[n], targets, gap, comparisons.get(n), baseline)
        group = CONTROL if n == reference else (family or {}).get(n, PRIMARY)
        results.append(replace(result, family=group, effect=shrunken.get(n)))
    return StudyResult(tuple(results), targets, tuple(_notes(arms, targets, comparisons, baseline, reference)))


def _notes(
    arms: Mapping[str, Sequence[Curve]],
    targets: Mapping[str, float],
    comparisons: Mapping[str, Comparison],
    baseline: str,
    reference: str,
) -> list[str]:
    notes = []
    if baseline not in targets:
        notes.append(f"no finished `{baseline}` arm: nothing is tested")
    if reference not in targets:
        notes.append(f"no finished `{reference}` arm: the gap to it is unknown")
    elif reference in comparisons and comparisons[reference].final_sign <= 0:
        notes.append(f"the control fails: `{reference}` is not found better than `{baseline}`, so ties say little")
    if len({len(own) for arm, own in arms.items() if own and arm != baseline}) > 1:
        notes.append("the arms do not have the same number of seeds: the study is unfinished")
    return notes


def _arm_result(
    name: str,
    curves: Sequence[Curve],
    rates: Sequence[Rate],
    final: Interval,
    targets: Mapping[str, float],
    gap: Gap,
    comparison: Comparison | None,
    baseline: str,
) -> ArmResult:
    reached = {target: to_target(curves, loss) for target, loss in targets.items()} if curves else {}
    diverged = sum(not c.sound for c in curves)
    kind = _kind(name == baseline, diverged, comparison)
    best = choose_rate(rates)
    return ArmResult(
        arm=name,
        kind=kind,
        sentence=_sentence(kind, curves, comparison, f"`{baseline}`", best),
        flags=tuple(_flags(curves, rates)),
        lr=best.lr if best else (curves[0].lr if curves else None),
        seeds=len(curves),
        diverged=diverged,
        final=final,
        best=interval([c.best for c in curves if c.sound]),
        steps_to={target: steps for target, (steps, _) in reached.items()},
        seconds_to={target: seconds for target, (_, seconds) in reached.items()},
        gap=gap,
        sensitivity=sensitivity(rates),
        comparison=comparison,
        costs=_costs(curves),
        metrics=_metrics(curves),
        steps=max((c.steps[-1] for c in curves), default=0),
        charged_steps=max((c.ahead for c in curves), default=0.0),
        ranks=ranks_of(curves),
    )


def _kind(is_baseline: bool, diverged: int, comparison: Comparison | None) -> Kind:
    if is_baseline:
        return "baseline"
    if diverged:
        return "unstable"
    if comparison is None:
        return "untested"
    by_final: dict[int, Kind] = {1: "better", -1: "worse"}
    by_speed: dict[int, Kind] = {1: "sooner", -1: "later", 0: "no difference"}
    return by_final.get(comparison.final_sign) or by_speed[comparison.speed_sign]


# ---------------------------------------------------------------------------------------------------------- plain words


def _sentence(
    kind: Kind, curves: Sequence[Curve], comparison: Comparison | None, base: str, best: Rate | None = None
) -> str:
    if not curves and best is not None:
        return (
            f"its rate is found (validation loss {loss(best.mean)}), none of its seeds has run: nothing is compared yet"
        )
    if not curves:
        return "no learning rate finished: every trial diverged or was given up"
    lost = sum(not c.sound for c in curves)
    if kind == "unstable" or lost == len(curves):
        return f"diverged on {lost} of {len(curves)} seeds at its best rate: nothing is claimed for it"
    if kind == "baseline":
        return "what the other arms are compared with"
    if comparison is None:
        return f"it or {base} has fewer than two seeds: not tested"
    parts = [_about_final(comparison, base), _about_speed(comparison, base)]
    return "; ".join(part for part in parts if part)


def amount(c: Comparison) -> tuple[str, str]:
    """By how much an arm's final loss differs, whichever way, and the interval: ± where it holds 0, else its bounds."""
    low, high = sorted((abs(c.final.low), abs(c.final.high)))
    half = c.final.high - c.final.mean
    n = max(decimals(c.final.mean), decimals(half))
    bounds = f"± {number(half, n)}" if 0.0 in c.final else f"{number(low, n)} … {number(high, n)}"
    return number(abs(c.final.mean), n), bounds


def _about_final(c: Comparison, base: str) -> str:
    half = c.final.high - c.final.mean
    if c.final_sign:
        by, bounds = amount(c)
        return f"{'better' if c.final_sign > 0 else 'worse'} than {base} by {by} ({LEVEL} {bounds})"
    noise = f"{number(-c.final.mean, decimals(half), '+')} ± {number(half, decimals(half))}"
    if c.speed_sign:
        return f"ends level with {base} within noise ({noise})"
    return f"no difference from {base} within noise (final loss {noise})"


def _about_speed(c: Comparison, base: str) -> str:
    if not c.speed_sign:
        return ""
    share = f"{100 * c.steps.mean:.0f} % of its steps (95 % {100 * c.steps.low:.0f} … {100 * c.steps.high:.0f} %)"
    return f"for the same loss as {base} it needs {share} and {100 * c.seconds.mean:.0f} % of its seconds"


def _flags(curves: Sequence[Curve], rates: Sequence[Rate]) -> list[str]:
    flags = []
    best = choose_rate(rates)
    side = edge(best.lr if best else None, rates) if rates else None
    if best and side:
        outermost = max(rates, key=lambda r: r.lr) if side == "high" else min(rates, key=lambda r: r.lr)
        beside = "" if outermost.lr == best.lr else ", beside a rate that was given up"
        flags.append(f"best rate {best.lr:g} is at the {side} edge of its grid{beside}: a better one may lie outside")
    lost = sum(not c.sound for c in curves)
    if lost:
        flags.append(f"diverged on {lost} of {len(curves)} seeds")
    if 0 < len(curves) < FEW_SEEDS:
        flags.append(f"fewer than {FEW_SEEDS} seeds")
    return flags


def _costs(curves: Sequence[Curve]) -> dict[str, float]:
    if not curves:
        return {}
    means = {name: sum(getattr(c, name) for c in curves) / len(curves) for name in _MEANS}
    return {"peak_bytes": max(c.peak_bytes for c in curves), **means}


def _metrics(curves: Sequence[Curve]) -> dict[str, Interval]:
    sound = [c for c in curves if c.sound]
    names = dict.fromkeys(n for c in sound for n in c.metrics)
    return {n: interval([c.metrics[n] for c in sound if n in c.metrics]) for n in names}


_MEANS = ("init_s", "init_tokens", "step_s", "trainable", "exported_rank")
