"""What is noted of one trial while it trains: the curve, the clock without its evaluations, why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from loralign.train.callback import RecipeCallback

Report = Callable[[int, float], bool]
"""report(step, loss) -> True when the trial should be given up."""

_NOT_METRICS = frozenset(
    {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    | {"epoch"}
)


class Watch(TrainerCallback):
    """Collects the curve; the clock stops while rows are evaluated, and waits for the GPU before it is read."""

    def __init__(self, started: float, report: Report, cuda: bool) -> None:
        self.started, self.report, self.cuda = started, report, cuda
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.diverged = self.pruned = False
        self.init_s = self.warm_s = self.paused = 0.0
        self.init_tokens = 0
        self.note = ""
        self.run: RecipeCallback | None = None
        """The recipe's own part in the run; none for full fine-tuning."""
        self.begun = self._step_end = started
        """When the first step began, when the last one ended."""

    @property
    def step_s(self) -> float:
        """Median over the stretches between evaluations."""
        ends = list(zip((0, *self.steps), (self.begun - self.started - self.warm_s, *self.seconds), strict=True))
        return median((t - s) / (n - m) for (m, s), (n, t) in pairwise(ends)) if self.steps else 0.0

    def slots(self) -> tuple[int, dict[str, int]] | None:
        """Those before the first step and those that live by module now, where a rule decides about them."""
        driver = self.run.driver if self.run is not None else None
        return (driver.started, driver.ranks()) if driver is not None and driver.allocates else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            if self.cuda:
                torch.cuda.synchronize()
            self._step_end = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = float(metrics["eval_loss"])
        self.steps.append(state.global_step)
        self.seconds.append(self._step_end - self.started - self.paused)
        self.losses.append(loss)
        self.metrics = {k.removeprefix("eval_"): float(v) for k, v in metrics.items() if k not in _NOT_METRICS}
        if not abs(loss) < float("inf"):
            self.diverged, self.note = True, f"loss {loss} at step {state.global_step}"
            control.should_training_stop = True
        elif self.report(state.global_step, loss):
            self.pruned = control.should_training_stop = True
        self.paused += time.perf_counter() - self._step_end
