"""Committed slots of one site become the best few of them, by the SVD of their product."""

from __future__ import annotations

from typing import Any

import torch

from loralign.maths.linalg import product_norm, truncate


@torch.no_grad()
def compress(layer: Any, adapter: str, most: int) -> tuple[float, float]:
    """Keep `most` frozen slots of what links left; a live twin's own stay. (‖what is lost‖, ‖what there was‖), both of
    B·A; computed on the CPU in float64, so that all processes agree."""
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    twin = side_A.live.shape[0] if side_B.kind == "T" else 0
    A, B = side_A.frozen[twin:].cpu().double(), side_B.frozen[:, twin:].cpu().double()
    whole = float(product_norm(B, A))
    most = min(most, A.shape[1], B.shape[0])
    if A.shape[0] <= most:
        return 0.0, whole
    B, A, error = truncate(B, A, most)
    side_A.frozen = torch.cat([side_A.frozen[:twin], A.to(side_A.frozen)])
    side_B.frozen = torch.cat([side_B.frozen[:, :twin], B.to(side_B.frozen)], dim=1)
    layer.lora_variant[adapter].links = (most,)
    return float(error) * whole, whole
