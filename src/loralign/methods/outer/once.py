"""One episode: train from start to end, commit nothing.

    W_eff = W0 + s·B·A   throughout

Shapes:  none.
Source:  the usual single run; the degenerate case K = 1 of every chain.
Differs: none.
Cost:    none.
Export:  exact.
Args:    none.
Example:
    >>> from loralign.methods.outer.once import once
    >>> once().episode(1, 100, (), None) is None
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loralign.types import Draw, Episode, Facts


@dataclass(frozen=True)
class Once:
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        return Episode(0, total_steps, reset=False) if index == 0 else None


def once() -> Once:
    """A single episode."""
    return Once()
