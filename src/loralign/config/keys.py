"""The keys of a file, to be read: what each takes, its default, what it means."""

from __future__ import annotations

import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from loralign.config.errors import expected

WIDTH = 110


def keys_text(model: type[BaseModel]) -> str:
    """Every key with its type, its default and its description; those of sections and of items of a list are indented.

    Example:
        >>> from loralign.config.sections import RunFile
        >>> print(keys_text(RunFile).splitlines()[0])
        model: text, required
    """
    return "\n".join(_lines(model, ""))


def _lines(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner, many = _section(field.annotation)
        kind = expected(field.annotation)
        if inner:
            kind = kind.replace(" of `key: value` lines", "").replace("list of section", "list of sections")
        yield f"{indent}{name}: {kind}{_default(field, bool(inner) and not many)}"
        yield from textwrap.wrap(
            " ".join((field.description or "").split()), WIDTH, initial_indent=indent + "    ",
            subsequent_indent=indent + "    ", break_on_hyphens=False,
        )  # fmt: skip
        if inner:
            yield from _lines(inner, indent + "    ")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a key holds, alone or as items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = typing.get_origin(annotation) in (list, tuple)
    for part in typing.get_args(annotation):
        inner, listed = _section(part)
        if inner:
            return inner, many or listed
    return None, False


def _default(field: FieldInfo, section: bool) -> str:
    if field.is_required():
        return ", required"
    value = field.get_default(call_default_factory=True)
    if section or value is None:
        return ""
    return f", default {json.dumps(to_jsonable_python(value), ensure_ascii=False)}"
