"""LoRA+ (arXiv 2402.12354): torch's own AdamW with two parameter groups."""

from __future__ import annotations

import torch
from torch import nn


def optimizer(
    A: list[nn.Parameter], B: list[nn.Parameter], lr: float, ratio: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    groups = [{"params": A, "lr": lr}, {"params": B, "lr": lr * ratio}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=False, fused=False)
