"""The verdict of a study in one paragraph of plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from loralign.compare.hierarchy import Effect, Overall
from loralign.compare.numbers import bounded, loss
from loralign.compare.spec import BASELINE, REFERENCE
from loralign.compare.verdict import LEVEL, ArmResult, StudyResult, amount

NAMED = 4
"""Of more arms than this the rest are counted."""
PACES = ("sooner", "later")
LIKELY = 0.95
"""From this probability on an arm that is not proven better is named."""


def in_plain_words(result: StudyResult) -> str:
    """What the study could see, what came out better and worse, what nobody can tell, and what to distrust."""
    by_name = {arm.arm: arm for arm in result.arms}
    base, control = by_name.get(BASELINE), by_name.get(REFERENCE)
    if base is None or not base.final.n:
        return _without_baseline(result, base)
    others = sorted((a for a in result.arms if a not in (base, control)), key=lambda a: a.final.mean)
    better, ties = ([a for a in others if a.kind in kinds] for kinds in (("better",), ("no difference", *PACES)))
    ends = ""
    if control and control.comparison and control.comparison.final_sign > 0:
        ends = f": plain `{BASELINE}` is as good {'as they are' if better else 'here'}"
    parts = [
        _about_control(control),
        _about_better(better),
        _about_ties(ties, len(others), ends),
        _about("worse", "ends higher than `lora`", "end higher than `lora`", others),
        _about("unstable", "diverged on some seed", "diverged on some seed", others),
        _about("untested", "has too few runs to be tested", "have too few runs to be tested", others),
        _about_failed(list(result.failed)),
        _about_flags(result.arms),
    ]
    return " ".join(part for part in parts if part)


def _without_baseline(result: StudyResult, base: ArmResult | None) -> str:
    """Why nothing is compared: the baseline has no result, not yet or not at all."""
    told = [note for note in result.notes if note.startswith(("the search", "the seeds", f"no finished `{BASELINE}`"))]
    lost = f"`{BASELINE}`: {base.sentence}." if base is not None and not any("unfinished" in n for n in told) else ""
    first = f"{told[0][:1].upper()}{told[0][1:]}." if told else "Nothing is finished yet."
    return " ".join(part for part in (first, lost, _about_failed(list(result.failed))) if part)


def over_tasks_in_plain_words(lines: Sequence[Overall], tasks: int) -> str:
    """What all tasks together say of every arm beside the baseline."""
    if not lines:
        return f"Fewer than two of the {tasks} tasks have results of `{BASELINE}`: nothing is said over all yet."
    told = {line.arm: line.effect for line in lines if line.effect}
    better = sorted((a for a, e in told.items() if e.better >= LIKELY), key=lambda a: -told[a].mean)
    worse = [a for a, e in told.items() if e.better <= 1 - LIKELY]
    rest = [a for a in told if a not in (*better, *worse)]
    said = []
    if control := next((line for line in lines if line.arm == REFERENCE), None):
        lower = sum(v < 0 for v in control.differences.values())
        said.append(f"Full fine-tuning ends below plain `{BASELINE}` on {lower} of {len(control.differences)} tasks.")
    if better:
        e, isare = told[better[0]], "is" if len(better) == 1 else "are"
        most = f", `{better[0]}` the most: by" if len(better) > 1 else ", by"
        said.append(
            f"Over all tasks {_listed(better)} {isare} probably better than `{BASELINE}` "
            f"(P ≥ {_least([told[a] for a in better])}){most} {bounded(e.mean, e.low, e.high, '95 %')}, shrunken "
            "towards the other arms."
        )
    if worse:
        said.append(f"{_listed(worse)} {'is' if len(worse) == 1 else 'are'} probably worse.")
    if rest:
        said.append(f"Of {_listed(rest)} nobody can tell.")
    return " ".join(said)


def _least(effects: Sequence[Effect]) -> str:
    """The lowest probability of being better, rounded down, never to certainty."""
    return f"{min(99, math.floor(100 * min(e.better for e in effects))) / 100:.2f}"


def _about_control(control: ArmResult | None) -> str:
    if control is None or control.comparison is None:
        return "Without a finished `full` arm nothing shows whether this study could see a difference at all."
    c = control.comparison
    if c.final_sign > 0:
        return f"Full fine-tuning ends {_by(control)} below plain `lora`, so the study can see a gap of that size."
    return (
        "Full fine-tuning, the control, is not found better than plain `lora` here, so where the others tie with it "
        "that says little."
    )


def _about_better(better: Sequence[ArmResult]) -> str:
    if not better:
        return ""
    first = better[0]
    said = (
        f"`{first.arm}` ends lowest of the arms that beat `lora`: {loss(first.final.mean, 3)}, better by {_by(first)}"
    )
    if first.gap.value is not None:
        closed = f"{first.gap.value:.0%}".replace("%", " %")
        said += f", which is {closed} of the gap to full fine-tuning"
    if rest := better[1:]:
        said += f"; {_names(rest)} {'does' if len(rest) == 1 else 'do'} better than `lora`, too"
    return said + "."


def _about_ties(ties: Sequence[ArmResult], others: int, ends: str) -> str:
    """ends: of the sentence, where the study could see a difference and no arm is probably better."""
    if not ties:
        return ""
    halves = [(t.comparison.final.high - t.comparison.final.low) / 2 for t in ties if t.comparison]
    seen = f"differences below about {median(halves):.2g} would not have been seen"
    who = f"the {others} other arms" if len(ties) == others > 1 else _names(ties)
    said = f"No difference from plain `lora` is found for {who}, {seen}"
    likely = [t for t in ties if t.effect and t.effect.better >= LIKELY]
    if likely:
        least = _least([t.effect for t in likely if t.effect])
        isare = "is" if len(likely) == 1 else "are"
        said += f"; {_names(likely)} {isare} probably better all the same (P ≥ {least})."
    else:
        said += f"{ends}."
    for word in PACES:
        if timed := [t for t in ties if t.kind == word]:
            said += f" {_names(timed)} {'gets' if len(timed) == 1 else 'get'} to the same loss {word}."
    return said


def _about(kind: str, one: str, many: str, arms: Sequence[ArmResult]) -> str:
    own = [a for a in arms if a.kind == kind]
    return f"{_names(own)} {one if len(own) == 1 else many}." if own else ""


def _about_failed(failed: Sequence[str]) -> str:
    return f"{_listed(failed)} failed and {'is' if len(failed) == 1 else 'are'} left out." if failed else ""


def _about_flags(arms: Sequence[ArmResult]) -> str:
    edges = [a for a in arms if any("edge" in flag for flag in a.flags)]
    if not edges:
        return ""
    return f"The best rate of {_names(edges)} lies at an edge of what was searched: a better one may lie outside."


def _by(arm: ArmResult) -> str:
    assert arm.comparison is not None
    by, bounds = amount(arm.comparison)
    return f"{by} ({LEVEL} interval {bounds})"


def _names(arms: Sequence[ArmResult]) -> str:
    """`a`, `b` and `c`, or a count where they are many."""
    return _listed([a.arm for a in arms])


def _listed(arms: Sequence[str]) -> str:
    if len(arms) > NAMED:
        return f"{len(arms)} arms"
    names = [f"`{arm}`" for arm in arms]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
