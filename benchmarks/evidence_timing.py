"""Shared by the parts of bench_evidence.py: clocks, the best of interleaved repeats, a table of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bench_step import seconds

from loralign import Recipe, build

Row = dict[str, Any]


def recipe(name: str, options: Mapping[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options, **fields)
    assert isinstance(made, Recipe)
    return made


def clock(device: str) -> float:
    """Seconds: of the wall on a GPU, after it has finished; of this process on the CPU, which others may share."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def best(kinds: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Seconds of each kind, interleaved, the best of `repeats`."""
    found = dict.fromkeys(kinds, float("inf"))
    for _ in range(repeats):
        for kind, run in kinds.items():
            found[kind] = min(found[kind], seconds(run, device))
    return found


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; a new head wherever the keys change."""
    heads: list[list[str]] = []
    groups: list[list[list[str]]] = []
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        if not heads or heads[-1] != list(row):
            heads.append(list(row))
            groups.append([heads[-1]])
        groups[-1].append(cells)
    return "\n".join(_aligned(lines) for lines in groups)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    pairs = [list(zip(line, wide, strict=True)) for line in lines]
    return "\n".join(f"{p[0][0]:{p[0][1]}}  " + "  ".join(f"{c:>{w}}" for c, w in p[1:]) for p in pairs)
