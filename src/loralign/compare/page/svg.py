"""Inline SVG: elements, axes, and labels that do not cover one another. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Number = float | int


def tag(name: str, *inside: str, **attributes: str | Number | None) -> str:
    """An element; `_` in a name is written `-`, a trailing one is dropped; attributes that are None are left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_said(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{''.join(inside)}</{name}>"


def _said(value: str | Number) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, said: str, **attributes: str | Number | None) -> str:
    return tag("text", escape(said), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: str | Number | None) -> str:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """The `d` of straight lines through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")


def figure(width: float, height: float, *inside: str, title: str, class_: str = "") -> str:
    size: dict[str, str | Number] = {"viewBox": f"0 0 {width:g} {height:g}", "width": width, "height": height}
    return tag("svg", tag("title", escape(title)), *inside, class_=f"figure {class_}".strip(), role="img", **size)


def window(x: float, y: float, width: float, height: float, *inside: str) -> str:
    """What lies outside of a rectangle is not seen."""
    return tag("svg", *inside, x=x, y=y, width=width, height=height, viewBox=f"{x:g} {y:g} {width:g} {height:g}")


# ---------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Scale:
    """From data [low, high] to pixels [start, end]; log: of log10."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log10 if self.log else float
        span = f(self.high) - f(self.low)
        return self.start + (self.end - self.start) * ((f(value) - f(self.low)) / span if span else 0.5)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; 2 and 5 times these, too, where there are fewer than two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(tens) > 1:
        return tens
    return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def short(value: float) -> str:
    """0.0001 as 1e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def minus(figures: str) -> str:
    """With minus signs as wide as the plus."""
    return figures.replace("-", "−")


def apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places for labels in order, `least` apart and within [low, high], as near as can be to where they are wanted.

    Labels that would touch form a block around the mean of what its members want, until no two blocks touch.
    """
    blocks: list[tuple[float, list[int]]] = []  # the place of a block's first label, its members
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        blocks.append((min(max(wanted[i], low), high), [i]))
        while len(blocks) > 1 and blocks[-2][0] + least * len(blocks[-2][1]) > blocks[-1][0]:
            members = blocks[-2][1] + blocks[-1][1]
            mean = sum(wanted[m] - least * n for n, m in enumerate(members)) / len(members)
            blocks[-2:] = [(max(low, min(mean, high - least * (len(members) - 1))), members)]
    found = [0.0] * len(wanted)
    for start, members in blocks:
        for n, m in enumerate(members):
            found[m] = start + least * n
    return found
