"""Rows of any shape as JSON text in one Arrow column: no row lends another its keys, nulls, order or types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from loralign.types import LoralignError

Row = dict[str, Any]
Item = TypeVar("Item")

CHUNK = 1000
TEXT = pa.large_string()


@dataclass(frozen=True)
class Rows:
    """Rows in memory, in their order; each is parsed when it is asked for.

    name: what errors call them. columns: every name that some row has, whether kept here or not.
    """

    name: str
    columns: tuple[str, ...]
    texts: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Row:
        found: Row = json.loads(self.texts[i].as_py())
        return found

    def __iter__(self) -> Iterator[Row]:
        return (json.loads(text.as_py()) for text in self.texts)

    def select(self, indices: Sequence[int]) -> Rows:
        return replace(self, texts=self.texts.take(pa.array(indices, pa.int64())))


class Doubled(ValueError):
    """A key that stands twice in one object, of which Python's json takes the last without a word."""


def from_json(text: str) -> Any:
    """What JSON text holds.

    Raises:
        Doubled: a key stands twice in one object.
        ValueError: it is no JSON; RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice, (first, value) = next(key for key in keys if keys.count(key) > 1), pairs[0]
        shown = json.dumps(value, ensure_ascii=False)[:30]
        raise Doubled(f"the key {twice!r} stands twice in the object that begins with {first!r}: {shown} …; keep one")
    return found


def collected(rows: Iterable[Row], name: str, columns: Iterable[str] = ()) -> Rows:
    """The rows as JSON text; columns: names that the rows have beside those seen."""
    seen = dict.fromkeys(columns)
    parts: list[pa.Array] = []
    first = 1
    for chunk in chunks(rows):
        for row in chunk:
            seen |= dict.fromkeys(row)
        parts.append(pa.array([_text(row, f"{name}, row {n}") for n, row in enumerate(chunk, first)], TEXT))
        first += len(chunk)
    return Rows(name, tuple(seen), pa.chunked_array(parts, TEXT))


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of at most CHUNK items."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _text(row: Row, where: str) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=_foreign).encode()
    except UnicodeEncodeError as error:
        raise LoralignError(f"{where} holds half a character (a lone surrogate): write it as UTF-8 text") from error
    except RecursionError as error:
        raise LoralignError(f"{where} is nested too deeply: write its text flat") from error


def _foreign(value: Any) -> Any:
    """A value that JSON has no form for; where text is needed, it is refused as no text."""
    return {"type": type(value).__name__}
