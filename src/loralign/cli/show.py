"""The table of methods, for people and for programs."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from loralign.methods.table import METHODS
from loralign.plan import recommended


def method_data() -> list[dict[str, Any]]:
    """The table as plain data, in its own order."""
    return [
        {
            "id": m.id,
            "summary": m.summary,
            "arxiv": m.arxiv,
            "export": m.export,
            "lr_s": m.prior.lr_s,
            "lr_source": m.prior.source,
            "presets": sorted(m.presets),
            "reference": m.reference,
            "unverified": m.unverified,
        }
        for m in METHODS.values()
    ]


def method_table() -> str:
    table = Table(box=None, header_style="", pad_edge=False)
    for title in ("id", "what it does", "arXiv", "export", "lr·s"):
        table.add_column(title, no_wrap=title == "id", min_width=10 if title == "arXiv" else None)
    for m in method_data():
        prior = "unknown" if m["lr_s"] is None else f"{m['lr_s']:.1e}"
        table.add_row(m["id"], m["summary"], m["arxiv"] or "–", m["export"], prior)
    out = io.StringIO()
    Console(file=out, width=110).print(table)
    unread = ", ".join(m["id"] for m in method_data() if m["unverified"])
    notes = "lr·s: prior at hidden size 2000, `loralign plan` scales it. Mixes: `method: lora-ga + lora-rite`."
    notes += f"\nReconstructions, of papers that could not be read in full: {unread}." if unread else ""
    ranks = " or ".join(map(str, recommended.RANKS))
    notes += f"\n`method: {recommended.NAME}` takes `{recommended.METHOD}` of rank {ranks}, as the memory has room, "
    notes += f"where rows are gone through at most once ({recommended.RECORD})."
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n\n" + notes
