"""AdamW for tensors outside pairs: heads, norms, a form's own tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from loralign.maths.lists import adam_state, adam_updates


def adamw_updates(
    ps: Sequence[nn.Parameter],
    grads: Sequence[Tensor],
    state: Mapping[Any, dict[str, Tensor]],
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
