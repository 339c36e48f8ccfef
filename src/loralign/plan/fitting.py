"""The first of several candidates that the memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from loralign.types import LoralignError

T = TypeVar("T")
ROOM = 0.9
"""The share of the memory that a plan may take; the allocator needs the rest."""


def first_fitting(
    candidates: Iterable[T], peak: Callable[[T], int], memory: float, refusal: Callable[[int], str]
) -> tuple[T, int]:
    """The first candidate whose peak bytes fit into `memory` bytes, and these.

    Raises:
        LoralignError: none does; `refusal` says so of the least peak.
    """
    needs = []
    for candidate in candidates:
        needs.append(peak(candidate))
        if needs[-1] <= ROOM * memory:
            return candidate, needs[-1]
    raise LoralignError(refusal(min(needs)))
