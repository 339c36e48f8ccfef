"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a file beside `path` that takes its place at the end, flushed to disk: a reader sees the old
    content or the new one, never half of it. Nothing is left of it where the block fails.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note")
        >>> with replacing(path) as beside:
        ...     _ = beside.write_text("whole")
        ...     path.exists()
        False
        >>> path.read_text()
        'whole'
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) == beside:
            error.filename = str(path)  # people know the file, not what is beside it
        raise
    finally:
        with suppress(OSError):
            beside.unlink()
