"""A study's losses at equal GPU seconds, reckoned from step times that were measured on another shape.

    python scripts/equal_seconds.py STUDY.yaml --steps step.json [--set output=RECORD] [--kind "ARM=lora:64"]

STUDY.yaml: with its journal in `output`. step.json: of `benchmarks/bench_step.py --shapes 8b --json`, with a kind per
arm (METHOD:RANK, METHOD:RANK:PRESET, full, full-muon). A step t of an arm stands for t · its step time; what its start
reads is charged as steps before.

Reads: the loss at the moment when the quickest arm has ended, and the seconds to AdamW full fine-tuning's final loss.
A curve is read before its end there, at a learning rate that has not come down: that speaks against slower arms, so a
slow arm that ends lower in fewer seconds truly does, one that does not might with a schedule of its own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from loralign.compare.curves import Curve, loss_at, reach
from loralign.compare.failures import standing
from loralign.compare.report import Finished, collect
from loralign.compare.spec import Arm, Spec
from loralign.compare.store import Store
from loralign.config.study import load_study
from loralign.methods.table import METHODS
from loralign.types import LoralignError, Recipe


@dataclass(frozen=True)
class Line:
    """One arm. step_ms: measured; whole_s: of its run; at_quickest: mean loss over seeds when the quickest arm ends;
    to_target_s: until its mean curve is at the reference's final loss, None: never; final: at its own end."""

    arm: str
    step_ms: float
    whole_s: float
    at_quickest: float
    to_target_s: float | None
    final: float


def table(
    curves: Sequence[Curve], kinds: Mapping[str, str], step_ms: Mapping[str, float], reference: str = "full"
) -> list[Line]:
    """Arms with sound runs and a measured step, the lowest loss at the common moment first; an arm without one is left
    out, and `missing` names it."""
    arms: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.sound and kinds.get(curve.arm) in step_ms:
            arms.setdefault(curve.arm, []).append(curve)
    if not arms:
        return []
    cost = {arm: step_ms[kinds[arm]] / 1e3 for arm in arms}
    mean = {arm: _mean(own) for arm, own in arms.items()}
    whole = {arm: cost[arm] * mean[arm][0][-1] for arm in arms}
    common = min(whole.values())
    target = mean[reference][1][-1] if reference in mean else None
    lines = []
    for arm, (steps, losses) in mean.items():
        at = reach(steps, losses, target) if target is not None else None
        needed = cost[arm] * at.value if at and at.reached else None
        here = loss_at(steps, losses, common / cost[arm])
        lines.append(Line(arm, 1e3 * cost[arm], whole[arm], here, needed, losses[-1]))
    return sorted(lines, key=lambda line: line.at_quickest)


def _mean(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Charged steps and the mean loss over seeds at them."""
    own = [c.charged_steps for c in curves]
    steps = [float(x) for x in own[0]]
    return steps, [fmean(loss_at(x, c.losses, s) for x, c in zip(own, curves, strict=True)) for s in steps]


def missing(arms: Sequence[str], kinds: Mapping[str, str], step_ms: Mapping[str, float]) -> list[str]:
    """Arms whose step was not measured."""
    return [f"{arm} ({kinds.get(arm, 'no kind')})" for arm in arms if kinds.get(arm) not in step_ms]


def kind_of(arm: Arm) -> str:
    """What bench_step calls an arm: full fine-tuning's id alone, else METHOD:RANK and the preset it amounts to."""
    if not isinstance(arm.recipe, Recipe):
        return arm.recipe.name
    name = arm.recipe.name
    given = dict(arm.given.get("options", {}))
    presets = METHODS[name].presets.items() if name in METHODS else ()
    found = next((preset for preset, options in presets if given and options == given), "")
    return ":".join([name, str(arm.recipe.r), *([found] if found else [])])


def step_times(measured: Mapping[str, Any], shape: str) -> dict[str, float]:
    """Milliseconds by kind, from bench_step's json."""
    if shape not in measured["results"]:
        raise SystemExit(f"no shape {shape!r} was measured, only {', '.join(measured['results'])}")
    return {kind: row["ms"] for kind, row in measured["results"][shape].items()}


def markdown(lines: Sequence[Line], reference: str = "full") -> list[str]:
    """A table; seconds as shares of the reference's whole run, where it was measured, else in seconds."""
    unit = next((line.whole_s for line in lines if line.arm == reference), math.nan)

    def share(seconds: float | None) -> str:
        if seconds is None:
            return "never"
        return f"{seconds:.0f} s" if math.isnan(unit) else f"{100 * seconds / unit:.0f} %"

    head = [
        f"| arm | step, ms | whole run, of {reference}'s seconds | loss when the quickest ends | "
        f"to {reference}'s final loss | final loss |",
        "|---|---|---|---|---|---|",
    ]
    return head + [
        f"| {x.arm} | {x.step_ms:.0f} | {share(x.whole_s)} | {x.at_quickest:.4f} | {share(x.to_target_s)} "
        f"| {x.final:.4f} |"
        for x in lines
    ]


def finished(spec: Spec) -> tuple[Spec, Finished]:
    """A study without the arms that failed, and what its finished trials allow to say."""
    store = Store(spec)
    done = store.outcomes()
    spec, _ = standing(spec, done, store.failures())
    return spec, collect(spec, done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kind", action="append", default=[], metavar="ARM=KIND")
    args = parser.parse_args()
    measured = step_times(json.loads(args.steps.read_text(encoding="utf-8")), args.shape)
    try:
        specs = load_study(args.study, args.set, reading=True)
    except LoralignError as error:
        raise SystemExit(str(error)) from error
    for spec, found in map(finished, specs):
        kinds = {arm.name: kind_of(arm) for arm in spec.arms} | dict(text.rsplit("=", 1) for text in args.kind)
        print("\n".join(markdown(table(found.curves, kinds, measured))))
        if left := missing([arm.name for arm in spec.arms], kinds, measured):
            print(f"\nNo step was measured for {', '.join(left)}.")


if __name__ == "__main__":
    main()
