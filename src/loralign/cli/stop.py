"""Signals that end a command: an orderly stop, its exit code and its sentence. Imports nothing that takes time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
RESUMED = ("train", "tasks")
"""Commands that `--resume` goes on with."""


class Stopped(KeyboardInterrupt):
    """A kind of its own: CPython notes a plain KeyboardInterrupt that passes a string given to `exec`, as libraries do
    while they load, and ends the process by SIGINT in the end, whatever the exit code was."""


class Signals:
    """SIGINT (Ctrl-C), SIGTERM and SIGHUP raise Stopped in the main thread, and are remembered: a library may turn the
    exception into one of its own."""

    def __init__(self) -> None:
        self.received = 0
        self.output: Path | None = None
        """The folder of a run, once it is known."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        raise Stopped

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within: these signals are answered; not SIGHUP where it is ignored, as `nohup` wants it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPS}
        kept = [n for n, handler in before.items() if n == signal.SIGINT or handler != signal.SIG_IGN]
        for number in kept:
            signal.signal(number, self)
        try:
            yield
        finally:
            for number in kept:
                signal.signal(number, before[number])

    @property
    def code(self) -> int:
        return 128 + (self.received or signal.SIGINT)

    def answer(self, words: Sequence[str]) -> str:
        """The sentence about a stopped command."""
        number = self.received or signal.SIGINT
        said = "stopped" + ("" if number == signal.SIGINT else f" by {signal.Signals(number).name}")
        command = next((word for word in words if not word.startswith("-")), "")
        if command == "compare":
            return f"{said}; the same command goes on where it was"
        if command not in RESUMED:
            return said
        if "--resume" in words or (self.output is not None and any(p.is_file() for p in self.output.rglob("*"))):
            return f"{said}; `--resume` goes on from what was saved"
        return f"{said}; nothing was saved yet, the same command begins anew"
