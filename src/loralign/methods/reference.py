"""Optimizers of full fine-tuning, which adapters are compared with: torch's own, over the groups of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one; their groups are the same objects, so a scheduler reaches all."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def muon(groups: Sequence[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon with momentum 0.95 on matrices, scaled to AdamW's step size (arXiv 2502.16982); AdamW on vectors."""
    flat = [g for g in groups if any(p.dim() != 2 for p in g["params"])]
    matrices = [g for g in groups if all(p.dim() == 2 for p in g["params"])]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    ]
    if flat:
        made.append(torch.optim.AdamW(flat, lr, weight_decay=weight_decay))
    return made[0] if len(made) == 1 else Together(made)


def state_over_numbers(made: Callable[..., torch.optim.Optimizer] | None) -> float:
    """Optimizer state over what trains, in bytes of one precision: measured on a small matrix. None: AdamW."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    p.grad = torch.zeros_like(p)
    stepper = torch.optim.AdamW([p]) if made is None else made([{"params": [p]}], 1e-3, 0.0)
    stepper.step()
    kept = [t for t in stepper.state[p].values() if isinstance(t, torch.Tensor) and t.dim()]
    return sum(t.nbytes for t in kept) / p.nbytes
