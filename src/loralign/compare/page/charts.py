"""The figures of the page, drawn for a wide screen or a narrow one; an arm is `data-arm` and has its colour from there.

Curves are labelled where they end. Pointing at anything that belongs to an arm brings the arm forward in all figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loralign.compare.figures import Band, Look, best_rates, fitted, line_of, loss_limits, rate_limits, width
from loralign.compare.numbers import decimals, loss, number
from loralign.compare.page.svg import Scale, apart, figure, line, path, powers, short, tag, text, ticks, window
from loralign.compare.rates import Rate
from loralign.compare.spec import BASELINE, REFERENCE

DASHES = {"-": None, "--": "6 4", ":": "1.5 3.5", "-.": "7 3 1.5 3"}
SMALL_PRINT, BOLD = 11.5, 1.12
"""Pixels of a tick's label; how much wider bold letters are."""
MOST_LABELS = 7
"""On a narrow screen; of more arms than this only the baseline, the reference and the lowest are labelled there."""


@dataclass(frozen=True)
class Room:
    """The size of a figure; narrow: for a phone held upright."""

    width: float
    height: float
    left: float
    right: float
    narrow: bool = False


WIDE, NARROW = Room(880, 420, 52, 210), Room(358, 330, 36, 124, True)


@dataclass(frozen=True)
class Arms:
    """Names in the order of the study, and how each is drawn."""

    names: tuple[str, ...]
    look: Look

    def mark(self, arm: str, *inside: str, **more: str | float | None) -> str:
        """A group that belongs to an arm."""
        return tag("g", *inside, class_="arm", data_arm=self.names.index(arm), **more)

    def stroke(self, arm: str) -> dict[str, str | float | None]:
        return {
            "class_": "curve",
            "stroke_dasharray": DASHES[self.look[arm].dash],
            "stroke_width": 2.6 if arm == BASELINE else 1.9,
        }


# --------------------------------------------------------------------------------------------------------- loss curves


def loss_chart(found: Sequence[Band], arms: Arms, room: Room, *, unit: str) -> str:
    """Mean test loss over seeds against steps or seconds, with a band from the lowest seed to the highest."""
    top, bottom = 14.0, room.height - 38
    y = Scale(*loss_limits(found), bottom, top)
    x = Scale(0, max(b.x[-1] for b in found), room.left, room.width - room.right)
    drawn = [_curve(b, arms, x, y, unit) for b in reversed(found)]
    faint = f"--band:{min(0.14, 0.9 / len(found)):.3f}"
    inside = window(x.start, top, x.end - x.start, bottom - top, tag("g", *drawn, style=faint))
    axes, labels = _axes(x, y, "test loss", f"{unit}, start included"), _end_labels(found, arms, x, y, room)
    return figure(room.width, room.height, axes, inside, *labels, title=f"Test loss against {unit}")


def _axes(x: Scale, y: Scale, above: str, below: str) -> str:
    narrow = x.end - x.start < 300
    lines = []
    for v in ticks(y.low, y.high, 6):
        lines += [
            line(x.start, y(v), x.end, y(v), class_="grid"),
            text(x.start - 8, y(v) + 4, f"{v:g}", class_="tick r"),
        ]
    for v in ticks(x.low, x.high, 3 if narrow else 6):
        lines.append(text(x(v), y.start + 18, f"{v:g}", class_="tick m"))
    named = [text(x.start, y.end - 3, above, class_="name"), text(x.end, y.start + 34, below, class_="name r")]
    return tag("g", *lines, line(x.start, y.start, x.end, y.start, class_="axis"), *named, class_="axes")


def _curve(b: Band, arms: Arms, x: Scale, y: Scale, unit: str) -> str:
    mean = [(x(v), y(m)) for v, m in zip(b.x, b.mean, strict=True)]
    around = [(x(v), y(m)) for v, m in zip(b.x, b.high, strict=True)]
    around += [(x(v), y(m)) for v, m in reversed(list(zip(b.x, b.low, strict=True)))]
    points = [
        tag("circle", cx=px, cy=py, r=7, class_="hit", data_tip=_point(b, i, unit)) for i, (px, py) in enumerate(mean)
    ]
    band = tag("path", d=path(around, closed=True), class_="band")
    curve = tag("path", d=path(mean), **arms.stroke(b.arm))
    wide = tag("path", d=path(mean), class_="reach", data_tip=f"{b.arm}\nends at {loss(b.mean[-1])}")
    return arms.mark(b.arm, band, curve, wide, *points)


def _point(b: Band, i: int, unit: str) -> str:
    seeds = f"{loss(b.low[i])} … {loss(b.high[i])}"
    return f"{b.arm}\n{unit[:-1]} {number(b.x[i], decimals(b.x[i], least=0))}\nloss {loss(b.mean[i])}\nseeds {seeds}"


def _end_labels(found: Sequence[Band], arms: Arms, x: Scale, y: Scale, room: Room) -> list[str]:
    shown = list(found)
    if room.narrow and len(found) > MOST_LABELS:
        kept = {b.arm for b in found[:4]} | {BASELINE, REFERENCE}
        shown = [b for b in found if b.arm in kept]
    ends = [min(max(y(b.mean[-1]), y.end), y.start) for b in shown]
    places = apart(ends, 15, y.end + 4, y.start + 2)
    said = []
    for b, end, place in zip(shown, ends, places, strict=True):
        at, final = x.end + 22, "" if room.narrow else loss(b.mean[-1], 3)
        free = room.width - at - 3 - (width(final, SMALL_PRINT) + 12 if final else 0)
        lead = [(x(b.x[-1]) + 3, end), (x.end + 3, end), (at - 8, place)]
        parts = [
            tag("circle", cx=x(b.x[-1]), cy=end, r=2.6, class_="dot"),
            tag("path", d=path(lead), class_="lead"),
            tag("circle", cx=at - 5, cy=place, r=3, class_="dot"),
            text(at + 3, place + 4, fitted(b.arm, free), class_="label"),
        ]
        if final:
            parts.append(text(room.width - 2, place + 4, final, class_="tick r"))
        said.append(arms.mark(b.arm, *parts))
    return said


# ------------------------------------------------------------------------------------------------------ learning rates


SMALL = 200.0, 170.0, 30.0, 8.0, 32.0, 148.0
"""Width, height, and where the axes begin and end: left, from the right, top, bottom."""
INSIDE = 28.0, 38.0, 170.0, 112.0


def rate_charts(rates: Sequence[Rate], arms: Arms) -> list[str]:
    """One small figure per arm on common axes, the other arms' curves in the background; the lowest best rate first."""
    if not rates:
        return []
    best = best_rates(rates)
    wide, height, left, right, top, bottom = SMALL
    lows = [r.lr for r in rates]
    x = Scale(min(lows) / 1.15, max(lows) * 1.15, left, wide - right, log=True)
    y = Scale(*(rate_limits(rates, best) if best else (0.0, 1.0)), bottom, top + 12)
    lines = {a: [(x(r.lr), y(r.mean)) for r in line_of(rates, a)] for a in arms.names}
    back = [tag("path", d=path(p), class_="ghost") for p in lines.values() if len(p) > 1]
    behind = window(*INSIDE, *back)
    losses = ticks(y.low, y.high, 5) if best else []
    marks = [line(left, y(v), wide - right, y(v), class_="grid") for v in losses]
    marks += [text(left - 5, y(v) + 3, f"{v:g}", class_="tick r") for v in losses]
    marks += [text(x(v), bottom + 14, short(v), class_="tick m") for v in powers(x.low, x.high)]
    marks.append(line(left, bottom, wide - right, bottom, class_="axis"))
    order = sorted(arms.names, key=lambda a: best[a].mean if a in best else float("inf"))
    order = [a for a in order if any(r.arm == a for r in rates)]
    return [
        figure(
            wide, height, *marks, behind, _rates_of(a, rates, best.get(a), arms, x, y, top),
            title=f"Validation loss of {a} against its learning rate",
        )
        for a in order
    ]  # fmt: skip


def _rates_of(arm: str, rates: Sequence[Rate], best: Rate | None, arms: Arms, x: Scale, y: Scale, top: float) -> str:
    own = line_of(rates, arm)
    inside = [r for r in own if r.mean <= y.high]
    parts = [text(0, 11, fitted(arm, SMALL[0], BOLD * 12), class_="label")]
    curve = tag("path", d=path([(x(r.lr), y(r.mean)) for r in own]), **arms.stroke(arm))
    parts.append(window(*INSIDE, curve))
    parts += [tag("circle", cx=x(r.lr), cy=y(r.mean), r=2.6, class_="dot") for r in inside]
    parts += [tag("circle", cx=x(r.lr), cy=y(r.mean), r=9, class_="hit", data_tip=_rate_tip(r, best)) for r in inside]
    parts += [_lost(r, x(r.lr), top + 4, _rate_tip(r, best)) for r in rates if r.arm == arm and r not in inside]
    if best:
        parts.append(tag("circle", cx=x(best.lr), cy=y(best.mean), r=6, class_="ring"))
        parts.append(text(0, 25, f"{loss(best.mean, 3)} at {short(best.lr)}", class_="tick"))
    return arms.mark(arm, *parts)


def _rate_tip(r: Rate, best: Rate | None) -> str:
    ended = "diverged" if r.diverged else "given up" if r.pruned else f"validation loss {loss(r.mean)}"
    seeds = f", {len(r.losses)} seeds" if len(r.losses) > 1 else ""
    return f"{r.arm}\nrate {r.lr:g}{', chosen' if r == best else ''}\n{ended}{seeds}"


def _lost(r: Rate, x: float, y: float, tip: str) -> str:
    """What has no place on the axis: × diverged, – given up, ↑ a loss above it."""
    if r.finished:
        shape = path([(x - 3, y + 2), (x, y - 2), (x + 3, y + 2)])
    elif r.pruned and not r.diverged:
        shape = path([(x - 3, y), (x + 3, y)])
    else:
        shape = path([(x - 3, y - 3), (x + 3, y + 3)]) + path([(x - 3, y + 3), (x + 3, y - 3)])
    return tag("path", d=shape, class_="lost") + tag("circle", cx=x, cy=y, r=9, class_="hit", data_tip=tip)
