"""Pictures of a study: loss against step, loss against second, final loss against learning rate. PNG files, no display.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and, beyond seven arms, dashes repeat the
distinction. Loss axes leave out the first steep fall, so that the differences at the end stay visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralign.compare.curves import Curve
from loralign.compare.rates import Rate, choose_rate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("^", "D", "v", "P", "X", "p", "h")
DASHES = ("-", "--", ":", "-.")
STEEP = 0.15
"""Share of the run whose losses may lie above the axis."""


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every picture of a study. The baseline is black, the reference grey and dashed."""

    colour: str
    dash: str
    marker: str


def styles(arms: Sequence[str], baseline: str, reference: str) -> dict[str, Style]:
    found = {baseline: Style("black", "-", "o"), reference: Style("#777777", "--", "s")}
    for i, arm in enumerate(a for a in arms if a not in (baseline, reference)):
        found[arm] = Style(COLOURS[i % 7], DASHES[i // 7 % 4], MARKERS[i % 7])
    return found


def plot_steps(curves: Sequence[Curve], path: Path, *, baseline: str = "lora", reference: str = "full") -> None:
    """Mean loss over seeds against step, band from the lowest to the highest seed; initialisation tokens count."""
    _plot_curves(curves, [c.charged_steps for c in curves], "step, initialisation included", path, baseline, reference)


def plot_seconds(curves: Sequence[Curve], path: Path, *, baseline: str = "lora", reference: str = "full") -> None:
    """Like `plot_steps`, against seconds since the run began."""
    _plot_curves(curves, [c.seconds for c in curves], "seconds, initialisation included", path, baseline, reference)


def plot_rates(rates: Sequence[Rate], path: Path, *, baseline: str = "lora", reference: str = "full") -> None:
    """Validation loss of every finished trial against its rate, the best one ringed. Trials that diverged or were
    given up are marked above the axes, a row for each arm; lines that leave at the top go on to higher losses."""
    figure, axes = _axes("learning rate", "final validation loss")
    arms = list(dict.fromkeys(r.arm for r in rates))
    look = styles(arms, baseline, reference)
    best = {arm: found for arm in arms if (found := choose_rate(r for r in rates if r.arm == arm))}
    axes.set_xscale("log")
    for arm in sorted(best, key=lambda a: best[a].mean):
        line = sorted((r for r in rates if r.arm == arm and r.finished), key=lambda r: r.lr)
        colour, dash, marker = look[arm].colour, look[arm].dash, look[arm].marker
        x, y = [r.lr for r in line], [r.mean for r in line]
        axes.plot(x, y, color=colour, linestyle=dash, marker=marker, markersize=5, linewidth=1.5, label=arm)
        axes.plot(best[arm].lr, best[arm].mean, "o", markersize=12, markerfacecolor="none", markeredgecolor=colour)
    if best:
        low, top = _between(rates, best)
        axes.set_ylim(low - 0.06 * (top - low) - 1e-9, top + 0.06 * (top - low) + 1e-9)
    axes.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgecolor="#444444", label="best rate")
    _unfinished(axes, rates, arms, look)
    _save(figure, axes, path)


def _between(rates: Sequence[Rate], best: dict[str, Rate]) -> tuple[float, float]:
    """Losses to show: three quarters of all and those beside every arm's best, unless they are far away."""
    losses = sorted(r.mean for r in rates if r.finished)
    usual = max(losses[(3 * len(losses) - 1) // 4], *(b.mean for b in best.values()), losses[0])
    beside = [usual]
    for arm, found in best.items():
        line = sorted((r for r in rates if r.arm == arm and r.finished), key=lambda r: r.lr)
        at = line.index(found)
        beside += [r.mean for r in line[max(0, at - 1) : at + 2]]
    far = losses[0] + 3 * (usual - losses[0])
    return losses[0], max((b for b in beside if b <= far), default=usual)


def _unfinished(axes: Axes, rates: Sequence[Rate], arms: Sequence[str], look: dict[str, Style]) -> None:
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


# ------------------------------------------------------------------------------------------------------------- drawing


def _plot_curves(
    curves: Sequence[Curve], xs: Sequence[Sequence[float]], label: str, path: Path, baseline: str, reference: str
) -> None:
    figure, axes = _axes(label, "test loss")
    arms = list(dict.fromkeys(c.arm for c in curves))
    look = styles(arms, baseline, reference)
    lines = {}
    for arm in arms:
        runs = [(x, c.losses) for x, c in zip(xs, curves, strict=True) if c.arm == arm and c.sound]
        if runs:
            points = min(len(losses) for _, losses in runs)
            lines[arm] = (np.mean([x[:points] for x, _ in runs], axis=0), np.array([y[:points] for _, y in runs]))
    for arm in sorted(lines, key=lambda a: float(lines[a][1][:, -1].mean())):
        (x, y), style = lines[arm], look[arm]
        wide = 2.4 if arm == baseline else 1.6
        axes.plot(x, y.mean(0), color=style.colour, linestyle=style.dash, linewidth=wide, label=arm)
        axes.fill_between(x, y.min(0), y.max(0), color=style.colour, alpha=min(0.15, 0.8 / len(lines)), linewidth=0)
    if lines:
        early = [float(y.mean(0)[int(STEEP * y.shape[1]) :].max()) for _, y in lines.values()]
        low, top = min(float(y.min()) for _, y in lines.values()), max(early)
        axes.set_ylim(low - 0.05 * (top - low) - 1e-9, top + 1e-9)
        axes.set_xlim(0, max(float(x[-1]) for x, _ in lines.values()) * 1.02)
    axes.set_title("mean and range over seeds", loc="right", fontsize=9, color="#555555")
    _save(figure, axes, path)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # an arm may be called a$b
    figure.savefig(path, dpi=150)
