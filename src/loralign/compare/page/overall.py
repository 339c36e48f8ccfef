"""What the page of several tasks says over all of them: a paragraph, a figure, a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loralign.compare.hierarchy import Overall
from loralign.compare.numbers import between, signed
from loralign.compare.page.build import Shown, arms_of, both, chips, marked, section
from loralign.compare.page.charts import NARROW, WIDE, Arms
from loralign.compare.page.effects import overall_chart
from loralign.compare.page.svg import minus, tag
from loralign.compare.page.tables import EMPTY, Cell, sortable
from loralign.compare.spec import BASELINE
from loralign.compare.summary import over_tasks_in_plain_words
from loralign.compare.tables import budgets


def overall_section(lines: Sequence[Overall], studies: Sequence[Shown]) -> str:
    """The first part of the page, before the tasks'."""
    arms = arms_of(studies)
    verdict = tag("p", marked(over_tasks_in_plain_words(lines, len(studies))), class_="verdict")
    tasks = [tag("a", escape(s.spec.task_name), href=f"#task-{i}") for i, s in enumerate(studies)]
    parts = [verdict, tag("p", "Tasks: " + ", ".join(tasks), class_="tasks")]
    if lines:
        notes = [note for s in studies for note in s.result.notes]
        ordered = sorted(lines, key=lambda o: sum(o.differences.values()) / len(o.differences))
        how = (
            f"Final test loss less <code>{BASELINE}</code>’s. A ring for every task; the bar and the figures: the "
            "effect over all tasks, shrunken towards the other arms’, 95 %; none for the control."
        )
        charts = (overall_chart(ordered, arms, room) for room in (WIDE, NARROW))
        parts += [chips(arms, [o.arm for o in ordered]), section("Over all tasks", how, both(*charts))]
        parts.append(section("Differences by task", f"A head sorts{budgets(notes)}.", _table(lines, arms)))
    return tag("div", *parts, data_study="all")


def _table(lines: Sequence[Overall], arms: Arms) -> str:
    tasks = list(dict.fromkeys(task for o in lines for task in o.differences))
    rows: list[list[Cell]] = []
    for o in lines:
        e = o.effect
        over = (minus(between(-e.mean, -e.high, -e.low)), -e.mean) if e else EMPTY
        by_task = [
            (minus(signed(o.differences[t], 4)), o.differences[t]) if t in o.differences else EMPTY for t in tasks
        ]
        rows.append([o.arm, *by_task, over, (f"{e.better:.2f}", e.better) if e else EMPTY])
    heads = ("arm", *tasks, "over all, shrunken", "P(better)")
    return sortable(heads, rows, arms=[arms.names.index(o.arm) for o in lines], by=1)
