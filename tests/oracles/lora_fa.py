"""LoRA-FA (arXiv 2308.03303, with PEFT's projection) in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def projected(A: Tensor, gB: Tensor, s: float) -> Tensor:
    return gB @ torch.linalg.inv(A @ A.T) / s**2
