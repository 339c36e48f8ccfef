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
) -> list[Tensor]:
    """Updates to be added, decay included, at the group's rate times `factor`; changes the moments in place."""
    for p in ps:
        if not state[p]:
            state[p].update(adam_state(p))
    lr = float(group["lr"]) * factor
    made = [u for u in adam_updates(grads, [state[p] for p in ps], lr) if u is not None]
    decay = lr * float(group["weight_decay"])
    return [u - decay * p.data.to(u.dtype) for u, p in zip(made, ps, strict=True)] if decay else made
