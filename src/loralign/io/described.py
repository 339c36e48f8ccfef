"""A recipe as flat plain data, equal in every process: what it is bound by, studies and resumed runs compare it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def described(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Flat (key, plain value) pairs. Fields at their default are left out, so that a new one changes no old study, and
    those that do not compare (`field(compare=False)`), since they say nothing of what is computed."""
    inner = f"{name}." if name else ""
    if is_dataclass(value) and not isinstance(value, type):
        if name:
            yield name, type(value).__qualname__
        for f in fields(value):
            held = getattr(value, f.name)
            if f.name != "seed" and f.compare and not _is_default(f, held):
                yield from described(held, inner + f.name)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from described(value[key], f"{inner}{key}")
    elif isinstance(value, list | tuple | frozenset | set):
        items = sorted(value, key=str) if isinstance(value, frozenset | set) else value
        for i, item in enumerate(items):
            yield from described(item, f"{inner}{i}")
    elif value is None or isinstance(value, str | int | float | bool):
        yield name, value
    elif callable(value) and hasattr(value, "__code__"):
        yield from _function(value, name)
    else:
        yield name, type(value).__qualname__
        yield from described({k: v for k, v in getattr(value, "__dict__", {}).items() if k[0] != "_"}, name)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Key, old and new value of the first setting that differs; a missing one is None.

    Facts follow from type and options, and their list grows with the code: one that a side does not name is no
    difference.
    """
    for key in dict.fromkeys((*old, *new)):
        if {"facts", "accepts"} & set(key.split(".")) and (key not in old or key not in new):
            continue
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _function(function: Callable[..., Any], name: str) -> Iterator[tuple[str, Any]]:
    yield name, function.__qualname__
    cells = getattr(function, "__closure__", None) or ()
    for variable, cell in zip(function.__code__.co_freevars, cells, strict=True):
        yield from described(cell.cell_contents, f"{name}.{variable}")


def _is_default(field: Any, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return default is not MISSING and type(default) is type(value) and bool(default == value)
