"""The two combinators of transforms: one after the other, and one per factor; and the plainest end of a chain.

    chain(t1, t2):   g → t1 (gradients to gradients) → t2 (gradients to updates)
    per(A=t1, B=t2): t1 acts on A as if B were frozen, t2 on B as if A were
    descend():       update = −lr·g

Shapes:  like the factors, A (r, d_in) and B (d_out, r)
Source:  the idea is optax's `chain` and `partition`; no paper. Official code: none.
Differs: none.
Cost:    that of the parts.
Export:  exact.
Args:    none with a unit.
Example:
    >>> from loralign.methods.transform.combine import chain, descend
    >>> sorted(chain(descend(), descend()).facts.accepts)
    ['bf16', 'elementwise', 'gated', 'one_sided', 'shapes', 'sharded', 'slots']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralign.types import Facts, Grad, Group, LoralignError, Pair, Prepared, SlotChange, State, Train, Transform

SIDES: tuple[Train, Train] = ("A", "B")


@dataclass(frozen=True)
class Chain:
    """Both parts keep their tensors in one dict per factor, so their names must differ.

    Only the first part may ask for scalars of all groups: the second one's gradients do not exist before the update.
    """

    first: Transform
    second: Transform
    lr_ratio: float

    @property
    def facts(self) -> Facts:
        one, two = self.first.facts, self.second.facts
        return replace(_both(one, two), global_scalars=one.global_scalars)

    def init(self, pair: Pair) -> State:
        one, two = self.first.init(pair), self.second.init(pair)
        clash = [f"{f}.{key}" for f in one for key in one[f] if key in two.get(f, {})]
        if clash:
            raise LoralignError(f"two links of a chain both keep {clash[0]}: take transforms with state of other names")
        return {factor: {**one.get(factor, {}), **two.get(factor, {})} for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return self.first.prepare(group)

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        mapped = group._replace(grads=self.first.update(group, scalars, carry))
        then = self.second.prepare(mapped)
        return self.second.update(mapped, then.scalars, then.carry)

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        self.first.on_slots(pair, state, change)
        self.second.on_slots(pair, state, change)


@dataclass(frozen=True)
class Per:
    """Scalars of the two sides are summed apart: "A.norm" and "B.norm"."""

    A: Transform
    B: Transform
    lr_ratio: float

    @property
    def facts(self) -> Facts:
        return _both(self.A.facts, self.B.facts)

    def _side(self, factor: Train, group: Group) -> tuple[list[int], Group]:
        at = [k for k, g in enumerate(group.grads) if getattr(g, factor) is not None]
        only = [Grad(group.grads[k].A, None) if factor == "A" else Grad(None, group.grads[k].B) for k in at]
        seen = [group.pairs[k]._replace(train=factor) for k in at]
        return at, Group(seen, only, [{factor: group.state[k][factor]} for k in at], group.ctx)

    def init(self, pair: Pair) -> State:
        return {f: getattr(self, f).init(pair._replace(train=f)).get(f, {}) for f in SIDES if f in pair.train}

    def prepare(self, group: Group) -> Prepared:
        scalars: dict[str, Tensor] = {}
        carry: dict[str, Any] = {}
        for factor in SIDES:
            at, side = self._side(factor, group)
            if at:
                part = getattr(self, factor).prepare(side)
                scalars |= {f"{factor}.{key}": value for key, value in part.scalars.items()}
                carry[factor] = part.carry
        return Prepared(scalars, carry)

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        updates = [Grad(None, None)] * len(group.pairs)
        for factor in SIDES:
            at, side = self._side(factor, group)
            own = {k.removeprefix(f"{factor}."): v for k, v in scalars.items() if k.startswith(f"{factor}.")}
            made = getattr(self, factor).update(side, own, carry[factor]) if at else []
            for k, update in zip(at, made, strict=True):
                updates[k] = updates[k]._replace(**{factor: getattr(update, factor)})
        return updates

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        for factor in (f for f in SIDES if f in state):
            getattr(self, factor).on_slots(pair._replace(train=factor), {factor: state[factor]}, change)


@dataclass(frozen=True)
class Descend:
    facts: ClassVar[Facts] = Facts(
        accepts=frozenset({"one_sided", "gated", "bf16", "sharded", "shapes", "slots", "elementwise"})
    )
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: {} for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        A = _scaled([g.A for g in group.grads], -group.ctx.lr_A)
        B = _scaled([g.B for g in group.grads], -group.ctx.lr_B)
        return [Grad(a, b) for a, b in zip(A, B, strict=True)]

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing is kept."""


def _both(one: Facts, two: Facts) -> Facts:
    """What two parts of a transform declare together."""
    return Facts(
        accepts=one.accepts & two.accepts,
        global_scalars=one.global_scalars or two.global_scalars,
        transient=max(one.transient, two.transient),
        needs_no_dropout=one.needs_no_dropout or two.needs_no_dropout,
    )


def _scaled(grads: Sequence[Tensor | None], by: float) -> list[Tensor | None]:
    live = [g for g in grads if g is not None]
    made = iter(torch._foreach_mul(live, by) if live else ())
    return [None if g is None else next(made) for g in grads]


def chain(first: Transform, second: Transform) -> Chain:
    """`first` maps gradients to gradients, `second` those to updates; the ratio of rates is the second one's."""
    if second.facts.global_scalars:
        raise LoralignError(f"{type(second).__name__} needs a scalar of all gradients before it acts: put it first")
    return Chain(first, second, second.lr_ratio)


def per(*, A: Transform, B: Transform) -> Per:
    """Another transform for each factor; each sees the other factor as frozen. The ratio of rates is B's."""
    return Per(A, B, B.lr_ratio)


def descend() -> Descend:
    """Gradient descent."""
    return Descend()
