"""Arguments of public functions: what their annotations say, or one sentence that names what belongs there."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from loralign.maths.bounds import outside
from loralign.types import Full, LoralignError

P = ParamSpec("P")
T = TypeVar("T")

NOUNS = {
    "Recipe": "a recipe, made by loralign.build(…),",
    "Module": "a loaded model",
    "PeftModel": "an adapted model, of loralign.adapt(…) or a trainer,",
    "PairOptimizer": "an optimizer, made by loralign.optimizer(…),",
    "Site": "one of loralign.sites(model)",
    "Path": "a path",
    "str": "text",
    "dtype": "a dtype such as torch.bfloat16",
}
"""What a class stands for, by its name: this room knows neither PEFT nor what is above it."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises LoralignError for an argument that is not of its annotation."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a missing or unknown argument: Python names it
            return function(*args, **kwargs)
        hints = _hints(function)
        for name, value in given.items():
            if wanted := misplaced(hints.get(name), value):
                raise LoralignError(
                    f"{function.__name__}() takes {wanted} as `{name}`, not {said(value)}; it is called as "
                    f"{_call(function.__name__, signature)}"
                )
        return function(*args, **kwargs)

    return call


@functools.cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def _call(name: str, signature: inspect.Signature) -> str:
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return f"{name}({', '.join(positional)})"


def said(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Full):
        return f"`{value.name}`, which trains the matrices themselves and has no adapter"
    plain = value is None or isinstance(value, str | numbers.Number)
    return repr(value)[:60] if plain else f"a {value.__name__}" if isinstance(value, type) else _kind(value)


def _kind(value: Any) -> str:
    name = type(value).__name__
    article = "one" if isinstance(value, Mapping) else "an" if name[0] in "AEIOU" else "a"
    return f"{article} {name}"


def native(value: Any) -> Any:
    """A number of numpy as Python's."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def misplaced(kind: Any, value: Any) -> str:
    """What the annotation asks for, where `value` is not that; "" where it is, or where anything may be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return ""
        kinds = [a for a in args if a is not type(None) and not (a is str and Path in args)]
        wanted = [misplaced(a, value) for a in kinds]
        return "" if "" in wanted else " or ".join(dict.fromkeys(wanted))
    if origin is Annotated:
        wrong = outside(kind, native(value))
        return f"a number {wrong}" if wrong and not wrong.startswith("a ") else wrong
    if origin is Literal:
        return outside(kind, value)
    if origin is Callable:
        return "" if callable(value) else "a function"
    if origin is Mapping:
        return "" if isinstance(value, Mapping) else "a dictionary"
    if origin is Iterable:
        fits = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
        return "" if fits else "a list of batches, each a dictionary,"
    if kind is Path:
        return "" if isinstance(value, str | os.PathLike) else NOUNS["Path"]
    if kind is not Any and inspect.isclass(kind) and not getattr(kind, "_is_protocol", False):
        return "" if isinstance(value, kind) else NOUNS.get(kind.__name__, f"a {kind.__name__}")
    return ""
