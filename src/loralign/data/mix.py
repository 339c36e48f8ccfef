"""Which sources rows are from, and how many are taken of each: all of them, or as many as their shares say.

taken of source i = round(share_i · T)      once: T = min_i rows_i / share_i, no row is taken twice
                                            all:  T = max_i rows_i / share_i, every row is taken at least once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Mix = Literal["once", "all"]
ROUNDED = 2e-3
"""How far shares may be from a sum of 1, as thirds with three digits are."""


@dataclass(frozen=True)
class Source:
    """A file, a folder or a hub id. columns: our names -> its own, where they differ. split: of a folder or hub id, or
    a part such as "train[:1000]". share: of the rows of a mix, or None."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    share: float | None = None


@dataclass(frozen=True)
class Part:
    """What is taken of a source. rows: that it has; taken: rows of the mix, each counted as often as it is there."""

    source: Source
    rows: int
    taken: int

    @property
    def times(self) -> int:
        """How often a row is taken at most."""
        return -(-self.taken // self.rows)

    def said(self, all_taken: int) -> str:
        share = f"{self.taken:,} of {self.rows:,} rows of {self.source.name} ({100 * self.taken / all_taken:.1f} %"
        return share + (f", each up to {self.times} times)" if self.times > 1 else ")")


def sources_of(given: str | Path | Source | Sequence[Source]) -> tuple[Source, ...]:
    """One source may be given by its name alone."""
    if isinstance(given, str | Path):
        return (Source(str(given)),)
    return (given,) if isinstance(given, Source) else tuple(given)


def share_faults(sources: Sequence[Source]) -> str:
    """What is wrong with a list of sources, whatever their rows are; "" where nothing is."""
    if not sources:
        return "is empty: name a file, a folder or a hub id"
    shares = [source.share for source in sources]
    given = [share for share in shares if share is not None]
    if given and len(sources) == 1:
        return f"has one source, {sources[0].name}, and a share of it: leave `share` out"
    if given and len(given) < len(shares):
        lacking = next(source.name for source in sources if source.share is None)
        return f"has sources with a share, and {lacking} without: give one to each, or to none (all rows of all)"
    if given and abs(sum(given) - 1) > ROUNDED:
        would = ", ".join(f"{share / sum(given):.3g}" for share in given)
        return f"has shares that sum to {sum(given):.4g}, not to 1: {would} would"
    seen: set[tuple[object, ...]] = set()
    for source in sources:
        path = Path(source.name).expanduser()
        key = (path.resolve() if path.exists() else source.name, source.split, tuple(sorted(source.columns.items())))
        if key in seen:
            return f"names {source.name} twice: name it once, and give it a larger `share` if it is to weigh more"
        seen.add(key)
    return ""


def taken(rows: Sequence[int], shares: Sequence[float | None], mix: Mix) -> list[int]:
    """How many rows are taken of each source; see the module. Without shares: all."""
    given = [share for share in shares if share is not None]
    if not given:
        return list(rows)
    whole = [n * sum(given) / share for n, share in zip(rows, given, strict=True)]
    total = min(whole) if mix == "once" else max(whole)
    return [round(total * share / sum(given)) for share in given]
