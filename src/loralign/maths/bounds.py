"""Numbers with bounds, said once: in the signature of a factory. Recipe files, schema and `bounded` read them there."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from annotated_types import Interval

from loralign.types import LoralignError

P = ParamSpec("P")
T = TypeVar("T")

Positive = Annotated[float, Interval(gt=0, le=1e30)]
NotNegative = Annotated[float, Interval(ge=0, le=1e30)]
Beta = Annotated[float, Interval(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
Share = Annotated[float, Interval(ge=0, lt=1)]
Epsilon = Annotated[float, Interval(gt=0, le=1)]
AtLeastOne = Annotated[float, Interval(ge=1, le=1e3)]
Count = Annotated[int, Interval(ge=1, le=10**6)]
Steps = Annotated[int, Interval(ge=0, le=10**9)]
Place = Annotated[int, Interval(ge=0, le=10**6)]
MomentumDtype = Literal["float32", "bfloat16"]
"""What the first moment is kept in. A second moment stays fp32: it changes by a thousandth of itself in a step, and
bf16 resolves 1/256."""


def bounded(factory: Callable[P, T]) -> Callable[P, T]:
    """The factory, which raises LoralignError for an argument outside of what its annotation allows."""

    @functools.wraps(factory)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        hints = _hints(factory)
        for name, value in inspect.signature(factory).bind(*args, **kwargs).arguments.items():
            if wrong := outside(hints.get(name), value):
                raise LoralignError(f"{name} must be {wrong}, not {str(value)[:60]}")
        return factory(*args, **kwargs)

    return checked


@functools.cache
def _hints(factory: Callable[..., Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(factory, include_extras=True)


def outside(kind: Any, value: Any) -> str:
    """What the annotation asks for, where `value` is not that; "" where it is, or where nothing is asked."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        said = [outside(a, value) for a in args if a is not type(None)]
        return "" if (value is None and type(None) in args) or "" in said else " or ".join(said)
    if origin is Literal:
        return "" if value in args else ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is tuple and Ellipsis not in args:
        if not isinstance(value, (tuple, list)) or len(value) != len(args):
            return f"{len(args)} numbers"
        return next((f"{len(args)} numbers, each {wrong}" for a, v in zip(args, value, strict=True)
                     if (wrong := outside(a, v))), "")  # fmt: skip
    if origin is not Annotated:
        return ""
    limits = next((m for m in args[1:] if isinstance(m, Interval)), None)
    if limits is None:
        return outside(args[0], value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and (args[0] is int or not isinstance(value, float) or not math.isfinite(value)):
        return f"a {'whole' if args[0] is int else 'finite'} number {_said(limits)}"
    return "" if _within(limits, value) else _said(limits)


def _within(limits: Interval, value: Any) -> bool:
    return (
        (limits.gt is None or value > limits.gt)
        and (limits.ge is None or value >= limits.ge)
        and (limits.lt is None or value < limits.lt)
        and (limits.le is None or value <= limits.le)
    )


def _said(limits: Interval) -> str:
    words = {"above": limits.gt, "at least": limits.ge, "below": limits.lt, "at most": limits.le}
    return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)
