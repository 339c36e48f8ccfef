"""YAML as people mean it: 1e-4 is a number, a key that stands twice is an error, and `key=value` edits a tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from loralign.types import LoralignError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers as YAML 1.2 does."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises LoralignError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LoralignError(f"no such recipe file: {path}; examples/ holds some to copy") from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise LoralignError(f"cannot read {path}: {why}") from error
    content = _value(text, path.name)
    if not isinstance(content, dict) or any(not isinstance(key, str) for key in content):
        raise LoralignError(f"{path.name} is no recipe: it should hold lines of `key: value`, such as `model: …`")
    return content


def _value(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        mends = {"stands twice": "keep one", "\\t": "use spaces, no tabs"}
        said = str(error.problem)
        mend = next((mends[part] for part in mends if part in said), "write `key: value`, lists as [a, b]")
        raise LoralignError(f"{where}{line}: {error.problem or 'broken YAML'}; {mend}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise LoralignError(f"{where}: {str(error).splitlines()[0]}") from error


def override(content: dict[str, Any], text: str) -> None:
    """Apply one `key=value` in place: the key is dotted, the value YAML."""
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise LoralignError(f"--set {text!r}: write key=value, for instance --set train.steps=10")
    for i, part in enumerate(parts[:-1]):
        inner = content.setdefault(part, {})
        if inner is None:
            inner = content[part] = {}
        if not isinstance(inner, dict):
            raise LoralignError(f"--set {text!r}: `{'.'.join(parts[: i + 1])}` is {inner!r}, it has no keys inside")
        content = inner
    content[parts[-1]] = _value(value, f"--set {key}")
