"""Tables and the health check of the command line."""

from __future__ import annotations

import io
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from loralign.carrier.slot_check import self_test
from loralign.methods.table import METHODS
from loralign.types import LoralignError


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
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n\n" + notes


def diagnose() -> tuple[list[str], bool]:
    """What is installed and whether it works: lines, and whether all is well."""
    found = [_requirement(Requirement(text)) for text in requires("loralign") or ()]
    lines, healthy = [line for line, _ in found if line], all(ok for _, ok in found)
    lines += _devices()
    try:
        self_test()
        lines.append("ok     adapter layers: forward, merge and save agree")
    except (LoralignError, RuntimeError, AttributeError, TypeError) as error:
        lines.append(f"WRONG  adapter layers: {error}")
        healthy = False
    return [*lines, "All is well." if healthy else "Something is wrong, see the lines above."], healthy


def _requirement(wanted: Requirement) -> tuple[str, bool]:
    """A line about one requirement; those of extras may be missing."""
    extra = re.search(r'extra == "(\w+)"', str(wanted.marker or ""))
    if extra and extra.group(1) == "dev":
        return "", True
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        mend = (
            f"pip install 'loralign[{extra.group(1)}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
        )
        return f"{'absent' if extra else 'WRONG '} {wanted.name}: {mend}", extra is not None
    if not wanted.specifier.contains(installed, prereleases=True):
        return f"WRONG  {wanted.name} {installed}: loralign is tested with {wanted.specifier}", False
    return f"ok     {wanted.name} {installed}", True


def _devices() -> list[str]:
    lines = [f"ok     CPU: {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(f"ok     GPU {i}: {p.name}, {p.total_memory / 1e9:.0f} GB, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("ok     MPS (not tested)")
    return lines
