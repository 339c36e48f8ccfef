"""One process at a time writes into an output folder: a lock beside it, released by the system when its owner dies."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from loralign.io.json_file import parsed
from loralign.types import LoralignError

try:
    import fcntl
except ImportError:  # a system without these locks
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("loralign")
_HELD: set[Path] = set()
"""Folders that this process holds: a run exports into its own."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process of loralign writes into `folder`. Raises LoralignError where one does already.

    Of several processes of one run the first one holds the lock. Where the system has no locks there is none.
    """
    target = folder.absolute().parent.resolve() / folder.absolute().name
    if fcntl is None or target in _HELD or os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [p for p in target.parents if not p.exists()]
    handle = _taken(target)
    if handle is None:
        yield
        return
    _HELD.add(target)
    try:
        yield
    finally:
        _HELD.discard(target)
        lock_of(target).unlink(missing_ok=True)
        handle.close()
        for parent in made:  # a run that was refused leaves no folder behind
            with suppress(OSError):
                parent.rmdir()


def lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _taken(target: Path) -> IO[Any] | None:
    """The locked file, None where none can be made."""
    path = lock_of(target)
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
        except OSError as error:
            if os.access(target, os.W_OK | os.X_OK):  # else nothing can be written into it either, which will be said
                _warn(target, error)
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            handle.close()
            raise LoralignError(
                f"another run ({owner}) is writing into {target.name}: wait for its end, or name another output folder"
            ) from None
        except OSError as error:
            handle.close()
            _warn(target, error)
            return None
        if path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino:  # not one just being removed
            with suppress(OSError):  # a full disk: the lock holds without a name in it
                os.ftruncate(handle.fileno(), 0)
                os.write(handle.fileno(), json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            return handle
        handle.close()


def _warn(target: Path, error: OSError) -> None:
    log.warning("no lock can be had beside %s (%s): see to it that no other run writes into it", target.name, error)


def _owner(handle: IO[Any]) -> str:
    handle.seek(0)
    try:
        said = parsed(handle.read())
        return f"process {said['pid']} on {said['host']}"
    except (ValueError, KeyError, TypeError):
        return "just starting"
