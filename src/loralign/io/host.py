"""The memory of this machine, or of the container or group of processes that this one may not outgrow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where the system says what a group of processes may take and takes, and which group this process is in."""


@dataclass(frozen=True)
class Names:
    """How a version of control groups calls the limit, what is in use, and what of it is given up when asked."""

    limit: str
    used: str
    given_up: str


SECOND = Names("memory.max", "memory.current", "inactive_file")
FIRST = Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def host_memory(groups: Path = GROUPS, own: Path = OWN) -> float:
    """All bytes that this process may take."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(min([whole, *(limit for limit, _ in limits(groups, own))]))


def free_host_memory(groups: Path = GROUPS, own: Path = OWN) -> float:
    """Bytes of these that nobody uses now."""
    return float(min([_free(), *(limit - used for limit, used in limits(groups, own))]))


def limits(groups: Path = GROUPS, own: Path = OWN) -> list[tuple[int, int]]:
    """Of every group with a limit that this process is in: the limit, and what its members use of it."""
    found = []
    for folder, names in _folders(groups, own):
        limit = _number(folder / names.limit)
        if limit is not None:
            found.append((limit, (_number(folder / names.used) or 0) - _given_up(folder, names)))
    return found


def _folders(groups: Path, own: Path) -> Iterator[tuple[Path, Names]]:
    """The process's group of either version and all above it; a container sees its own as the root."""
    paths = {"": "/", "memory": "/"}
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        paths |= {kind: path for kind in kinds.split(",") if kind in paths}
    for kind, root, names in (("", groups, SECOND), ("memory", groups / "memory", FIRST)):
        parts = [part for part in paths[kind].split("/") if part not in ("", "..")]
        yield from ((root.joinpath(*parts[:n]), names) for n in range(len(parts) + 1))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _given_up(folder: Path, names: Names) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        return int(dict(line.split() for line in lines).get(names.given_up, 0))
    except (OSError, ValueError):  # a system that does not count
        return 0


def _free(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Of the whole machine; infinite where the system does not say."""
    try:
        told = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return 1024.0 * int(told["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        pages = "SC_AVPHYS_PAGES"
        return float(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")) if pages in os.sysconf_names else float("inf")
