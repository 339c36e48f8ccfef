"""What rules see: the tensors of a step in stacks, and the moment after it. All of it is made when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loralign.optim.late import LateMapping, LateSequence
from loralign.optim.masks import DeadSlots
from loralign.optim.shards import sharded, wholes
from loralign.optim.stacks import Layout, Lists, Place, listed, stacks
from loralign.optim.values import Values, live_own, live_pairs, named, named_grads
from loralign.types import Ctx, Moment, Named, Pair, SiteShape, Stack

Groups = Sequence[Mapping[str, Any]]


def values_of(groups: Groups, values: Values, pairs: Sequence[Pair] | None = None) -> Lists:
    """Of all tensors of the sites, by role; pairs: those whose factors are known already."""
    params = listed(groups)
    if values.held(params):
        return params
    live = live_pairs(groups)
    known = {p.name: p for p in (values.pairs(live, {}) if pairs is None else pairs)}
    factors = {f: [getattr(known[n], f) if n in known else None for n in live] for f in "AB"}
    return {**factors, "form": wholes([p.data for p in params.get("form", ())])}


def grads_of(groups: Groups) -> Lists:
    return {role: [p.grad for p in ps] for role, ps in listed(groups).items()}


def seen_in_step(groups: Groups, values: Values, pairs: Sequence[Pair], places: Sequence[Place]) -> Sequence[Stack]:
    """The tensors that train in a step."""
    return LateSequence(lambda: stacks(places, lambda: values_of(groups, values, pairs)))


def moment(
    groups: Groups,
    values: Values,
    layout: Layout,
    shapes: Sequence[SiteShape],
    dead: DeadSlots,
    ctx: Ctx,
    **seen: Any,
) -> Moment:
    """After a step. seen: further fields."""

    def tensors() -> Named:
        own = live_own(groups)
        return named(values.pairs(live_pairs(groups), {}), _whole({key: p.data for key, p in own.items()}))

    def grads() -> Named:
        live, own = live_pairs(groups), live_own(groups)
        return named_grads(values.grads(live, live), _whole({k: p.grad for k, p in own.items() if p.grad is not None}))

    def slopes() -> Lists:
        return {role: _wholes(found) for role, found in grads_of(groups).items()}

    joint = LateSequence(lambda: stacks(layout.all, lambda: values_of(groups, values), slopes))
    off = LateMapping(lambda: {n: frozenset(mask.nonzero().flatten().tolist()) for n, mask in dead.items()})
    known = LateMapping(tensors), LateMapping(grads), joint, off
    return Moment(ctx.step, ctx.total_steps, shapes, *known, ctx.draw, **seen)


def _whole(own: Named) -> Named:
    return dict(zip(own, wholes(list(own.values())), strict=True))


def _wholes(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """As `wholes`, of those that are there."""
    if not sharded(tensors):
        return tensors
    whole = iter(wholes([t for t in tensors if t is not None]))
    return [None if t is None else next(whole) for t in tensors]
