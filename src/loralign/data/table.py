"""Rows of any shape as JSON text in one Arrow column: no row lends another its keys, nulls, order or types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from loralign.types import LoralignError

Row = dict[str, Any]
Item = TypeVar("Item")

CHUNK = 1000
TEXT = pa.large_string()
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Places:
    """Where each of some rows stands: which of the sources it is from, and its number there, from 1."""

    sources: tuple[str, ...]
    origins: Integers
    numbers: Integers

    def __getitem__(self, i: int) -> tuple[str, int]:
        return self.sources[self.origins[i]], int(self.numbers[i])

    def said(self, i: int) -> str:
        """As errors say it."""
        return f"{self.sources[self.origins[i]]}, row {self.numbers[i]}"

    def select(self, indices: Sequence[int]) -> Places:
        taken = np.asarray(indices, np.int64)
        return replace(self, origins=self.origins[taken], numbers=self.numbers[taken])

    def counts(self) -> tuple[int, ...]:
        """How many rows are from each source."""
        return tuple(np.bincount(self.origins, minlength=len(self.sources)).tolist())


@dataclass(frozen=True)
class Rows:
    """Rows in memory, in their order; each is parsed when it is asked for.

    name: what errors call them. columns: every name that some row has, whether kept here or not. places: where each
    row stands. called: columns of the source that have another name here, which is its value.
    """

    name: str
    columns: tuple[str, ...]
    texts: pa.ChunkedArray
    places: Places
    called: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Row:
        return self._row(self.texts[i])

    def __iter__(self) -> Iterator[Row]:
        return (self._row(text) for text in self.texts)

    def select(self, indices: Sequence[int]) -> Rows:
        texts = self.texts.take(pa.array(indices, pa.int64()))
        return replace(self, texts=texts, places=self.places.select(indices))

    def _row(self, text: pa.Scalar) -> Row:
        found: Row = json.loads(text.as_py())
        return {self.called.get(k, k): v for k, v in found.items()} if self.called else found


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other; none of them may have names of its own for columns."""
    offsets = accumulate((len(part.places.sources) for part in parts), initial=0)
    places = Places(
        tuple(source for part in parts for source in part.places.sources),
        np.concatenate([part.places.origins + n for part, n in zip(parts, offsets, strict=False)]),
        np.concatenate([part.places.numbers for part in parts]),
    )
    columns = dict.fromkeys(column for part in parts for column in part.columns)
    texts = pa.chunked_array([chunk for part in parts for chunk in part.texts.chunks], TEXT)
    return Rows(", ".join(dict.fromkeys(part.name for part in parts)), tuple(columns), texts, places)


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
    places = Places((name,), np.zeros(first - 1, np.int32), np.arange(1, first))
    return Rows(name, tuple(seen), pa.chunked_array(parts, TEXT), places)


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
