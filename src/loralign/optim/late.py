"""Collections that are only made where somebody looks: most rules look at a moment and find that it is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
C = TypeVar("C", bound=Mapping[Any, Any] | Sequence[Any])


class Late(Generic[C]):
    """What both kinds have: they are made when they are first read."""

    def __init__(self, make: Callable[[], C]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> C:
        return self._make()

    def __getitem__(self, key: Any) -> Any:
        return self._made[key]

    def __len__(self) -> int:
        return len(self._made)


class LateMapping(Late[Mapping[K, V]], Mapping[K, V]):
    def __iter__(self) -> Iterator[K]:
        return iter(self._made)


class LateSequence(Late[Sequence[V]], Sequence[V]):
    pass
