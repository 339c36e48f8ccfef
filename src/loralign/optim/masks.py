"""Masks on gradients and updates: those of rules, and that of slots that are dead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from loralign.maths.lists import products
from loralign.optim.values import as_grads, named_grads
from loralign.types import Grad, Named, Pair


def masked(
    grads: dict[str, Grad], own_grads: Mapping[tuple[str, str], Tensor], masks: Sequence[Named]
) -> tuple[dict[str, Grad], dict[tuple[str, str], Tensor]]:
    """Values of pairs and of a form's own tensors times the masks, one product for all tensors of a shape."""
    if not masks:
        return grads, dict(own_grads)
    values = named_grads(grads, own_grads)
    for mask in masks:
        values = dict(zip(values, products(list(values.values()), [mask.get(k) for k in values]), strict=True))  # type: ignore[arg-type]
    return as_grads(values, grads), {key: values[key] for key in own_grads}


def alive(
    dead: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    own: Mapping[tuple[str, str], Tensor],
    per_slot: Callable[[str], frozenset[str]],
) -> Named | None:
    """Zero where a slot is dead. dead: bool (r,) by site. per_slot: site -> its form's names with one entry a slot."""
    if not dead:
        return None
    masks: dict[tuple[str, str], Tensor] = {}
    for pair in (p for p in pairs if p.name in dead):
        on = (~dead[pair.name]).to(pair.A.device, pair.A.dtype)
        masks[pair.name, "A"], masks[pair.name, "B"] = on[:, None], on
    for site, name in own:
        if site in dead and name in per_slot(site):
            masks[site, name] = (~dead[site]).to(own[site, name].device, own[site, name].dtype)
    return masks
