"""What the study of three tasks says: the declared contrasts, the bars beside full fine-tuning, equal GPU seconds.

Contrasts were declared before any trial on answers and BBC (German's results were known): `spectral` r 64 against tuned
AdamW full fine-tuning, and against AdamW on the same factors at the same scale. A contrast is a difference of mean
final losses on test rows, each arm with its own variance and the choice of its rate counted
(loralign.compare.inference); Holm over all contrasts of all tasks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralign.compare.inference import Difference, Sample, against_baseline, holm, moderated
from loralign.compare.report import Finished, plain
from loralign.compare.spec import Spec
from loralign.compare.statistics import gap_closed, samples
from loralign.config.study import load_study

sys.path.insert(0, str(Path(__file__).parent))
import equal_seconds

ROOT = Path(__file__).parent.parent
TASKS = ("german", "answers", "bbc")
FULL = ("full", "full-muon")
CONTRASTS = (("spectral r64", "full"), ("spectral r64", "lora r64 (s 8)"))
FURTHER = tuple(
    (f"spectral {arm}", other) for arm in ("r128", "r64 stateless", "r32") for other in ("full", "spectral r64")
)
"""Not declared beforehand: a family of their own, and only arms of SEEDS seeds or more."""
SEEDS = 3
LEVEL = 0.05


@dataclass(frozen=True)
class Contrast:
    """Loss of `arm` minus loss of `other`: negative, the arm ends lower. low, high: 1 − LEVEL, all contrasts together
    (Bonferroni); p: Holm's over all contrasts of all tasks."""

    task: str
    arm: str
    other: str
    mean: float
    low: float
    high: float
    p: float

    @property
    def said(self) -> str:
        return "lower" if self.p < LEVEL and self.mean < 0 else "higher" if self.p < LEVEL else "not told apart"


def contrasts(
    tasks: Mapping[str, Mapping[str, Sample]], pairs: Sequence[tuple[str, str]] = CONTRASTS
) -> list[Contrast]:
    """Every declared pair on every task that has both arms; a task that has none yet still counts as a test."""
    total = len(pairs) * max(len(tasks), len(TASKS))
    rows = []
    for task, arms in tasks.items():
        for arm, other in pairs:
            if arm in arms and other in arms:
                (d,) = against_baseline([arms[arm]], arms[other], LEVEL / total)
                rows.append((task, arm, other, d))
    p = holm([*(d.p for *_, d in rows), *[1.0] * (total - len(rows))])
    return [Contrast(t, a, o, -d.mean, -d.high, -d.low, q) for (t, a, o, d), q in zip(rows, p, strict=False)]


def bars(arms: Mapping[str, Sample]) -> list[tuple[str, str, float]]:
    """Every adapter's mean loss minus that of AdamW's full fine-tuning and of the best one of any optimizer."""
    references = {name: arms[name].mean for name in FULL if name in arms}
    if not references:
        return []
    best = min(references, key=references.__getitem__)
    against = dict.fromkeys([*(n for n in FULL[:1] if n in references), best])
    return [(a, o, arms[a].mean - references[o]) for a in arms if a not in FULL for o in against]


MARGIN = 0.02
"""How far above full fine-tuning a recommended recipe may end at most, by its whole interval."""


@dataclass(frozen=True)
class Judged:
    """A frozen rule of scripts/studies/judge.yaml or judge_repeats.yaml: what is recommended ends below `lora` (p)
    and, by the 95 % interval of its difference, less than MARGIN above `full`."""

    arm: str
    below_lora: Difference
    to_full: Difference

    @property
    def stands(self) -> bool:
        return self.below_lora.p < LEVEL / 2 and self.below_lora.mean > 0 and -self.to_full.low < MARGIN

    @property
    def said(self) -> str:
        d, f = self.below_lora, self.to_full
        return (
            f"{self.arm}: {-d.mean:+.4f} against `lora` (p {d.p:.1g} in its family), {-f.mean:+.4f} "
            f"(95 % {-f.high:+.4f} … {-f.low:+.4f}) against `full`: the rule {'stands' if self.stands else 'falls'}"
        )


def judge(arms: Mapping[str, Sample], arm: str = "spectral r64") -> Judged:
    """arms: `lora`, `full` and all others, which are one family with `lora` as its baseline."""
    family = [name for name in arms if name not in ("lora", *FULL)]
    tested = dict(zip(family, against_baseline([arms[n] for n in family], arms["lora"], LEVEL / 2), strict=True))
    (to_full,) = against_baseline([arms[arm]], arms["full"], LEVEL)
    return Judged(arm, tested[arm], to_full)


# ---------------------------------------------------------------------------------------------------------------- files


def widest(out: Path, task: str) -> tuple[Spec, Finished] | None:
    """All arms but those that failed, the primary ones where the others' search is unfinished; None: nothing is
    reported."""
    for stage in ("all", "primary"):
        file = out / f"{task}-{stage}.yaml"
        if file.is_file() and (out / task / "study.journal").is_file():
            (spec,) = load_study(file, [f"output={out / task}"], reading=True)
            spec, found = equal_seconds.finished(spec)
            if found.curves:
                return spec, found
    return None


def _quiet(spec: Spec, found: Finished) -> dict[str, Sample]:
    raw = samples({a.name: [c for c in found.curves if c.arm == a.name] for a in spec.arms}, found.rates)
    return dict(zip(raw, moderated(list(raw.values())), strict=True))


RULES = {"once": ("judge.yaml", "spectral r64"), "repeat": ("judge_repeats.yaml", "lora r64 (s 8)")}
"""How often rows are gone through: the study that judges the rule for them, and its arm."""


def judged(rows: str, out: Path) -> Judged:
    """One of RULES; its study's journal is in `out`."""
    file, arm = RULES[rows]
    (spec,) = load_study(ROOT / "scripts/studies" / file, [f"output={out}"], reading=True)
    return judge(_quiet(*equal_seconds.finished(spec)), arm)


def write(out: Path, steps: Path | None = None, shape: str = "8b") -> None:
    """prize.md and prize.json beside the tasks' folders, and said."""
    studies = {task: study for task in TASKS if (study := widest(out, task))}
    quiet = {task: _quiet(*study) for task, study in studies.items()}
    text = ["# Declared contrasts and bars", ""]
    body: dict[str, Any] = {}
    told = contrasts(quiet)
    text += _contrast_table(told)
    whole = {task: {name: s for name, s in arms.items() if s.n >= SEEDS} for task, arms in quiet.items()}
    further = contrasts(whole, FURTHER)
    if further:
        text += ["", "## Not declared beforehand", "", *_contrast_table(further)]
    for task, arms in quiet.items():
        text += ["", f"## {task}", "", *_arm_table(arms)]
        body[task] = {"arms": {n: asdict(s) for n, s in arms.items()}, "bars": bars(arms)}
        if steps:
            measured = equal_seconds.step_times(json.loads(steps.read_text(encoding="utf-8")), shape)
            kinds = {arm.name: equal_seconds.kind_of(arm) for arm in studies[task][0].arms}
            seconds = equal_seconds.table(studies[task][1].curves, kinds, measured)
            text += ["", *equal_seconds.markdown(seconds)]
            body[task]["seconds"] = [asdict(line) for line in seconds]
    (out / "prize.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    data = {"contrasts": [asdict(c) for c in told], "further": [asdict(c) for c in further], "tasks": body}
    (out / "prize.json").write_text(json.dumps(plain(data), indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


def _contrast_table(told: Sequence[Contrast]) -> list[str]:
    head = ["| task | arm | against | loss difference (95 % together) | p, Holm | |", "|---|---|---|---|---|---|"]
    lines = [
        f"| {c.task} | {c.arm} | {c.other} | {c.mean:+.4f} ({c.low:+.4f} … {c.high:+.4f}) | {c.p:.4f} | {c.said} |"
        for c in told
    ]
    return [*head, *lines] if lines else ["No pair of arms has its seeds yet."]


def _arm_table(arms: Mapping[str, Sample]) -> list[str]:
    head = [
        "| arm | test loss | seeds | − full (AdamW) | − best full | gap to full closed |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[str, dict[str, float]] = {}
    for arm, other, difference in bars(arms):
        found.setdefault(arm, {})[other] = difference
    best = min((n for n in FULL if n in arms), key=lambda n: arms[n].mean, default="")
    lines = []
    for name, s in sorted(arms.items(), key=lambda item: item[1].mean):
        own = found.get(name, {})
        cells = [f"{own[o]:+.4f}" if o in own else "" for o in ("full", best)]
        gap = gap_closed(s, arms.get("lora"), arms.get("full"))
        closed = "" if gap.value is None else f"{100 * gap.value:.0f} %"
        closed += (
            f" ({100 * gap.low:.0f} … {100 * gap.high:.0f})" if gap.low is not None and gap.high is not None else ""
        )
        lines.append(f"| {name} | {s.mean:.4f} | {s.n} | {cells[0]} | {cells[1]} | {closed} |")
    return [*head, *lines]
