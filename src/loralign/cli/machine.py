"""The device and the memory at hand."""

from __future__ import annotations

import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""Where the system says what a container may take and takes."""


def device_here(device: str) -> str:
    """cuda or cpu, of auto too."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def gpu_memory(mend: str) -> float:
    """All bytes of the first GPU; without one it is said, with `mend`."""
    import torch

    from loralign.types import LoralignError

    if not torch.cuda.is_available():
        raise LoralignError(f"there is no GPU here: say its memory {mend}")
    return float(torch.cuda.get_device_properties(0).total_memory)


def host_memory() -> float:
    """All bytes of this machine, or of this container."""
    return float(min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *container_limit()]))


def container_limit(file: Path = GROUP / "memory.max") -> list[int]:
    """Bytes that this container may take, where there is a limit."""
    try:
        return [int(file.read_text(encoding="ascii"))]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def free_host_memory(group: Path = GROUP) -> float:
    """Bytes that nobody uses now, of this machine or of this container."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(min([free, *(limit - _in_use(group) for limit in container_limit(group / "memory.max"))]))


def _in_use(group: Path) -> int:
    """Bytes of a container, without what the system keeps of files and gives up when asked."""
    try:
        told = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return int((group / "memory.current").read_text(encoding="ascii")) - int(told.get("inactive_file", 0))
    except (OSError, ValueError):  # a system that does not count
        return 0
