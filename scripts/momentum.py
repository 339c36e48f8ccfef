"""SGD with momentum, a transform from outside the package, for studies of methods whose authors train by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State


@dataclass(frozen=True)
class Momentum:
    """v ← 0.9·v + g, −lr·v for each factor."""

    lr_ratio: float = 1.0

    @property
    def facts(self) -> Facts:
        return Facts(accepts=frozenset({"one_sided", "gated", "elementwise", "shapes"}))

    def init(self, pair: Pair) -> State:
        return {factor: {"velocity": torch.zeros_like(getattr(pair, factor))} for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> list[Grad]:
        lr, found = {"A": group.ctx.lr_A, "B": group.ctx.lr_B}, []
        for pair, g, state in zip(group.pairs, group.grads, group.state, strict=True):
            made = {f: -lr[f] * state[f]["velocity"].mul_(0.9).add_(getattr(g, f)) for f in pair.train}
            found.append(Grad(made.get("A"), made.get("B")))
        return found

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """No rule is in these recipes."""
