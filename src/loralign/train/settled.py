"""A model for a Trainer, which goes through all modules at every batch and step, whatever there is to change.

For 210 adapted matrices to set their mode takes 6.6 ms of the host's time and to drop their gradients 4.5, in steps of
which a GPU may need 18 (records/2026-11-29-h200-replay). To look takes 0.2 and 1.7 (benchmarks/bench_walks.py, a CPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Trainer


class Settled:
    """The model, and the modules that it has; which tensors they hold may change."""

    def __init__(self, model: Any) -> None:
        self.model, self.parts = model, list(model.modules())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def train(self) -> None:
        if not all(part.training for part in self.parts):
            self.model.train()

    def zero_grad(self) -> None:
        for part in self.parts:
            for p in part._parameters.values():
                if p is not None:
                    p.grad = None

    def parameters(self) -> Iterator[Tensor]:
        """In the order of the model, each once."""
        found = (p for part in self.parts for p in part._parameters.values() if p is not None)
        return iter({id(p): p for p in found}.values())


def bare(model: Any) -> Any:
    """The model itself, of one that may be settled."""
    return model.model if isinstance(model, Settled) else model


class Settling(Trainer):
    """A Trainer for whose epochs the model is settled."""

    def _run_epoch(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._run_epoch(Settled(model), *args, **kwargs)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(bare(model), *args, **kwargs)
