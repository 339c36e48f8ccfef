"""One global norm over everything that trains, on the device as long as nobody asks for the number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loralign.carrier.slot import whole


def clip(grads: Iterable[Tensor], most: float) -> Tensor | None:
    """Scale these gradients, in place, to at most the norm allowed (0: not at all); returns the norm before it."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, getattr(grad, "placements", None)), []).append(grad)
    if not kinds:
        return None
    parts = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(kind))) for kind in kinds.values()]
    if len(parts) == 1 and not isinstance(parts[0], DTensor):
        norm = parts[0]
    else:
        device = next(iter(kinds))[0]
        norm = torch.linalg.vector_norm(torch.stack([whole(part).to(device) for part in parts]))
    if most > 0:
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for (device, placements), kind in kinds.items():
            torch._foreach_mul_(kind, scale.to(device) if placements is None else float(scale))
    return norm
