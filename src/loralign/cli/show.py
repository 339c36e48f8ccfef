"""The table of methods and its lines one by one, for people and for programs."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table

from loralign.config.recipe import options_said
from loralign.methods.table import METHODS, method
from loralign.plan import recommended
from loralign.types import Method

WIDTH = 110


def lines_of(name: str | None) -> list[Method]:
    """The line of a method, those of a mix, or all of them in the table's order."""
    return [method(part) for part in name.split("+")] if name is not None else list(METHODS.values())


def method_data(lines: list[Method]) -> list[dict[str, Any]]:
    """Lines as plain data."""
    return [
        {
            "id": m.id,
            "summary": m.summary,
            "arxiv": m.arxiv,
            "export": m.export,
            "lr_s": m.prior.lr_s,
            "lr_source": m.prior.source,
            "presets": sorted(m.presets),
            "options": {name: json.loads(_yaml(default)) for name, _, default in options_said(m)},
            "reference": m.reference,
            "unverified": m.unverified,
        }
        for m in lines
    ]


def method_page(line: Method) -> str:
    """One method in full: its prior, options with their defaults, presets, and what its files say of it."""
    at = "at hidden size 2000 (`loralign plan` tells it for a model)"
    prior = "" if line.prior.lr_s is None else f"lr·s = {line.prior.lr_s:.1e} {at}: "
    facts = {
        "paper": f"arXiv {line.arxiv}" if line.arxiv else "",
        "learning rate": prior + line.prior.source,
        "export": line.export,
        "unverified": line.unverified,
        "own defaults": _yaml(dict(line.fields)) if line.fields else "",
        **{f"preset {name}": _yaml(dict(values)) for name, values in line.presets.items()},
        "options": "\n".join(f"{name}: {_yaml(value)}  ({kind})" for name, kind, value in options_said(line)),
    }
    said = [f"{line.id}: {line.summary}"]
    for name, text in facts.items():
        rows = [row for part in text.splitlines() for row in textwrap.wrap(part, WIDTH - 22)]
        said += [f"{name if not i else '':<20}  {row}" for i, row in enumerate(rows)]
    return "\n".join([*said, *_documents(line)])


def _documents(line: Method) -> Iterator[str]:
    """The first docstring of every file that the method's own parts are in, up to its example."""
    parts = (line.init, line.form, line.transform, *line.rules, line.outer, line.optimizer)
    for module in dict.fromkeys(part.__module__ for part in parts if part is not None):
        doc = (sys.modules[module].__doc__ or "").partition("\nExample:")[0]
        yield f"\n{module}\n{textwrap.indent(textwrap.dedent(doc).strip(), '  ')}"


def _yaml(value: Any) -> str:
    """A value as a recipe file has it, which is JSON too."""
    return json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)


def method_table() -> str:
    table = Table(box=None, header_style="", pad_edge=False)
    for title in ("id", "what it does", "arXiv", "export", "lr·s"):
        table.add_column(title, no_wrap=title == "id", min_width=10 if title == "arXiv" else None)
    found = method_data(list(METHODS.values()))
    for m in found:
        prior = "unknown" if m["lr_s"] is None else f"{m['lr_s']:.1e}"
        table.add_row(m["id"], m["summary"], m["arxiv"] or "–", m["export"], prior)
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table)
    unread = ", ".join(m["id"] for m in found if m["unverified"])
    ranks = " or ".join(map(str, recommended.RANKS))
    notes = [
        "`loralign methods lora-ga` shows one in full. Mixes: `method: lora-ga + lora-rite`.",
        "lr·s: learning rate times the scale s on B·A, a prior at hidden size 2000; `loralign plan` scales it.",
        *([f"Reconstructions, of papers that could not be read in full: {unread}."] if unread else []),
        f"`method: {recommended.NAME}` takes `{recommended.METHOD}` of rank {ranks}, as the memory has room, where "
        f"rows are gone through at most once ({recommended.RECORD}).",
    ]
    rows = [line.rstrip() for line in out.getvalue().splitlines()]
    wrapped = (textwrap.wrap(note, WIDTH, break_on_hyphens=False, break_long_words=False) for note in notes)
    return "\n".join([*rows, "", *chain.from_iterable(wrapped)])
