"""A few steps of a recipe on a toy, in a loop of one's own, and what the model says before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loralign import Recipe, drive, optimizer
from loralign.evidence import model_loss
from loralign.optim.pairs import PairOptimizer
from loralign.train.driver import Driver
from loralign.train.validation import validation_loss
from loralign.types import Validation
from toy import batch_for


def output(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch_for(model)).logits
    return out


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def judged(model: Any, made: Recipe) -> Any:
    """Losses on a batch of its own, for rules that decide by them."""
    wants = any(isinstance(rule.needs, Validation) for rule in made.rules)
    return validation_loss(model, [batch_for(model, seed=9)], model_loss) if wants else None


def driven(
    model: Any, made: Recipe, backward: Callable[[Any, int], object], times: Sequence[int], total: int, lr: float = 1e-2
) -> tuple[PairOptimizer, Driver]:
    """Steps of a run of `total`, whose gradients are backward's of each of `times`."""
    opt = optimizer(model, made, lr)
    driver = drive(model, made, opt, total)
    for t in times:
        backward(model, t)
        opt.step()
        driver.after_step()
    return opt, driver


def train(model: Any, made: Recipe, steps: int, lr: float = 3e-3) -> PairOptimizer:
    """Leaves the model in eval mode."""
    opt = optimizer(model, made, lr)
    driver = drive(model, made, opt, steps, observe=judged(model, made))
    model.train()
    for _ in range(steps):
        model(**batch_for(model)).loss.backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
    model.eval()
    return opt
