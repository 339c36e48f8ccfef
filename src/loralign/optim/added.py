"""What a step adds to the Parameters: updates of pairs with their decay, and AdamW's for the tensors outside pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralign.maths.lists import adam_state, adam_updates
from loralign.optim.shards import add_, wholes
from loralign.optim.values import Live, Own
from loralign.types import Grad

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Any, dict[str, Tensor]]


def decayed(updates: dict[str, Grad], live: Live, groups: Groups, factor: float, *, whole: bool) -> dict[str, Grad]:
    """updates − lr·factor·decay·p, for the factors that have an update. whole: sharded ones are gathered."""
    rate = {g["role"]: float(g["lr"]) * factor * float(g["weight_decay"]) for g in groups}
    for side in (f for f in "AB" if rate.get(f)):
        names = [n for n, u in updates.items() if getattr(u, side) is not None]
        if not names:
            continue
        now = [getattr(updates[n], side) for n in names]
        ps: list[Tensor] = [live[n][side].data for n in names]
        ps = wholes(ps) if whole else ps
        made = torch._foreach_add(now, [p.to(u.dtype) for p, u in zip(ps, now, strict=True)], alpha=-rate[side])
        updates.update({n: updates[n]._replace(**{side: u}) for n, u in zip(names, made, strict=True)})
    return updates


def add_updates(
    live: Live, own: Own, updates: Mapping[str, Grad], own_updates: Mapping[tuple[str, str], Tensor]
) -> None:
    """To the factors, one side after the other, and to a form's own tensors."""
    for side in "AB":
        rows = [(live[n][side], getattr(u, side)) for n, u in updates.items()]
        todo = [(p, u) for p, u in rows if u is not None]
        if todo:
            add_(*zip(*todo, strict=True))
    if own_updates:
        add_([own[key] for key in own_updates], list(own_updates.values()))


def form_updates(
    own: Own,
    grads: Mapping[tuple[str, str], Tensor],
    whole: Callable[[dict[tuple[str, str], Tensor]], dict[tuple[str, str], Tensor]],
    groups: Groups,
    state: State,
    factor: float,
) -> dict[tuple[str, str], Tensor]:
    """AdamW's of a form's own tensors that have a gradient. whole: gathers values as the gradients were."""
    group = next((g for g in groups if g["role"] == "form"), None)
    if group is None or not grads:
        return {}
    ps = [own[key] for key in grads]
    values = list(whole({key: own[key].data for key in grads}).values())
    made = adamw_updates(ps, list(grads.values()), state, group, factor, values)
    return dict(zip(grads, made, strict=True))


def step_rest(groups: Groups, state: State, factor: float) -> None:
    """One step of AdamW on heads, norms and whatever else trains."""
    for group in groups:
        todo = [p for p in group["params"] if p.grad is not None] if group["role"] == "rest" else []
        if todo:
            add_(todo, adamw_updates(todo, [p.grad for p in todo], state, group, factor))


def adamw_updates(
    ps: Sequence[nn.Parameter],
    grads: Sequence[Tensor],
    state: State,
    group: Mapping[str, Any],
    factor: float,
    values: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Updates to be added, decay included, at the group's rate times `factor`; changes the moments in place.

    values: whole values of sharded `ps`, where the gradients are whole.
    """
    values = [p.data for p in ps] if values is None else values
    for p, value in zip(ps, values, strict=True):
        if not state[p]:
            state[p].update(adam_state(value))
    lr = float(group["lr"]) * factor
    made = [u for u in adam_updates(grads, [state[p] for p in ps], lr) if u is not None]
    decay = lr * float(group["weight_decay"])
    return [u - decay * value.to(u.dtype) for u, value in zip(made, values, strict=True)] if decay else made
