"""YAML as people mean it: scalars of YAML 1.2, a key that stands twice is an error, `key=value` edits a tree.

What comes out is plain: mappings with text keys, lists, text, finite numbers, booleans and None, of bounded size and
depth. Whoever reads it further need not ask again.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from loralign.types import LoralignError

MOST_BYTES = 1_000_000
MOST_VALUES = 20_000
"""With every alias written out."""
DEEPEST = 40


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, which refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError) as error:
            kind = str(node.tag).rsplit(":", 1)[-1]
            raise _fault(f"this is no {kind} that can be read", node) from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise _fault(f"it merges more than {MOST_VALUES:,} keys", node)


def _fault(said: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if not isinstance(key, str):
            raise _fault("a key is a list or a mapping", key_node)
        if key in seen:
            raise _fault(f"the key {key!r} stands twice", key_node)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0 if text.startswith(("0o", "0x")) else 10)


_CORE = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
for _tag, (_pattern, _first) in _CORE.items():
    _starts = [*_first, *([""] if _tag == "null" else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def read_yaml(path: Path, overrides: Sequence[str] = (), kind: str = "recipe") -> dict[str, Any]:
    """The mapping in a file with `key=value` overrides on top. Raises LoralignError with file and line."""
    try:
        with path.open("rb") as f:
            text = f.read(MOST_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise LoralignError(f"no such {kind} file: {path}; examples/ holds some to copy") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise LoralignError(f"cannot read {path}: {why}; name a {kind} file (YAML)") from error
    if len(text) > MOST_BYTES:
        raise LoralignError(f"{path.name} is no {kind}: it is larger than a megabyte")
    content = value_of(text, path.name)
    if not isinstance(content, dict):
        raise LoralignError(f"{path.name} is no {kind}: it should hold lines of `key: value`, such as `model: …`")
    for override in overrides:
        apply(content, override)
    return content


def value_of(text: str, where: str) -> Any:
    """What YAML text holds; where: said in errors."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        mends = {"stands twice": "keep one", "\\t": "use spaces, no tabs"}
        said = str(error.problem)
        mend = next((mends[part] for part in mends if part in said), "write `key: value`, lists as [a, b]")
        raise LoralignError(f"{where}{line}: {error.problem or 'broken YAML'}; {mend}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise LoralignError(f"{where}: {str(error).splitlines()[0]}; write it as UTF-8 text") from error
    except RecursionError as error:
        raise LoralignError(f"{where} is nested too deeply: a recipe needs three levels") from error
    for number, wrong in enumerate(_wrong(value, "", 0), 1):
        if wrong:
            raise LoralignError(f"{where}: {wrong}")
        if number > MOST_VALUES:
            raise LoralignError(f"{where} holds more than {MOST_VALUES:,} values, aliases written out: write fewer")
    return value


def _wrong(value: Any, key: str, depth: int) -> Iterator[str]:
    """For every value inside, what is wrong with it, or ""."""
    here = f"`{key}`" if key else "it"
    if depth > DEEPEST:
        yield f"{here[:60]} is nested too deeply: a recipe needs three levels"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield f"the key {name!r} is no text: write it in quotes"
            yield _wrong_text(name)
            yield from _wrong(inner, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _wrong(inner, key, depth + 1)
    elif isinstance(value, str):
        yield _wrong_text(value) and f"{here} {_wrong_text(value)}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{here} must be a finite number, not {value}"
    elif value is None or isinstance(value, (bool, int, float, datetime.date)):
        yield ""
    else:
        yield f"{here} is a {type(value).__name__}: write text, numbers, [lists] or {{key: value}}"


def _wrong_text(text: str) -> str:
    """Text that no file name and no tokenizer takes."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        return f"holds a character that is no text ({ascii(text)[:60]}): leave it out"
    return ""


def apply(content: dict[str, Any], text: str) -> None:
    """Apply one `key=value` in place: the key is dotted, the value YAML."""
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    shown = text if len(text) <= 60 else text[:57] + "…"
    if not sign or not all(parts) or len(parts) > DEEPEST:
        raise LoralignError(f"--set {shown!r}: write key=value, for instance --set train.steps=10")
    for i, part in enumerate(parts[:-1]):
        inner = content.setdefault(part, {})
        if inner is None:
            inner = content[part] = {}
        if not isinstance(inner, dict):
            named = repr(inner) if len(repr(inner)) <= 60 else repr(inner)[:57] + "…"
            raise LoralignError(f"--set {shown!r}: `{'.'.join(parts[: i + 1])}` is {named}, it has no keys inside")
        content = inner
    content[parts[-1]] = value_of(value, f"--set {key}")
