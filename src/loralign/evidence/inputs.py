"""Σx² of every site's input features over the micro-batches of an optimizer step, for rules that weigh by them.

x is staged in forward and counted in backward, so that gradient checkpointing, which runs forward twice, counts once,
and evaluations count nothing. Rows without a gradient (padding) are left out. Sums are over all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loralign.carrier.layer import first_input, tap
from loralign.types import Site


class InputTap:
    """Hooks on the sites' layers; `taken` hands out what was seen since the last call."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sums = {site.name: _zeros(site) for site in sites}
        """Σx² by feature, then the number of rows; changed in place, so that a recorded step adds to them too."""
        self.hooks = [site.layer.register_forward_hook(self._hook(site.name), with_kwargs=True) for site in sites]

    def _hook(self, name: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not (layer.training and torch.is_grad_enabled() and y.requires_grad):
                return None
            if self.sums[name].device != y.device:
                self.sums[name] = self.sums[name].to(y.device)
            total = self.sums[name]

            def seen(delta: Tensor, x: Tensor) -> None:
                rows = x.detach().reshape(-1, x.shape[-1])
                used = delta.reshape(len(rows), -1).ne(0).any(1)
                squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square()
                summed = used.to(squares.dtype) @ squares  # one pass over the squares
                total.add_(torch.cat([summed.double(), used.sum()[None].double()]))

            return tap(y, first_input(args, kwargs), y.new_zeros(()), seen)

        return hook

    def taken(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{site: (Σx² (d_in,), rows)}, summed over all processes; the sums start again."""
        found = {}
        for name, total in self.sums.items():
            seen = total.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(seen)
            found[name] = (seen[:-1], seen[-1])
            total.zero_()
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _zeros(site: Site) -> Tensor:
    device = next(site.layer.parameters()).device
    return torch.zeros(site.d_in + 1, dtype=torch.float64, device=device)
