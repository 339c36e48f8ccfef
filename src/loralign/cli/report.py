"""`loralign init --report`: what the start holds of a held-out gradient, as a table, a picture and plain data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loralign.evidence import Progress
from loralign.evidence.subspace import check_sources
from loralign.io.heatmap import heat_map, kind_of
from loralign.io.provenance import write_text
from loralign.methods.table import method
from loralign.train.diagnosis import BESIDE, Shares, diagnose
from loralign.types import Recipe

FOLDER = "start"


def measure_of(
    beside: Sequence[str] | None, sources: Sequence[str], *, cache: Path | None, progress: Progress
) -> Callable[[Any, Recipe], Shares]:
    """What measures a trainer's start beside these methods; names and sources are checked now."""
    check_sources(sources)
    others = tuple(method(name).id for name in beside) if beside else BESIDE
    return lambda trainer, recipe: diagnose(
        trainer, recipe, beside=others, sources=sources, cache=cache, progress=progress
    )


def write_report(output: Path, shares: Shares) -> list[str]:
    """Write `start/shares.json` and `start/shares.png` into the folder; returns the lines to print."""
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "shares.json", json.dumps(asdict(shares), indent=1))
    title = f"Share of a held-out gradient that the first step can follow ({shares.micro_batches} micro-batches)"
    heat_map(shares.of, folder / "shares.png", title=title, scale="share of ‖G‖², %")
    return [*share_table(shares), f"Written: {folder / 'shares.png'}, {folder / 'shares.json'}"]


def share_table(shares: Shares) -> list[str]:
    """A row per site, or per kind of module in models of many sites; the last row is the whole model."""
    names = list(shares.energy)
    rows = {name: [name] for name in names}
    if len(names) > 40:
        rows = {}
        for name in names:
            rows.setdefault(kind_of(name), []).append(name)
    table = Table(box=None, header_style="", pad_edge=False)
    table.add_column("module" if len(rows) == len(names) else "kind of module", no_wrap=True)
    for start in shares.of:
        table.add_column(start, justify="right")
    for label, among in {**rows, "all": names}.items():
        cells = [shares.mean(start, among) for start in shares.of]
        table.add_row(label, *("–" if cell is None else f"{cell:.1%}" for cell in cells))
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    about = f"Share of the gradient of {shares.held_out} that the first step of each start can follow"
    note = "all and kinds: weighted by the energy of the gradients; –: the method cannot serve these modules."
    return [f"{about}:", *(line.rstrip() for line in out.getvalue().splitlines()), note]
