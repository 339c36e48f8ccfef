"""A time limit for what others wrote: patterns, templates. `stored.py` reads this file by its path."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def within(seconds: float, error: Exception) -> Iterator[None]:
    """Raise the error where the block takes longer; in the main thread, where alarms arrive. An alarm that was set
    before rings at its own time, after the block at the earliest.

    Example:
        >>> with within(0.01, TimeoutError("for ever")):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
        TimeoutError: for ever
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise error

    before, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3))
