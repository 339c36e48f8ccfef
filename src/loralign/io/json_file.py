"""JSON that others wrote: whatever is wrong with it is a ValueError, also a nesting that is too deep for the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parsed(text: str | bytes) -> Any:
    """The value that a text says."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value that a file says; OSError where it cannot be read."""
    return parsed(path.read_text(encoding="utf-8"))
