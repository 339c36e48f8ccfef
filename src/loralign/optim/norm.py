"""The norm of a step's gradient, and what rules expect of it: read at once, or later, while the device is still on its
way there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loralign.types import WorkFailed


class Coming:
    """A number that is copied to the host behind what the device has to do; only `value` waits for it."""

    def __init__(self, number: Tensor) -> None:
        self.number = number
        self.event: Any = None
        if number.is_cuda:
            self.number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def value(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return self.number.item()


class Norm(Coming):
    """Of one step."""

    def __init__(self, step: int, norm: Tensor) -> None:
        super().__init__(norm)
        self.step = step


class Norms:
    """Of a run's steps.

    late: what a step leaves to be read is read when the next one begins, at the latest; whoever writes checkpoints
    calls `check`.
    Where it is not finite, every factor is as it was before that step when the error is raised.
    drop: forgets the moments, which have seen such a gradient.
    """

    def __init__(self, drop: Callable[[], None]) -> None:
        self.drop, self.late = drop, False
        self.last = float("nan")
        self._unread: tuple[Norm, list[Tensor], tuple[Tensor, ...]] | None = None
        """With what that step moved, and how it was before."""
        self._expected: list[tuple[Coming, str]] = []

    def judge(self, norm: Norm | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Of a step that is about to move what has a gradient: now, or later."""
        if norm is None or not self.late:
            self.read(norm)
            return
        moved = [p.data for group in groups for p in group["params"] if p.grad is not None]
        self._unread = norm, moved, torch._foreach_mul(moved, 1.0)

    def check(self) -> None:
        """Read the last step's, where that was left for later."""
        if self._unread is not None:
            (norm, moved, before), self._unread = self._unread, None
            self.read(norm, lambda: torch._foreach_copy_(moved, before))
        expected, self._expected = self._expected, []
        for holds, why in expected:
            if not holds.value():
                raise WorkFailed(why)

    def expect(self, holds: Tensor, why: str) -> None:
        """Raise this where it does not hold: now, or later."""
        self._expected.append((Coming(holds), why))
        if not self.late:
            self.check()

    def read(self, norm: Norm | None, put_back: Callable[[], object] = lambda: None) -> None:
        """Keep it; where it is not finite, put the factors back and raise."""
        if norm is None:
            return
        self.last = norm.value()
        if not math.isfinite(self.last):
            self.drop()
            put_back()
            raise WorkFailed(
                f"the gradient is not finite at step {norm.step} (norm {self.last}): "
                "lower the learning rate, or look for broken rows in the data"
            )
