"""What is wrong with a recipe file, in one sentence with the mend."""

from __future__ import annotations

import difflib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from loralign.config.foreign import FOREIGN, INSTEAD
from loralign.types import LoralignError

T = TypeVar("T", bound=BaseModel)


def validated(
    section: type[T],
    content: Mapping[str, Any],
    name: str,
    kind: str = "a recipe",
    options: Callable[[], frozenset[str]] = frozenset,
) -> T:
    """The keys of a file as an object. name: of the file, said in errors. kind: what it is. options: as in `sentence`,
    asked for only where something is wrong."""
    try:
        return section.model_validate(dict(content))
    except ValidationError as error:
        said = sentence(error, section, options()).replace("key of a recipe", f"key of {kind}")
        raise LoralignError(f"{name}: {said}") from error


def sentence(
    error: ValidationError, model: type[BaseModel], options: frozenset[str] = frozenset(), *, prefix: str = ""
) -> str:
    """One thing that is wrong, an unknown key before others, and the keys of the rest.

    options: names that belong under `options`. prefix: of every key in the sentence.
    """
    keys = dict(dotted(model))
    by_path: dict[str, list[Any]] = {}
    for one in error.errors():
        by_path.setdefault(_path(one["loc"], keys), []).append(one)
    (path, wrong), *rest = sorted(by_path.items(), key=lambda one: not _is_unknown(one[0], one[1][0], keys))
    telling = next((one for one in wrong if not _is_type_error(one)), wrong[0])  # of a union's branches
    missing = [prefix + p for p, found in rest if _is_missing(p, found[0])]
    others = [prefix + p for p, _ in rest if prefix + p not in missing]
    more = "; ".join(f"{what}: {_few(n)}" for what, n in (("also wrong", others), ("missing", missing)) if n)
    return f"`{prefix}{path}` {_said(path, telling, keys, options)}" + (f" ({more})" if more else "")


def _few(names: Sequence[str]) -> str:
    said = ", ".join(f"`{name if len(name) <= 40 else name[:37] + '…'}`" for name in names[:3])
    return said + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_unknown(path: str, one: Any, keys: Mapping[str, FieldInfo]) -> bool:
    return one["type"] == "extra_forbidden" and path not in keys


def _is_missing(path: str, one: Any) -> bool:
    return one["type"] == "missing" and path == ".".join(map(str, one["loc"]))


def dotted(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a model, sections included: train, train.steps, …"""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if _is_section(field.annotation):
            yield from dotted(typing.cast(type[BaseModel], field.annotation), f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _path(loc: tuple[Any, ...], keys: Mapping[str, FieldInfo]) -> str:
    """The dotted key of an error; what pydantic appends for branches of a union and items of a list is dropped."""
    parts = [str(part) for part in loc]
    known = next((i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in keys), 0)
    inside = known == 0 or _is_section(keys[".".join(parts[:known])].annotation)
    if not inside and typing.get_origin(keys[".".join(parts[:known])].annotation) is dict:
        known += 1
    return ".".join(parts if inside else parts[:known])


def _is_type_error(one: Any) -> bool:
    return str(one["type"]).endswith(("_type", "_parsing", "int_from_float")) or one["type"] == "literal_error"


def _said(path: str, one: Any, keys: Mapping[str, FieldInfo], options: frozenset[str]) -> str:
    if _is_unknown(path, one, keys):
        return f"is no key of a recipe; {_nearest(path, keys, options)}"
    if _is_missing(path, one):
        description = keys[path].description if path in keys else None
        first = " ".join((description or "").split()).partition(". ")[0].rstrip(".")
        return "is missing" + (f": {first[0].lower()}{first[1:]}" if first else "")
    if one["type"] in ("missing", "extra_forbidden", "unexpected_keyword_argument", "too_long", "too_short"):
        return f"must be {_wanted(path, keys)}: {one['msg'].lower()} at {one['loc'][-1]}"
    if one["type"] == "value_error":
        given = "" if isinstance(one["input"], Mapping) else f" ({_short(one['input'])})"
        return one["msg"].removeprefix("Value error, ") + given
    if one["type"] == "string_too_short":
        return "is empty: leave it out, or say what it is"
    if one["type"] == "string_too_long":
        return f"is too long: at most {one['ctx']['max_length']} characters, not {len(one['input']):,}"
    said = _wanted(path, keys) if _is_type_error(one) else one["msg"].removeprefix("Input should be ")
    return f"must be {said}, not {'empty' if one['input'] is None else _short(one['input'])}"


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:57] + "…"


def _wanted(path: str, keys: Mapping[str, FieldInfo]) -> str:
    if path in keys:
        return expected(keys[path].annotation)
    holder = keys[path.rsplit(".", 1)[0]].annotation  # a value in a mapping
    return expected(typing.get_args(holder)[1])


def _nearest(path: str, keys: Mapping[str, FieldInfo], options: frozenset[str]) -> str:
    leaf = path.rsplit(".", 1)[-1]
    same = [key for key in keys if key.rsplit(".", 1)[-1] == leaf]
    if same or FOREIGN.get(leaf) in keys:
        return f"it is called `{same[0] if same else FOREIGN[leaf]}` here"
    if leaf in INSTEAD:
        return INSTEAD[leaf]
    if leaf in options:
        return f"it belongs under `options`: `options.{leaf}`"
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in sorted(keys, reverse=True)}
    section = path[: -len(leaf)]
    here = [key[len(section) :] for key in keys if key.startswith(section) and "." not in key[len(section) :]]
    here = here or [key for key in keys if "." not in key]  # a name with dots
    sibling = difflib.get_close_matches(leaf, here, n=1, cutoff=0.6)
    near = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)
    if sibling or near:
        return f"did you mean `{section + sibling[0] if sibling else by_leaf[near[0]]}`?"
    return f"the keys there are {', '.join(here)}"


def doubled(names: Iterable[str]) -> str:
    """What is wrong where two tasks of a file have one name, else ""."""
    name = next((name for name, count in Counter(names).items() if count > 1), None)
    return "" if name is None else f"two tasks are called {name!r}: give one of them another `name`"


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "empty"}


def expected(annotation: Any) -> str:
    """A type in plain words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return expected(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(a) for a in args if a is not type(None))
    if origin in (list, Sequence) or (origin is tuple and args[-1] is Ellipsis):
        of = expected(args[0])
        return f"a list of ({of})" if " or " in of else f"a list of {of.removeprefix('a ')}"
    if origin is tuple:
        return f"a list of {len(args)} values ({', '.join(expected(a) for a in args)})"
    return "a section of `key: value` lines"
