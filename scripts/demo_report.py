"""What the demo shows: the table, the picture and plain sentences, made from the runs' numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLOURS = {"lora": "#0072B2", "lora-ga": "#D55E00"}
MARKERS = {"lora": "o", "lora-ga": "s"}
NOTICED = 0.05
"""Nats; smaller differences of the held-out loss are called none."""


@dataclass(frozen=True)
class Seen:
    """One run. Curves: (step, loss); `match`: share of test rows answered exactly; seconds: wall clock."""

    method: str
    lr: float
    shared: bool
    train_curve: list[tuple[int, float]]
    eval_curve: list[tuple[int, float]]
    before: float
    after: float
    match: float
    seconds: float
    init_s: float
    folder: Path
    answer: str


def table(found: Sequence[Seen], base_match: float, title: str) -> Table:
    made = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD)
    for column in ("method", "rate", "chosen", "loss before", "loss after", "exact match", "train s", "init s"):
        left = column in ("method", "chosen")
        made.add_column(column.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True, vertical="bottom")
    made.add_row("base model", "", "", f"{found[0].before:.3f}", "", f"{base_match:.0%}", "", "")
    for s in found:
        numbers = f"{s.before:.3f}", f"{s.after:.3f}", f"{s.match:.0%}", f"{s.seconds:.0f}", f"{s.init_s:.0f}"
        made.add_row(s.method, f"{s.lr:g}", "shared" if s.shared else "its own prior", *numbers)
    return made


def write_picture(found: Sequence[Seen], file: Path) -> None:
    """Two panels on one scale: each method at its own prior, both at the shared rate."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    for axes, shared in zip(panels, (False, True), strict=True):
        here = [s for s in found if s.shared == shared]
        for seen in here:
            _draw(axes, seen)
        axes.set_title(
            f"both at the shared rate {here[0].lr:g}" if shared else "each at its own prior rate", fontsize=12
        )
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_yscale("log")  # shared: most of what differs lies near the end
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("loss on the answer (nats per token)")
    figure.suptitle("News topics: held-out loss (markers) and training loss (thin lines)", fontsize=12)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw(axes: Axes, seen: Seen) -> None:
    colour = COLOURS[seen.method]
    axes.plot(*zip(*seen.train_curve, strict=True), color=colour, alpha=0.4, linewidth=1)
    curve = sorted({0: seen.before, **dict(seen.eval_curve)}.items())
    label = f"{seen.method}, learning rate {seen.lr:g}"
    axes.plot(*zip(*curve, strict=True), color=colour, marker=MARKERS[seen.method], linewidth=2, label=label)


def sentences(found: Sequence[Seen], test_rows: int) -> list[str]:
    """What was seen, one sentence per pair of runs, by the numbers alone."""
    said = []
    for shared in (False, True):
        lora, ga = (next(s for s in found if s.method == m and s.shared == shared) for m in ("lora", "lora-ga"))
        where = f"Both at {lora.lr:g}" if shared else "Each at its own prior"
        said.append(f"{where}: {_loss(lora, ga)}; {_match(lora, ga, test_rows)}.")
    worse = [f"{s.method} at {s.lr:g}" for s in found if not s.after < s.before]
    if worse:
        said.append(f"The held-out loss did not fall with {' and '.join(worse)}.")
    return [*said, "One seed and one short run each: `loralign compare` is for conclusions."]


def _loss(lora: Seen, ga: Seen) -> str:
    gap = lora.after - ga.after
    numbers = f"{lora.after:.3f} with lora, {ga.after:.3f} with lora-ga"
    if abs(gap) < NOTICED:
        return f"the held-out losses end alike ({numbers})"
    return f"{'lora-ga' if gap > 0 else 'lora'} ends with the lower held-out loss ({numbers})"


def _match(lora: Seen, ga: Seen, rows: int) -> str:
    """A difference below two standard errors of two independent shares is called none."""
    numbers = f"{lora.match:.0%} and {ga.match:.0%} exact"
    error = sqrt(sum(s.match * (1 - s.match) for s in (lora, ga)) / rows)
    gap = ga.match - lora.match
    if abs(gap) <= 2 * error:
        return f"{numbers}, which {rows} rows do not tell apart"
    return f"{numbers}, {'lora-ga' if gap > 0 else 'lora'} ahead"


def show(
    made: Table,
    found: Sequence[Seen],
    test_rows: int,
    question: Sequence[dict[str, str]],
    base_said: str,
    base: str,
    picture: Path,
) -> None:
    console = Console(highlight=False)
    console.print(made)
    for line in sentences(found, test_rows):
        console.print(line, markup=False)
    best = max(found, key=lambda s: (s.match, -s.after))
    asked, right = question[-2]["content"], question[-1]["content"]
    console.print(f"\n{asked} …", style="bold", markup=False)
    console.print(f"  before: {base_said!r}\n  after:  {best.answer!r}   (right: {right!r})", markup=False)
    console.print(f"\nEvery adapter was verified in a process without loralign. {best.folder} in plain PEFT:\n")
    lines = (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{best.folder}")',
    )
    for line in lines:
        console.print("  " + line, soft_wrap=True, markup=False)
    console.print(f"\nCurves: {picture}")
