"""Tables and sentences of a study's result: for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from loralign.compare.numbers import between, spread
from loralign.compare.verdict import FIXED, LEVEL, ArmResult, StudyResult

COSTS = ("arm", "parameters", "exported rank", "slots", "peak memory", "init", "step")


def reached(time: Any) -> str:
    """A time, or "> bound" where it was not reached."""
    if time is None:
        return ""
    return f"{time.value:.1f}" if time.reached else f"> {time.value:.1f}"


def terminal_tables(result: StudyResult) -> list[Table]:
    """What people read first: results, then costs; columns in which no arm has anything are left out."""
    metrics = list(dict.fromkeys(name for arm in result.arms for name in arm.metrics))
    full = "to full's" if any(arm.steps_to.get("lora") for arm in result.arms) else "steps to full's"
    heads = ("arm", "lr", "final loss", *metrics, "shrunken", "P(better)", "gap closed", "steps to lora's", full)
    results = [_results(arm, metrics) for arm in result.arms]
    costs = [_costs(arm) for arm in result.arms]
    title = "Loss on test rows at each arm's own best rate; ± 95 % over seeds"
    return [
        _table(title + budgets(result.notes), heads, results),
        _table("Costs", COSTS, costs),
    ]


def budgets(notes: Iterable[str]) -> str:
    """What a table's title adds where what starts read was not paid for by training fewer steps."""
    said = (n.split(":")[0].split(";")[0] for n in notes if n.startswith(("same steps", "the starts")))
    return next((f"; {how}" for how in said), "")


def _table(title: str, heads: Sequence[str], lines: Sequence[tuple[str, ...]]) -> Table:
    made = titled(title)
    shown = [i for i in range(len(heads)) if any(line[i] not in ("", "–") for line in lines)]
    for i in shown:
        made.add_column(heads[i], justify="right" if i else "left", no_wrap=True)
    for line in lines:
        made.add_row(*(Text(line[i]) for i in shown))  # no markup: an arm may be called [a]
    return made


def titled(title: str) -> Table:
    """A table without columns yet; none so narrow that its title would be broken into words."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))


def _results(arm: ArmResult, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{arm.lr:g}" if arm.lr else "–",
        spread(arm.final),
        *(spread(arm.metrics[name], 3) if name in arm.metrics else "–" for name in metrics),
        between(-arm.effect.mean, -arm.effect.high, -arm.effect.low) if arm.effect else "–",
        f"{arm.effect.better:.2f}" if arm.effect else "–",
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
        slots(arm) or "–",
        f"{costs['peak_bytes'] / 2**30:.1f} GiB" if costs.get("peak_bytes") else "–",
        f"{costs['init_s']:.1f} s" if costs else "–",
        f"{1000 * costs['step_s']:.0f} ms" if costs else "–",
    )


def slots(arm: ArmResult) -> str:
    """Those before the first step and at the end, where a rule decides about them."""
    return str(arm.ranks) if arm.ranks is not None and arm.ranks.begun is not None else ""


def _count(n: float) -> str:
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n / 1e3:.1f} k"


def sentences(result: StudyResult) -> list[str]:
    """One plain sentence per arm, its flags, then notes about the whole."""
    said = []
    for arm in result.arms:
        said += [f"{arm.arm}: {arm.sentence}", *(f"  ! {flag}" for flag in arm.flags)]
    return [*said, *(f"note: {note}" for note in result.notes)]


def as_markdown(result: StudyResult) -> str:
    """The table of results.md, from the lowest final loss to the highest, and what must be said of it."""
    ruled = any(slots(arm) for arm in result.arms)
    heads = ("arm", "family", "rate", "steps", *(["slots"] if ruled else []), "test loss, ± 95 %")
    heads = (*heads, "gap to `full` closed", "shrunken, 95 %", "P(better)", "against `lora`")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in sorted(result.arms, key=lambda a: (a.final.n == 0, a.final.mean)):
        gap, e = arm.gap, arm.effect
        closed = "–" if gap.value is None else f"{gap.value:.0%}"
        if gap.low is not None and gap.high is not None and gap.low < gap.high:
            closed += f" ({gap.low:.0%} … {gap.high:.0%})"
        shrunken = between(-e.mean, -e.high, -e.low) if e else "–"
        paid = f" + {arm.charged_steps:.0f}" if arm.charged_steps else ""
        cells = (
            _escaped(arm.arm), arm.family if arm.kind != "baseline" else "baseline", f"{arm.lr:g}" if arm.lr else "–",
            f"{arm.steps}{paid}", *([slots(arm) or "–"] if ruled else []), spread(arm.final), closed, shrunken,
            f"{e.better:.2f}" if e else "–", arm.sentence,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Intervals of differences: {LEVEL} for a whole family together. {FIXED} "
        "Steps: trained + charged for what the start read."
        + (" Slots: of all modules before the first step → at the end, mean over seeds." if ruled else ""),
    ]
    lines += [f"- {_escaped(arm.arm)}: {flag}" for arm in result.arms for flag in arm.flags]
    return "\n".join([*lines, *(f"- note: {note}" for note in result.notes)]) + "\n"


def _escaped(name: str) -> str:
    """A name as Markdown reads it literally, in a cell of a table, too."""
    return re.sub(r"([\\|<`*])", r"\\\1", name)
