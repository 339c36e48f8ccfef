"""The device and the memory at hand."""

from __future__ import annotations

import os
from pathlib import Path


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


def container_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> list[int]:
    """Bytes that this container may take, where there is a limit."""
    try:
        return [int(file.read_text(encoding="ascii"))]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def free_host_memory() -> float:
    """Bytes that nobody uses now."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
