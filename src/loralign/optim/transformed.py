"""Gradients of pairs to their updates: batches that step together, state made where it is missing, common scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loralign.types import Ctx, Grad, Group, Pair, Prepared, State, Train, Transform


def transformed(
    transform: Transform, pairs: Sequence[Pair], grads: Mapping[str, Grad], state: Mapping[str, State], ctx: Ctx
) -> dict[str, Grad]:
    """Updates by site. state: of the trained factors by site; changed in place."""
    batches: dict[Any, list[Pair]] = {}
    facts, updates = transform.facts, dict[str, Grad]()
    for pair in pairs:
        g = grads[pair.name]
        shape = pair.A.shape[0] if "shapes" in facts.accepts else (pair.A.shape, pair.B.shape)
        key = (shape, pair.train, pair.A.device, g.A is None, g.B is None)
        batches.setdefault(key, []).append(pair)
    todo = [
        Group(batch, [grads[p.name] for p in batch], [filled(transform, p, state[p.name]) for p in batch], ctx)
        for batch in batches.values()
    ]
    together = [transform.prepare(group) for group in todo] if facts.global_scalars else []
    scalars = _summed(together)
    for k, group in enumerate(todo):
        prepared = together[k] if together else transform.prepare(group)
        made = transform.update(group, scalars or prepared.scalars, prepared.carry)
        updates.update({p.name: u for p, u in zip(group.pairs, made, strict=True)})
    return updates


def filled(transform: Transform, pair: Pair, state: State) -> State:
    """State, as a transform begins with it, for the factors that have none."""
    missing = [factor for factor, kept in state.items() if not kept]
    if missing:
        fresh = transform.init(pair)
        for factor in missing:
            state[factor].update(fresh.get(factor, {}))
    return state


def keeps(transform: Transform, train: Train) -> frozenset[str]:
    """The factors of a pair, of which these train, that a transform keeps state for: the smallest pair tells."""
    one = torch.zeros(1, 1)
    return frozenset(factor for factor, kept in transform.init(Pair("", one, one, 1.0, train)).items() if kept)


def _summed(parts: Iterable[Prepared]) -> dict[str, Tensor]:
    scalars: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part.scalars.items():
            scalars[key] = scalars[key] + value.to(scalars[key].device) if key in scalars else value
    return scalars
