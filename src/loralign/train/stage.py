"""Adapted sites and their optimizer, as verbs change them: Parameters and shapes stay, slots are written in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loralign.carrier.slot import whole, write
from loralign.optim.pairs import PairOptimizer
from loralign.optim.shards import sharded
from loralign.optim.stacks import listed
from loralign.types import LoralignError, RuleState, Site


class Stage:
    """The adapted sites and their optimizer, on which the verbs of one rule act."""

    def __init__(self, optimizer: PairOptimizer, state: RuleState, seed: int, step: int) -> None:
        self.optimizer, self.state, self.seed, self.step = optimizer, state, seed, step

    def site(self, name: str) -> Site:
        if name not in self.optimizer.sites:
            raise LoralignError(f"a rule planned for {name}, which is not adapted")
        return self.optimizer.sites[name]

    def factor(self, site: Site, side: str) -> Tensor:
        """The live Parameter of one factor."""
        p: Tensor = getattr(site.layer, f"lora_{side}")[site.adapter]._parameters["weight"]
        return p

    @cached_property
    def lists(self) -> dict[str, list[Any]]:
        return listed(self.optimizer.param_groups)

    def own(self, site: str, name: str) -> Tensor:
        role, k = self.optimizer.layout.where.get(site, {}).get(name, ("", 0))
        if role != "form":
            raise LoralignError(f"a rule planned for the tensor {name!r} of {site}, which its form does not have")
        p: Tensor = self.lists[role][k]
        return p

    def alike(self, sites: Iterable[str], name: str) -> list[tuple[list[str], list[Tensor]]]:
        """A form's own tensors of these sites, those of one shape together."""
        kinds: dict[object, tuple[list[str], list[Tensor]]] = {}
        for site in sites:
            p = self.own(site, name)
            names, ps = kinds.setdefault((p.shape, p.dtype, p.device), ([], []))
            names.append(site)
            ps.append(p)
        return list(kinds.values())

    def put(self, site: Site, slots: Sequence[int], A: Tensor | None, B: Tensor | None) -> None:
        """Rows of A and columns of B of these slots; None: zeros. Only they are touched."""
        at = list(slots)
        for p, value, axis in ((self.factor(site, "A"), A, 0), (self.factor(site, "B"), B, 1)):
            now = whole(p)
            new = torch.zeros_like(now.index_select(axis, torch.tensor(at, device=now.device)))
            set_slots(p, at, axis, new if value is None else value.to(new))

    def mark(self, site: Site, slots: Sequence[int], dead: bool) -> None:
        mask = self.optimizer.dead.get(site.name, torch.zeros(site.r, dtype=torch.bool)).clone()
        mask[list(slots)] = dead
        self.optimizer.dead[site.name] = mask


@torch.no_grad()
def set_slots(p: Tensor, at: Sequence[int], axis: int, value: Tensor) -> None:
    """Write slots of a possibly sharded tensor in place."""
    if p is not whole(p):  # sharded
        full = whole(p).clone()
        full.index_copy_(axis, torch.tensor(list(at), device=full.device), value)
        write(p, full)
    else:
        p.index_copy_(axis, torch.tensor(list(at), device=p.device), value)


def write_all(ps: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write full tensors into possibly sharded ones."""
    if not sharded(ps):
        torch._foreach_copy_(list(ps), list(values))
        return
    for p, value in zip(ps, values, strict=True):
        write(p, value)
