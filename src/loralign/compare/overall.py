"""Several tasks of one study: every arm's effect over all of them, its difference on each, and one page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from loralign.compare.hierarchy import Overall, effects
from loralign.compare.inference import moderated
from loralign.compare.numbers import between, signed
from loralign.compare.page.build import Shown, page
from loralign.compare.page.overall import overall_section
from loralign.compare.spec import BASELINE, REFERENCE
from loralign.compare.statistics import samples, stable
from loralign.compare.tables import budgets, titled
from loralign.io.provenance import write_json, write_text


def over_tasks(shown: Sequence[Shown]) -> list[Overall]:
    """Written to overall.csv and overall.json beside the tasks' folders; empty for fewer than two tasks with seeds."""
    tasks = {}
    for one in shown:
        arms = {arm.name: [c for c in one.curves if c.arm == arm.name] for arm in one.spec.arms}
        raw = samples(stable(arms, BASELINE), one.rates)
        if BASELINE in raw and len(raw) > 1:
            tasks[one.spec.task_name] = dict(zip(raw, moderated(list(raw.values())), strict=True))
    if len(tasks) < 2:
        return []
    shrunken = effects([{a: s for a, s in t.items() if a != REFERENCE} for t in tasks.values()], BASELINE)
    names = dict.fromkeys(a for t in tasks.values() for a in t if a != BASELINE)
    lines = [
        Overall(a, {n: t[a].mean - t[BASELINE].mean for n, t in tasks.items() if a in t}, shrunken.get(a))
        for a in names
    ]
    folder = shown[0].spec.output.parent
    write_text(folder / "overall.csv", _csv(lines, list(tasks)))
    write_json(folder / "overall.json", {line.arm: _body(line) for line in lines})
    return lines


def report_tasks(shown: Sequence[Shown]) -> list[Overall]:
    """What `over_tasks` writes, and report.html over all of them, a section for each task."""
    lines = over_tasks(shown)
    write_text(shown[0].spec.output.parent / "report.html", page(shown, overall_section(lines, shown)))
    return lines


def _body(line: Overall) -> dict[str, object]:
    e = line.effect
    return {"differences": dict(line.differences), "effect": e and [e.mean, e.low, e.high], "better": e and e.better}


def _csv(lines: Sequence[Overall], tasks: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", *tasks, "shrunken", "shrunken_low", "shrunken_high", "p_better"])
    for line in lines:
        e = line.effect
        shrunken = (e.mean, e.low, e.high, e.better) if e else ("",) * 4
        writer.writerow([line.arm, *(line.differences.get(t) for t in tasks), *shrunken])
    return text.getvalue()


def overall_table(lines: Sequence[Overall], shown: Sequence[Shown]) -> Table:
    tasks = list(dict.fromkeys(t for line in lines for t in line.differences))
    title = "Over all tasks: final loss against lora's" + budgets(n for s in shown for n in s.result.notes)
    made = titled(title)
    for head in ("arm", *tasks, "shrunken, 95 %", "P(better)"):
        made.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
    for line in lines:
        cells = [signed(line.differences[t], 4) if t in line.differences else "–" for t in tasks]
        e = line.effect
        shrunken = between(-e.mean, -e.high, -e.low, 4) if e else "–"
        made.add_row(Text(line.arm), *cells, shrunken, f"{e.better:.2f}" if e else "–")
    return made
