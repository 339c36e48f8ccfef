"""How far arms end from the baseline: one row each, on one task with its interval or over several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loralign.compare.curves import Interval
from loralign.compare.figures import fitted, width
from loralign.compare.hierarchy import Overall
from loralign.compare.numbers import between, signed
from loralign.compare.page.charts import SMALL_PRINT, Arms, Room
from loralign.compare.page.svg import Scale, figure, line, minus, tag, text, ticks
from loralign.compare.spec import BASELINE

TOP, NAMES = 26.0, 192.0
"""Where the first row begins; pixels for the names beside it."""


@dataclass(frozen=True)
class Difference:
    """An arm's final loss less the baseline's. tested: the interval of the whole family; shrunken: mean, low, high."""

    arm: str
    tested: Interval
    shrunken: tuple[float, float, float] | None
    better: float | None
    verdict: str


def effects_chart(found: Sequence[Difference], arms: Arms, room: Room) -> str:
    """One row per arm: the difference with its interval, below it the shrunken one as a bar."""
    ends = [v for d in found for v in (d.tested.low, d.tested.high, d.tested.mean)]
    figures = [minus(between(d.tested.mean, d.tested.low, d.tested.high)) for d in found]
    x, step = _scale(ends, figures, room), _step(room)
    rows = [
        _row(d, f, arms, x, TOP + step * i, step, room) for i, (d, f) in enumerate(zip(found, figures, strict=True))
    ]
    return _framed(x, rows, room, "Final loss against the baseline, with intervals")


def overall_chart(found: Sequence[Overall], arms: Arms, room: Room) -> str:
    """One row per arm: a ring for the difference on each task, below them the shrunken effect over all as a bar."""
    ends = [v for o in found for v in o.differences.values()]
    ends += [v for o in found if o.effect for v in (-o.effect.low, -o.effect.high)]
    figures = [minus(between(-e.mean, -e.high, -e.low)) if (e := o.effect) else "" for o in found]
    x, step = _scale(ends, figures, room), _step(room)
    lines = enumerate(zip(found, figures, strict=True))
    rows = [_over_tasks(o, f, arms, x, TOP + step * i, step, room) for i, (o, f) in lines]
    return _framed(x, rows, room, "Final loss against the baseline, on every task and over all")


def _step(room: Room) -> float:
    return 40.0 if room.narrow else 28.0


def _scale(values: Sequence[float], figures: Sequence[str], room: Room) -> Scale:
    """Of differences, between the names and the figures beside the drawing."""
    most = max((width(f, SMALL_PRINT) for f in figures), default=0.0)
    left, right = (8.0, 8.0) if room.narrow else (NAMES + 8, max(162.0, most) + 8)
    ends = [v for v in values if abs(v) < float("inf")]
    low, high = min(0.0, *ends), max(0.0, *ends)
    return Scale(low - 0.04 * (high - low), high + 0.04 * (high - low), left, room.width - right)


def _framed(x: Scale, rows: Sequence[str], room: Room, title: str) -> str:
    """Rows between an axis of differences and the line of the baseline."""
    bottom, marks = TOP + _step(room) * len(rows), ticks(x.low, x.high, 3 if room.narrow else 6)
    back = [line(x(v), TOP - 4, x(v), bottom, class_="grid") for v in marks]
    back += [text(x(v), bottom + 16, minus(f"{v:+g}") if v else "0", class_="tick m") for v in marks]
    back += [line(x(0), TOP - 4, x(0), bottom, class_="zero"), text(x(0), TOP - 10, BASELINE, class_="name m strong")]
    if x(0) - x.start > 40:
        back.append(text(x.start, bottom + 31, "← lower loss, better", class_="name"))
    if x.end - x(0) > 40:
        back.append(text(x.end, bottom + 31, "worse →", class_="name r"))
    return figure(room.width, bottom + 34, *back, *rows, title=title)


def _head(arm: str, figures: str, top: float, at: float, room: Room) -> list[str]:
    """The arm's name and its figures: beside the drawing, on a narrow screen above it."""
    if room.narrow:
        free = room.width - width(figures, SMALL_PRINT) - 8
        return [
            text(0, top + 14, fitted(arm, free), class_="label over"),
            text(room.width, top + 14, figures, class_="tick r over"),
        ]
    return [text(0, at + 4, fitted(arm, NAMES), class_="label"), text(room.width, at + 4, figures, class_="tick r")]


def _bar(x: Scale, at: float, shrunken: tuple[float, float, float]) -> list[str]:
    mean, low, high = shrunken
    bar = tag("rect", x=x(low), y=at - 5, width=max(1.0, x(high) - x(low)), height=10, rx=5, class_="shrunken")
    return [bar, line(x(mean), at - 5, x(mean), at + 5, class_="middle")]


def _over_tasks(o: Overall, figures: str, arms: Arms, x: Scale, top: float, step: float, room: Room) -> str:
    at, e = top + (step - 11 if room.narrow else step / 2), o.effect
    shrunken = (-e.mean, -e.high, -e.low) if e else None
    parts = [tag("rect", x=0, y=top, width=room.width, height=step, class_="row")]
    parts += _bar(x, at, shrunken) if shrunken else []
    parts += [tag("circle", cx=x(v), cy=at, r=4.2, class_="ring") for v in o.differences.values()]
    tip = "\n".join([o.arm, *(f"{task} {minus(signed(v))}" for task, v in o.differences.items())])
    if e:
        tip += f"\nover all, shrunken {figures}\nP(better) {e.better:.2f}"
    return arms.mark(o.arm, *parts, *_head(o.arm, figures, top, at, room), data_tip=tip)


def _row(d: Difference, figures: str, arms: Arms, x: Scale, top: float, step: float, room: Room) -> str:
    t, at = d.tested, top + (step - 11 if room.narrow else step / 2)
    ends = max(t.low, x.low), min(t.high, x.high)
    parts = [tag("rect", x=0, y=top, width=room.width, height=step, class_="row")]
    parts += _bar(x, at, d.shrunken) if d.shrunken else []
    parts.append(line(x(ends[0]), at, x(ends[1]), at, class_="whisker"))
    parts.append(tag("circle", cx=x(t.mean), cy=at, r=4.2, class_="dot"))
    parts += _head(d.arm, figures, top, at, room)
    tip = f"{d.arm}: {d.verdict}\n{figures}"
    if d.shrunken:
        tip += f"\nshrunken {minus(between(*d.shrunken))}"
    if d.better is not None:
        tip += f"\nP(better) {d.better:.2f}"
    return arms.mark(d.arm, *parts, data_tip=tip)
