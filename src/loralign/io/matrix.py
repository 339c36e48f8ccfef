"""A picture of accuracies: a row per moment of a sequence of tasks, a column per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralign.io.heatmap import entitle, save

MOST_IN_A_ROW = 3


def accuracy_picture(
    panels: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str], path: Path, *, title: str
) -> None:
    """One matrix per panel, at most three side by side. panels: title to rows of shares in [0, 1]; a row has the tasks
    seen by then, what was not seen stays grey."""
    tasks = [name.replace(", ", ",\n") for name in tasks]
    columns = min(MOST_IN_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 1.1 + 0.52 * len(tasks), 1.0 + 0.42 * max(len(m) for m in panels.values())
    height += 0.08 * max(len(line) for name in tasks for line in name.split("\n"))  # names stand upright
    figure = Figure(figsize=(1.2 + columns * width, 0.7 + rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (name, matrix) in zip(axes.flat, panels.items(), strict=False):
        grid = [[100 * v for v in row] + [float("nan")] * (len(tasks) - len(row)) for row in matrix]
        ax.set_facecolor("#dddddd")
        image = ax.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="nearest")
        for t, row in enumerate(matrix):
            for i, value in enumerate(row):
                colour = "white" if value < 0.6 else "black"
                ax.text(i, t, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_title(name, fontsize=9, parse_math=False)
        ax.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7, parse_math=False)
        said = ["all"] if len(matrix) < len(tasks) else [str(t + 1) for t in range(len(matrix))]
        ax.set_yticks(range(len(matrix)), said, fontsize=7)
        ax.set_ylabel("after task", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01)
    bar.set_label("accuracy among the classes seen, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    entitle(figure, title)
    save(figure, path)
