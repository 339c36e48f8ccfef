"""Pictures of a study: loss against step, loss against second, final loss against learning rate. PNG files, no display.

Markers repeat the distinction that colours make; what is shown is decided in `figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralign.compare.curves import Curve
from loralign.compare.figures import (
    INK,
    Axis,
    Look,
    bands,
    best_rates,
    fitted,
    line_of,
    loss_limits,
    rate_limits,
    width,
)
from loralign.compare.ranks import Ranks, highest
from loralign.compare.rates import Rate
from loralign.io.heatmap import heat_map, panel_width, places, save


def plot_steps(curves: Sequence[Curve], path: Path, look: Look, budget: float = math.inf) -> None:
    """Mean loss over seeds against step, band from the lowest to the highest seed; initialisation tokens count."""
    _plot_curves(curves, "charged_steps", "step, initialisation included", path, look, budget)


def plot_seconds(curves: Sequence[Curve], path: Path, look: Look, budget: float = math.inf) -> None:
    """Like `plot_steps`, against seconds since the run began."""
    _plot_curves(curves, "seconds", "seconds, initialisation included", path, look, budget)


def plot_rates(rates: Sequence[Rate], path: Path, look: Look) -> None:
    """Validation loss of every finished trial against its rate, the best one ringed. Trials that diverged or were
    given up are marked above the axes, a row for each arm; lines that leave at the top go on to higher losses."""
    figure, axes = _axes("learning rate", "final validation loss")
    arms = list(dict.fromkeys(r.arm for r in rates))
    best = best_rates(rates)
    axes.set_xscale("log")
    for arm in sorted(best, key=lambda a: best[a].mean):
        line = line_of(rates, arm)
        colour, dash, marker = look[arm].colour, look[arm].dash, look[arm].marker
        x, y = [r.lr for r in line], [r.mean for r in line]
        axes.plot(x, y, color=colour, linestyle=dash, marker=marker, markersize=5, linewidth=1.5, label=_named(arm))
        axes.plot(best[arm].lr, best[arm].mean, "o", markersize=12, markerfacecolor="none", markeredgecolor=colour)
    if best:
        axes.set_ylim(*rate_limits(rates, best))
    else:  # no loss to show, the marks above the axes alone
        axes.set_yticks([])
    for arm in (a for a in arms if a not in best):
        axes.plot([], [], "s", color=look[arm].colour, markersize=5, label=_named(arm))
    axes.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgecolor="#444444", label="best rate")
    _unfinished(axes, rates, arms, look)
    _save(figure, axes, path)


def _unfinished(axes: Axes, rates: Sequence[Rate], arms: Sequence[str], look: Look) -> None:
    across = axes.get_xaxis_transform()
    rows = [arm for arm in arms if any(r.arm == arm and not r.finished for r in rates)]
    apart = min(0.035, 0.2 / max(1, len(rows)))
    for r in (r for r in rates if not r.finished):
        at, mark = 1.03 + apart * rows.index(r.arm), "_" if r.pruned and not r.diverged else "x"
        axes.plot(r.lr, at, mark, color=look[r.arm].colour, markersize=5, transform=across, clip_on=False)
    if any(r.diverged or not r.pruned for r in rates if not r.finished):
        axes.plot([], [], "x", color="#444444", markersize=5, label="diverged")
    if any(r.pruned and not r.diverged for r in rates):
        axes.plot([], [], "_", color="#444444", markersize=5, label="given up")


def plot_ranks(ranks: Mapping[str, Ranks], path: Path) -> None:
    """Of every arm the ranks at the end, mean over seeds, a panel each."""
    kinds = len(places(list(dict.fromkeys(m for r in ranks.values() for m in r.by_module))).labels)
    room = 72 * panel_width(kinds)
    panels = {f"{fitted(arm, room - width(f': {r}', 9), 9)}: {r}": r.by_module for arm, r in ranks.items()}
    most = highest(ranks)
    heat_map(panels, path, title="Ranks at the end, mean over seeds", scale="rank", most=most)


# ------------------------------------------------------------------------------------------------------------- drawing


def _plot_curves(curves: Sequence[Curve], axis: Axis, label: str, path: Path, look: Look, budget: float) -> None:
    figure, axes = _axes(label, "test loss")
    found = bands(curves, axis, budget)
    for b in found:
        style = look[b.arm]
        wide = 2.4 if style.colour == INK[0] else 1.6
        axes.plot(b.x, b.mean, color=style.colour, linestyle=style.dash, linewidth=wide, label=_named(b.arm))
        axes.fill_between(b.x, b.low, b.high, color=style.colour, alpha=min(0.15, 0.8 / len(found)), linewidth=0)
    if found:
        axes.set_ylim(*loss_limits(found))
        axes.set_xlim(0, max(b.x[-1] for b in found) * 1.02)
    axes.set_title("mean and range over seeds", loc="right", fontsize=9, color="#555555")
    _save(figure, axes, path)


def _named(arm: str) -> str:
    """In a legend, which leaves the axes most of the width."""
    return fitted(arm, 170)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="y", useOffset=False)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # an arm may be called a$b
    save(figure, path, dpi=150)
