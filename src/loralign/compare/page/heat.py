"""Maps of the ranks that arms ended with: a row per layer, a column per kind of module, one scale for all arms."""

from __future__ import annotations

from collections.abc import Mapping

from loralign.compare.figures import fitted
from loralign.compare.page.charts import BOLD, Arms
from loralign.compare.page.svg import Number, figure, tag, text
from loralign.compare.ranks import Ranks, highest
from loralign.io.heatmap import Places, places

LEFT, TOP, WIDE, HIGH = 20.0, 36.0, 19.0, 13.0
"""Where the cells begin, and the size of one."""
LETTER = 5.6
"""Pixels of one in a column's label, about."""
DARK = 0.6
"""From this share of the scale on a cell is dark."""


def rank_charts(ranks: Mapping[str, Ranks], arms: Arms) -> list[str]:
    """One small map per arm."""
    where = places(list(dict.fromkeys(m for r in ranks.values() for m in r.by_module)))
    most = highest(ranks)
    return [_map(arm, r, where, most, arms) for arm, r in ranks.items()]


def _map(arm: str, ranks: Ranks, where: Places, most: float, arms: Arms) -> str:
    bottom = TOP + HIGH * len(where.layers)
    width = max(LEFT + WIDE * len(where.labels) + 2, 132.0)
    said = f"{ranks} slots" if ranks.begun is not None else f"rank {ranks} in all"
    head = [text(0, 12, fitted(arm, width, BOLD * 12.5), class_="label"), text(0, 26, said, class_="tick")]
    every = max(1, len(where.layers) // 16)
    rows = [
        text(LEFT - 4, TOP + HIGH * i + 10, str(layer), class_="tick r")
        for i, layer in enumerate(where.layers)
        if i % every == 0
    ]
    heads = []
    for i, label in enumerate(where.labels):
        x = LEFT + WIDE * i + 13
        heads.append(text(x, bottom + 5, label, class_="tick r", transform=f"rotate(-90 {x:g} {bottom + 5:g})"))
    cells = [_cell(arm, m, v, v / most, *where.at[m]) for m, v in ranks.by_module.items()]
    height = bottom + 10 + LETTER * max(map(len, where.labels))
    title = f"Ranks at the end of {arm}, by layer and kind of module"
    return figure(width, height, arms.mark(arm, *head), *rows, *heads, *cells, title=title)


def _cell(arm: str, module: str, value: float, share: float, row: int, column: int) -> str:
    x, y = LEFT + WIDE * column, TOP + HIGH * row
    size: dict[str, Number] = {"x": x + 0.5, "y": y + 0.5, "width": WIDE - 1, "height": HIGH - 1}
    tip = f"{arm}\n{module}\nrank {value:.4g}"
    box = tag("rect", class_="cell", style=f"--share:{share:.3f}", data_tip=tip, **size)
    return box + text(x + WIDE / 2, y + 10, f"{value:.0f}", class_="in m full" if share > DARK else "in m")
