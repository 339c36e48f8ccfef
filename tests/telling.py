"""Work for processes of their own; a light import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any


def killed(tell: Callable[[Any], None]) -> None:
    tell("begun")
    time.sleep(0.2)  # the queue's own thread sends it
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(tell: Callable[[Any], None]) -> None:
    time.sleep(600)
