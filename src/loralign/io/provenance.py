"""Where a result comes from: versions, the machine in general terms, and json files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch

PACKAGES = ("loralign", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Installed versions of what computes; packages that are absent are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions and hardware; no user, host or path."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": versions(),
    }


def is_local(name: str) -> bool:
    """Whether a model or data name is a path of this machine rather than a hub id."""
    if not name or PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute() or "\\" in name:
        return bool(name)
    return name[0] in "~." or name.endswith("/") or name.count("/") > 1 or Path(name).exists()


def scrub(value: Any) -> Any:
    """The value as plain json data, with local paths cut down to their last part."""
    if isinstance(value, Mapping):
        return {str(k): scrub(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, PurePath) or (isinstance(value, str) and _is_path(value)):
        return PureWindowsPath(value).name
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _is_path(text: str) -> bool:
    """Like `is_local`, but for any text: sentences are not paths, and a relative name may be anything."""
    return " " not in text and (PurePath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text[:1] == "~")


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader sees the old text or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(scrub(data), indent=2, ensure_ascii=False) + "\n")


def write_run(folder: Path, facts: Any, *, seconds: Mapping[str, float] | None = None) -> None:
    """`run.json`: what was run (a mapping, or a dataclass such as `Card`), on what, the outcome and the time it took.

    Entries of an earlier call that this one does not name are kept.
    """
    path = folder / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    said = dict(facts) if isinstance(facts, Mapping) else dataclasses.asdict(facts)
    took = {} if seconds is None else {"seconds": dict(seconds)}
    write_json(
        path,
        {**before, "loralign": versions().get("loralign", "unknown"), **said, **took, "environment": environment()},
    )
