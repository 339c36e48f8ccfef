"""What rules do to a step: gradients of their penalties, masks on gradients and updates; and slots that are dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from loralign.maths.lists import stacked
from loralign.optim.shards import add_
from loralign.optim.stacks import Lists, Place
from loralign.types import Grad, Joint


def penalise(places: Sequence[Place], penalty: Joint, grads: Lists) -> None:
    """Add a regulariser's gradient to the gradients that are there, in one call."""
    todo: list[Tensor] = []
    extra: list[Tensor] = []
    for place, answer in zip(places, penalty, strict=True):
        for name, joint in answer.items():
            found, rows = place.tensors(name, grads), joint.unbind()
            there = [g is not None for g in found]
            todo += compress(found, there)  # type: ignore[arg-type]
            extra += compress(rows, there)
    if todo:
        add_(todo, extra)


def masked(
    grads: dict[str, Grad], own_grads: Mapping[tuple[str, str], Tensor], places: Sequence[Place], masks: Sequence[Joint]
) -> tuple[dict[str, Grad], dict[tuple[str, str], Tensor]]:
    """Values of pairs and of a form's own tensors times the masks, one product for all tensors of a stack."""
    pairs, own = dict(grads), dict(own_grads)
    for mask in masks:
        for place, answer in zip(places, mask, strict=True):
            for name, on in answer.items():
                if name in place.found:
                    _mask(pairs, own, place, name, on)
    return pairs, own


def _mask(pairs: dict[str, Grad], own: dict[tuple[str, str], Tensor], place: Place, name: str, on: Tensor) -> None:
    factor = name in ("A", "B")
    found = [getattr(pairs[s], name) if factor else own.get((s, name)) for s in place.sites]
    at = [k for k, value in enumerate(found) if value is not None]
    if not at:
        return
    whole = stacked([found[k] for k in at])
    part = on if len(at) == len(found) else on[at]
    for k, row in zip(at, (whole * part.to(whole.device)).unbind(), strict=True):
        if factor:
            pairs[place.sites[k]] = pairs[place.sites[k]]._replace(**{name: row})
        else:
            own[place.sites[k], name] = row


class DeadSlots(MutableMapping[str, Tensor]):
    """Slots that do not train, by site: bool (r,), True = dead or unborn; sites without one are not named. A mask is
    replaced, never written to, so that what was made of all of them stays true."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks: dict[str, Tensor] = {}
        self._made: tuple[Sequence[Place], list[dict[str, Tensor]]] | None = None
        self.update(masks or {})

    def __getitem__(self, site: str) -> Tensor:
        return self._masks[site]

    def __setitem__(self, site: str, mask: Tensor) -> None:
        self._made = None
        if bool(mask.any()):
            self._masks[site] = mask
        else:
            self._masks.pop(site, None)

    def __delitem__(self, site: str) -> None:
        self._made = None
        del self._masks[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def masks(self, places: Sequence[Place], per_slot: Callable[[str], frozenset[str]]) -> Joint | None:
        """Zero where a slot is dead. per_slot: site -> its form's names with one entry a slot."""
        if not self._masks:
            return None
        if self._made is None or self._made[0] is not places:
            self._made = places, [self._of(place, per_slot(place.sites[0])) for place in places]
        return self._made[1]

    def _of(self, place: Place, per_slot: frozenset[str]) -> dict[str, Tensor]:
        if not any(site in self._masks for site in place.sites):
            return {}
        none = torch.zeros(place.r, dtype=torch.bool)
        on = (~torch.stack([self._masks.get(site, none) for site in place.sites])).to(place.device)
        return {"A": on[:, :, None], "B": on[:, None], **dict.fromkeys(per_slot, on)}
