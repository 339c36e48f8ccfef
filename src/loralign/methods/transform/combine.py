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
    >>> sorted(chain(descend(), descend()).accepts)
    ['bf16', 'gated', 'one_sided', 'shapes', 'sharded', 'zero']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loralign.types import Ctx, Grad, LoralignError, Pair, SlotPlan, State, Train, Transform

SIDES: tuple[Train, Train] = ("A", "B")


@dataclass(frozen=True)
class Chain:
    """Both parts keep their tensors in one dict per factor, so their names must differ.

    Only the first part may measure: the second one's gradients do not exist before the update.
    """

    first: Transform
    second: Transform
    accepts: frozenset[str]
    lr_ratio: float

    def init(self, pair: Pair) -> State:
        one, two = self.first.init(pair), self.second.init(pair)
        clash = [f"{f}.{key}" for f in one for key in one[f] if key in two.get(f, {})]
        if clash:
            raise LoralignError(f"two links of a chain both keep {clash[0]}: take transforms with state of other names")
        return {factor: {**one.get(factor, {}), **two.get(factor, {})} for factor in pair.train}

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        return self.first.measure(grads, state, pairs, ctx)

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        mapped = self.first.update(grads, state, pairs, ctx)
        return self.second.update(mapped, state, pairs, replace(ctx, scalars={}))

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        self.first.on_plan(pair, state, plan)
        self.second.on_plan(pair, state, plan)


@dataclass(frozen=True)
class Per:
    """Scalars of the two sides are summed apart: "A.norm" and "B.norm"."""

    A: Transform
    B: Transform
    accepts: frozenset[str]
    lr_ratio: float

    def _side(
        self, factor: Train, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair]
    ) -> tuple[list[int], list[Grad], list[State], list[Pair]]:
        at = [k for k, (g, st) in enumerate(zip(grads, state, strict=True)) if getattr(g, factor) is not None]
        only = [Grad(grads[k].A, None) if factor == "A" else Grad(None, grads[k].B) for k in at]
        seen = [pairs[k]._replace(train=factor) for k in at]
        return at, only, [{factor: state[k][factor]} for k in at], seen

    def init(self, pair: Pair) -> State:
        return {f: getattr(self, f).init(pair._replace(train=f)).get(f, {}) for f in SIDES if f in pair.train}

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for factor in SIDES:
            at, *parts = self._side(factor, grads, state, pairs)
            if at:
                part = getattr(self, factor).measure(*parts, ctx)
                found.update({f"{factor}.{key}": value for key, value in part.items()})
        return found

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        updates = [Grad(None, None)] * len(pairs)
        for factor in SIDES:
            at, *parts = self._side(factor, grads, state, pairs)
            own = {k.removeprefix(f"{factor}."): v for k, v in ctx.scalars.items() if k.startswith(f"{factor}.")}
            made = getattr(self, factor).update(*parts, replace(ctx, scalars=own)) if at else []
            for k, update in zip(at, made, strict=True):
                updates[k] = updates[k]._replace(**{factor: getattr(update, factor)})
        return updates

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        for factor in (f for f in SIDES if f in state):
            getattr(self, factor).on_plan(pair._replace(train=factor), {factor: state[factor]}, plan)


@dataclass(frozen=True)
class Descend:
    accepts: frozenset[str] = frozenset({"one_sided", "gated", "bf16", "sharded", "shapes", "zero"})
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: {} for factor in pair.train}

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        return {}

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        A = _scaled([g.A for g in grads], -ctx.lr_A)
        B = _scaled([g.B for g in grads], -ctx.lr_B)
        return [Grad(a, b) for a, b in zip(A, B, strict=True)]

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        """Nothing is kept."""


def _scaled(grads: Sequence[Tensor | None], by: float) -> list[Tensor | None]:
    live = [g for g in grads if g is not None]
    made = iter(torch._foreach_mul(live, by) if live else ())
    return [None if g is None else next(made) for g in grads]


def chain(first: Transform, second: Transform) -> Chain:
    """`first` maps gradients to gradients, `second` those to updates; the ratio of rates is the second one's."""
    return Chain(first, second, first.accepts & second.accepts, second.lr_ratio)


def per(*, A: Transform, B: Transform) -> Per:
    """Another transform for each factor; each sees the other factor as frozen. The ratio of rates is B's."""
    return Per(A, B, A.accepts & B.accepts, B.lr_ratio)


def descend() -> Descend:
    """Gradient descent."""
    return Descend()
