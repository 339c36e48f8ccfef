"""A teacher of twelve linear maps side by side whose updates have known ranks, and what rank rules find of them.

    y_k = (W_k + D_k)·x,  D_k of rank 1, 2, 5 or 8 with equal singular values, W_k known

A run trains at the right budget, the sum of the ranks, from twice as many slots where the rule shrinks; the loss is the
mean square on fresh inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from loralign import Recipe, adapt, build, drive, optimizer
from loralign.train.validation import validation_loss
from loralign.types import Batch, Validation

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"start_ratio": 2.0, "orthogonal": 0.01},
    "dynamic-rank-lora": {"start_ratio": 2.0},
    "sora": {"r": 8, "target_rank": 4},
    "sora, by a threshold": {"r": 8, "threshold": 1.2e-2},
    "allocating-lora": {"rounds": 16, "moved": 1, "first": 0.2, "every": 0.05, "steps": 1600},
}
"""AdaLoRA's regulariser is weighed against a loss of about 0.1 here: at its 0.1 it decides (Spearman 0.7 to 0.8). SoRA
by itself has no budget: its threshold is set so that about the right number of slots is left. ALoRA moves one slot in
a round, and a new one needs some time until it is worth something."""
RANKS = (1, 2, 5, 8) * 3
WIDTH, ROWS = 24, 64


class Side(nn.Module):
    """The maps side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in RANKS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([m(x) for m in self.maps])


class Found(NamedTuple):
    ranks: tuple[int, ...]
    loss: float

    @property
    def rho(self) -> float:
        """Spearman's, of planted and found ranks."""
        return float(spearmanr(RANKS, self.ranks).statistic) if len(set(self.ranks)) > 1 else 0.0


def planted(name: str, seed: int, *, steps: int = 400, lr: float = 1e-2, r: int = 4, **options: Any) -> Found:
    targets = tuple(f"maps.{k}" for k in range(len(RANKS)))
    recipe = build(name.split(",")[0], options, r=r, alpha=float(r), targets=targets, seed=seed)
    assert isinstance(recipe, Recipe)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = adapt(Side(), recipe)
        base = torch.stack([m.base_layer.weight.detach() for m in model.get_base_model().maps])
        parts = [torch.linalg.qr(torch.randn(WIDTH, k))[0] @ torch.linalg.qr(torch.randn(WIDTH, k))[0].T for k in RANKS]
        teacher = base + torch.stack(parts)

        def loss_on(x: Tensor) -> Tensor:
            return (model(x) - x @ teacher.mT).square().mean()

        def judge(model: nn.Module, batch: Batch) -> Tensor:
            return loss_on(batch["x"])

        rows: Batch = {"x": torch.randn(ROWS, WIDTH)}
        wants = any(isinstance(rule.needs, Validation) for rule in recipe.rules)
        opt = optimizer(model, recipe, lr)
        driver = drive(model, recipe, opt, steps, observe=validation_loss(model, [rows], judge) if wants else None)
        for _ in range(steps):
            loss_on(torch.randn(ROWS, WIDTH)).backward()
            opt.step()
            driver.after_step()
            opt.zero_grad()
        with torch.no_grad():
            loss = float(loss_on(torch.randn(ROWS, WIDTH)))
    return Found(tuple(driver.ranks().values()), loss)
