"""Tables of the page whose columns sort: every cell as it reads and as it is ordered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from loralign.compare.curves import Interval, Reach
from loralign.compare.numbers import between, loss, spread
from loralign.compare.page.svg import Number, minus, short, tag
from loralign.compare.spec import Outcome, key_parts
from loralign.compare.tables import slots
from loralign.compare.verdict import ArmResult, StudyResult

Cell = tuple[str, Number | None] | str
"""What it says and what it is ordered by; text alone is ordered as text."""
EMPTY: Cell = ("–", None)


def sortable(heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, arms: Sequence[int | None], by: int = 0) -> str:
    """A table ordered by column `by`; arms: the number of every row's arm, whose colour stands in its first cell.
    Columns in which no row has anything are left out."""
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] not in (EMPTY, "") for row in rows)]
    lines = sorted(zip(rows, arms, strict=True), key=lambda line: _order(line[0][by]))
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(heads))]
    head = "".join(
        tag("th", tag("button", escape(heads[i]), type="button"), scope="col", class_="t" if left[i] else None,
            aria_sort="ascending" if i == by else None)
        for i in kept
    )  # fmt: skip
    body = "".join(_line([(row[i], left[i]) for i in kept], arm) for row, arm in lines)
    return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", body)), class_="scroll", tabindex="0")


def _order(cell: Cell) -> tuple[int, float, str]:
    if isinstance(cell, str):
        return 0, 0.0, cell
    return (1, 0.0, "") if cell[1] is None else (0, float(cell[1]), "")


def _line(cells: Sequence[tuple[Cell, bool]], arm: int | None) -> str:
    made = []
    for i, (cell, left) in enumerate(cells):
        said, value = (cell, None) if isinstance(cell, str) else cell
        dot = "<i></i>" if i == 0 and arm is not None else ""
        order = None if isinstance(cell, str) else "" if value is None else repr(float(value))
        made.append(tag("td", dot, escape(said), class_="t" if left else None, data_v=order))
    return tag("tr", *made, data_arm=arm)


# ---------------------------------------------------------------------------------------------------------------- arms

ARM_HEADS = (
    "arm", "test loss", "against lora", "verdict", "shrunken", "P(better)", "gap closed", "rate", "steps", "seeds",
    "steps to lora’s", "steps to full’s", "seconds to lora’s", "seconds to full’s", "parameters", "rank", "slots",
    "peak memory", "start", "step", "family",
)  # fmt: skip


def arms_table(result: StudyResult, number: Callable[[str], int]) -> str:
    """One row per arm, the lowest final loss first."""
    metrics = list(dict.fromkeys(name for arm in result.arms for name in arm.metrics))
    heads = (*ARM_HEADS[:2], *metrics, *ARM_HEADS[2:])
    rows = [_arm_row(arm, metrics) for arm in result.arms]
    return sortable(heads, rows, arms=[number(arm.arm) for arm in result.arms], by=1)


def _arm_row(arm: ArmResult, metrics: Sequence[str]) -> list[Cell]:
    c, e, gap = arm.comparison, arm.effect, arm.gap
    paid = f" + {arm.charged_steps:.0f}" if arm.charged_steps else ""
    family = arm.family if arm.kind != "baseline" else "baseline"
    return [
        arm.arm,
        _spread(arm.final),
        *(_spread(arm.metrics[m], 3) if m in arm.metrics else EMPTY for m in metrics),
        _interval(-c.final.mean, -c.final.high, -c.final.low) if c else EMPTY,
        "–" if arm.kind == "baseline" else arm.kind,
        _interval(-e.mean, -e.high, -e.low) if e else EMPTY,
        (f"{e.better:.2f}", e.better) if e else EMPTY,
        (f"{100 * gap.value:.0f} %".replace("-", "−"), gap.value) if gap.value is not None else EMPTY,
        (short(arm.lr), arm.lr) if arm.lr else EMPTY,
        (f"{arm.steps}{paid}", arm.steps + arm.charged_steps),
        (str(arm.seeds) + (f", {arm.diverged} diverged" if arm.diverged else ""), arm.seeds),
        *(_reach(times.get(target)) for times in (arm.steps_to, arm.seconds_to) for target in ("lora", "full")),
        *_costs(arm),
        family,
    ]


def _costs(arm: ArmResult) -> list[Cell]:
    costs = arm.costs
    if not costs:
        return [EMPTY] * 6
    trainable, rank, peak = costs["trainable"], costs.get("exported_rank"), costs.get("peak_bytes")
    return [
        (f"{trainable / 1e6:.2f} M" if trainable >= 1e5 else f"{trainable / 1e3:.1f} k", trainable),
        (f"{rank:.0f}", rank) if rank else EMPTY,
        (said, arm.ranks.ended) if arm.ranks and (said := slots(arm)) else EMPTY,
        (f"{peak / 2**30:.1f} GiB", peak) if peak else EMPTY,
        (f"{costs['init_s']:.1f} s", costs["init_s"]),
        (f"{1000 * costs['step_s']:.0f} ms", costs["step_s"]),
    ]


def _spread(x: Interval, least: int = 4) -> Cell:
    return (spread(x, least), x.mean) if x.n else EMPTY


def _interval(mean: float, low: float, high: float) -> Cell:
    return minus(between(mean, low, high)), mean


def _reach(time: Reach | None) -> Cell:
    if time is None:
        return EMPTY
    return f"{'' if time.reached else '> '}{time.value:.0f}", time.value


# -------------------------------------------------------------------------------------------------------------- trials

TRIAL_HEADS = ("arm", "of the", "rate", "seed", "steps", "last loss", "ended", "start’s tokens", "seconds")


def trials_table(trials: Mapping[str, Outcome], rates: Mapping[str, float], number: Callable[[str], int]) -> str:
    """Every finished trial; rates: by key."""
    rows, arms = [], []
    for key, o in trials.items():
        phase, arm, _, seed = key_parts(key)
        ended = o.note or ("diverged" if o.diverged else "given up" if o.pruned else "finished")
        lr, last = rates.get(key), o.losses[-1] if o.losses else None
        rows.append([
            arm, "search" if phase == "rate" else "result", (short(lr), lr) if lr else EMPTY, (str(seed), seed),
            (str(o.steps[-1]), o.steps[-1]) if o.steps else EMPTY, (loss(last), last) if last is not None else EMPTY,
            ended, (f"{o.init_tokens:,}", o.init_tokens) if o.init_tokens else EMPTY, (f"{o.total_s:.1f}", o.total_s),
        ])  # fmt: skip
        arms.append(number(arm))
    return sortable(TRIAL_HEADS, rows, arms=arms)
