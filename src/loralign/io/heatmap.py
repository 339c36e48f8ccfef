"""A picture of one number per layer and kind of module, a panel for each thing that is compared. PNG, no display."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MOST_IN_A_ROW = 3
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(name: str) -> int:
    """The first number in a module's name; 0 where there is none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else 0


def kind_of(name: str) -> str:
    """What follows the layer's number: `self_attn.q_proj`; the whole name where there is none."""
    found = _LAYER.search(name)
    return name[found.end() :] if found else name


def heat_map(
    panels: Mapping[str, Mapping[str, float]], path: Path, *, title: str, scale: str, most: float = 0.0
) -> None:
    """One panel per key, at most three side by side: rows are layers, columns kinds of modules.

    panels: title to {module name: value}, in [0, most]; most = 0: in [0, 1], shown as percentages. A module without a
    value stays grey.
    """
    top, unit = (most, 1.0) if most else (100.0, 100.0)
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    layers, kinds = sorted({layer_of(n) for n in names}), list(dict.fromkeys(kind_of(n) for n in names))
    rows = -(-len(panels) // MOST_IN_A_ROW)
    columns = -(-len(panels) // rows)
    size = (1.6 + (0.8 + 0.42 * len(kinds)) * columns, 0.6 + rows * (1.2 + 0.22 * max(6, len(layers))))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    every_axis = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = every_axis.flat[: len(panels)]
    for idle in every_axis.flat[len(panels) :]:
        idle.set_axis_off()
    for ax, (panel, values) in zip(axes, panels.items(), strict=True):
        grid = unit * _grid(values, layers, kinds)
        ax.set_facecolor("#dddddd")
        image = ax.imshow(grid, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        _print_values(ax, grid, top)
        ax.set_title(panel, fontsize=9)
        ax.set_xticks(range(len(kinds)), [k.rsplit(".", 1)[-1] for k in kinds], rotation=90, fontsize=7)
        every = max(1, len(layers) // 16)
        ax.set_yticks(range(0, len(layers), every), [str(i) for i in layers[::every]], fontsize=7)
    for left in every_axis[:, 0]:
        left.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=every_axis, shrink=0.9, pad=0.01, aspect=max(20.0, 5 * size[1]))
    bar.set_label(scale, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def _grid(values: Mapping[str, float], layers: Sequence[int], kinds: Sequence[str]) -> np.ndarray:
    grid = np.full((len(layers), len(kinds)), np.nan)
    for name, value in values.items():
        grid[layers.index(layer_of(name)), kinds.index(kind_of(name))] = value
    return grid


def _print_values(ax: object, grid: np.ndarray, top: float) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value < 0.6 * top else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)  # type: ignore[attr-defined]
