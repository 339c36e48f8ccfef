"""Where a result comes from: versions, the machine in general terms, and json files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loralign.io.json_file import read_json
from loralign.io.public import scrub
from loralign.maths.whole import replacing

log = logging.getLogger("loralign")

PACKAGES = ("loralign", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "safetensors",
            "bitsandbytes", "torchao")  # fmt: skip


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


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(content)


_OURS = "log.jsonl|ranks.jsonl|run.json|README.md|begun.json|loralign.json|loralign_state.safetensors"
_LEFT = re.compile(rf"\.({_OURS})\.\d+(\.tmp)?|\.checkpoint-\d+\.removed")


def remove_left(folder: Path) -> list[Path]:
    """Half files that a kill left in a run's folder; call it while the folder is locked. Returns left folders."""
    places = [folder, folder / "checkpoints", *(folder / "checkpoints").glob("checkpoint-*")]
    left = [p for place in places if place.is_dir() for p in place.iterdir() if _LEFT.fullmatch(p.name)]
    for path in left:
        if path.is_file():
            path.unlink()
    return [p for p in left if p.is_dir()]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(scrub(data), indent=2, ensure_ascii=False) + "\n")


def write_run(folder: Path, facts: Any, *, seconds: Mapping[str, float] | None = None) -> None:
    """`run.json`: what was run (a mapping, or a dataclass such as `Card`), on what, the outcome and the time it took.

    Entries of an earlier call that this one does not name are kept.
    """
    said = dict(facts) if isinstance(facts, Mapping) else dataclasses.asdict(facts)
    took = {} if seconds is None else {"seconds": dict(seconds)}
    write_json(
        folder / "run.json",
        {
            **_before(folder / "run.json"),
            "loralign": versions().get("loralign", "unknown"),
            **said,
            **took,
            "environment": environment(),
        },
    )


def _before(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    log.warning("%s was damaged: it is written anew", path.name)
    return {}
