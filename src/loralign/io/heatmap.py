"""A picture of one number per layer and kind of module, a panel for each thing that is compared. PNG, no display."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralign.io.provenance import write_bytes

MOST_IN_A_ROW = 3
TITLE = 10
"""Points of its letters."""
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(name: str) -> int:
    """The first number in a module's name; 0 where there is none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else 0


def kind_of(name: str) -> str:
    """What follows the layer's number: `self_attn.q_proj`; the whole name where there is none."""
    found = _LAYER.search(name)
    return name[found.end() :] if found else name


@dataclass(frozen=True)
class Places:
    """Where modules stand in a map: a row per layer, a column per kind. labels: of the columns, as short as they can be
    told apart; at: (row, column) by module name."""

    layers: tuple[int, ...]
    labels: tuple[str, ...]
    at: Mapping[str, tuple[int, int]]


def places(names: Sequence[str]) -> Places:
    """An encoder's and a decoder's modules of one kind have a column each."""
    stacks = {name: name[: found.start()] for name in names if (found := _LAYER.search(name))}
    several = len(set(stacks.values())) > 1
    kinds = {n: f"{stacks[n]}.{kind_of(n)}" if several and n in stacks else kind_of(n) for n in names}
    columns, layers = list(dict.fromkeys(kinds.values())), sorted({layer_of(n) for n in names})
    at = {n: (layers.index(layer_of(n)), columns.index(kinds[n])) for n in names}
    return Places(tuple(layers), tuple(_label(kind, columns) for kind in columns), at)


def _label(kind: str, among: Sequence[str]) -> str:
    """The shortest end of a dotted name that no other one has."""
    parts = kind.split(".")
    for n in range(1, len(parts)):
        end = ".".join(parts[-n:])
        if sum(other == end or other.endswith(f".{end}") for other in among) == 1:
            return end
    return kind


def panel_width(kinds: int) -> float:
    """Inches of a panel with so many columns."""
    return 0.8 + 0.42 * kinds


def heat_map(
    panels: Mapping[str, Mapping[str, float]], path: Path, *, title: str, scale: str, most: float = 0.0
) -> None:
    """One panel per key, at most three side by side: rows are layers, columns kinds of modules.

    panels: title to {module name: value}, in [0, most]; most = 0: in [0, 1], shown as percentages. A module without a
    value stays grey.
    """
    top, unit = (most, 1.0) if most else (100.0, 100.0)
    where = places(list(dict.fromkeys(name for values in panels.values() for name in values)))
    layers, kinds = where.layers, where.labels
    rows = -(-len(panels) // MOST_IN_A_ROW)
    columns = -(-len(panels) // rows)
    size = (1.6 + panel_width(len(kinds)) * columns, 0.6 + rows * (1.2 + 0.22 * max(6, len(layers))))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    every_axis = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = every_axis.flat[: len(panels)]
    for idle in every_axis.flat[len(panels) :]:
        idle.set_axis_off()
    for ax, (panel, values) in zip(axes, panels.items(), strict=True):
        grid = unit * _grid(values, where)
        ax.set_facecolor("#dddddd")
        image = ax.imshow(grid, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        _print_values(ax, grid, top)
        ax.set_title(panel, fontsize=9, parse_math=False)
        ax.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=7, parse_math=False)
        every = max(1, len(layers) // 16)
        ax.tick_params(labelbottom=True)
        ax.set_yticks(range(0, len(layers), every), [str(i) for i in layers[::every]], fontsize=7)
    for left in every_axis[:, 0]:
        left.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=every_axis, shrink=0.9, pad=0.01, aspect=max(20.0, 5 * size[1]))
    bar.set_label(scale, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    entitle(figure, title)
    save(figure, path)


def entitle(figure: Figure, title: str) -> None:
    """Above everything, in as many lines as the width asks for."""
    letters = int(72 * figure.get_figwidth() / (0.62 * TITLE))
    figure.suptitle(textwrap.fill(title, letters), fontsize=TITLE, parse_math=False)


def save(figure: Figure, path: Path, *, dpi: int = 130) -> None:
    """A PNG file, whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    write_bytes(path, drawn.getvalue())


def _grid(values: Mapping[str, float], where: Places) -> np.ndarray:
    grid = np.full((len(where.layers), len(where.labels)), np.nan)
    for name, value in values.items():
        grid[where.at[name]] = value
    return grid


def _print_values(ax: object, grid: np.ndarray, top: float) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value < 0.6 * top else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)  # type: ignore[attr-defined]
