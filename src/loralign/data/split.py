"""Rows held out for evaluation by their content, and fingerprints of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datasets import Dataset

from loralign.data.mix import Source
from loralign.data.sources import read_source
from loralign.data.table import Row, Rows
from loralign.types import LoralignError


def split_eval(rows: Rows, held_out: float | str | Path | Source, *, seed: int) -> tuple[Rows, Rows]:
    """(training rows, evaluation rows), both in the order they had.

    held_out: a share in (0, 1) of the rows, or a source whose rows are all for evaluation. A share goes by a hash of
    each row's content keyed by the seed: the order of the rows doesn't matter, rows that say the same stay on one side
    (of several sources in different formats, too), and no more than the share is held out.
    """
    if isinstance(held_out, str | Path | Source):
        return rows, read_source(held_out)
    if not 0 < held_out < 1:
        raise LoralignError(f"eval {held_out} is no share: give a number between 0 and 1, or a file")
    groups: dict[bytes, tuple[bytes, list[int]]] = {}
    for i, row in enumerate(rows):
        key = blake2b(_as_bytes(row), digest_size=16, key=str(seed).encode()).digest()
        said = blake2b(_as_bytes(_said(row)), digest_size=16).digest()
        first, rows_alike = groups.get(said, (key, []))
        rows_alike.append(i)
        groups[said] = (min(first, key), rows_alike)
    chosen: set[int] = set()
    for _, rows_alike in sorted(groups.values()):
        if len(chosen) + len(rows_alike) <= round(held_out * len(rows)):
            chosen.update(rows_alike)
    held = sorted(chosen)
    kept = [i for i in range(len(rows)) if i not in chosen]
    if not kept or not held:
        side = "training" if held else "evaluation"
        raise LoralignError(
            f"eval {held_out} of the {len(rows)} rows of {rows.name} leaves no {side} row "
            f"({len(groups)} of them differ): give another share, more rows, or a file"
        )
    return rows.select(kept), replace(rows.select(held), name=f"the held-out rows of {rows.name}")


def _said(row: Row) -> list[Any]:
    """What a row of any format says: its text or its turns, and what else there is."""
    whole = next((row[key] for key in ("messages", "text") if key in row), None)
    if whole is None:
        whole = row["prompt"] + row["completion"]
    return [whole, {k: v for k, v in row.items() if k not in ("messages", "text", "prompt", "completion")}]


def fingerprint(rows: Rows | Dataset, *settings: Any) -> str:
    """A hash of the rows, in order, and of settings (plain values, paths, dataclasses); equal on every machine."""
    digest = blake2b(digest_size=16)
    for part in (*settings, len(rows)):
        _add(digest, _as_bytes(part))
    for row in rows:
        _add(digest, _as_bytes(row))
    return digest.hexdigest()


def _add(digest: blake2b, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _as_bytes(value: Any) -> bytes:
    return _as_json(value).encode("utf-8", "surrogatepass")


def _as_json(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"dataclass": type(value).__name__, **asdict(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path | bytes) or type(value).__module__ == "datetime":
        return repr(value)
    raise TypeError(f"{type(value).__name__} has no stable fingerprint: pass plain values")
