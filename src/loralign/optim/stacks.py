"""Sites of one shape as one: where their tensors lie in stacks is worked out once, and read at every step.

A run's parameter groups hold its tensors as lists by role; whatever is stacked is given as lists in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralign.maths.lists import stacked
from loralign.optim.late import LateMapping
from loralign.types import SiteShape, Stack

Lists = Mapping[str, Sequence[Tensor | None]]
"""Tensors by role ("A", "B", "form") in the order of the parameter groups; None where there is none."""

MOST = 64
"""Sets of tensors whose layout is remembered; experts that rest make new ones."""


def listed(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The Parameters of the sites by role."""
    return {group["role"]: group["params"] for group in groups if group["role"] != "rest"}


class Place(NamedTuple):
    """A stack without its tensors. found: for each name the role, and the places in that role's list."""

    key: str
    sites: tuple[str, ...]
    r: int
    device: torch.device
    found: Mapping[str, tuple[str, tuple[int, ...]]]
    at: tuple[int, ...] | None

    def tensors(self, name: str, lists: Lists) -> list[Tensor | None]:
        role, places = self.found[name]
        return list(itemgetter(*places)(lists[role])) if len(places) > 1 else [lists[role][places[0]]]


class Layout:
    """The stacks of a run, and of those of its tensors that take part in a step."""

    def __init__(self, shapes: Sequence[SiteShape], groups: Sequence[Mapping[str, Any]]) -> None:
        lists = listed(groups)
        where: dict[str, dict[str, tuple[str, int]]] = {shape.name: {} for shape in shapes}
        for group in groups:
            for k, key in enumerate(group["names"] if group["role"] in lists else ()):
                site, _, name = key.rpartition("|") if group["role"] == "form" else (key, "", group["role"])
                if site in where:  # else the model's, or asleep
                    where[site][name] = group["role"], k
        self.names = {site: tuple(found) for site, found in where.items()}
        self.known: dict[object, list[Place]] = {}
        alike: dict[object, list[SiteShape]] = {}
        for shape in shapes:
            found = {name: lists[role][k] for name, (role, k) in where[shape.name].items()}
            own = tuple((name, p.shape) for name, p in found.items())
            alike.setdefault((shape[1:4], own, found["A"].device), []).append(shape)
        self.all: list[Place] = []
        for same in alike.values():
            name, r, d_out, d_in, _ = same[0]
            key = f"{r}x{d_out}x{d_in}"
            count = sum(place.key.partition("@")[0] == key for place in self.all)
            sites = tuple(shape.name for shape in same)
            role, k = where[name]["A"]
            found = {n: (where[name][n][0], tuple(where[site][n][1] for site in sites)) for n in self.names[name]}
            self.all.append(Place(key + f"@{count}" * (count > 0), sites, r, lists[role][k].device, found, None))

    def of(self, parts: Mapping[str, tuple[str, ...]]) -> list[Place]:
        """The stacks of these names at these sites."""
        if parts == self.names:
            return self.all
        wanted = tuple(parts.items())
        if wanted not in self.known:
            if len(self.known) == MOST:
                self.known.clear()
            self.known[wanted] = [place for whole in self.all for place in _parts(whole, parts)]
        return self.known[wanted]


def _parts(whole: Place, parts: Mapping[str, tuple[str, ...]]) -> list[Place]:
    """The stacks that are left of one, one for each set of names."""
    sets: dict[tuple[str, ...], list[int]] = {}
    for k, site in enumerate(whole.sites):
        if parts.get(site):
            sets.setdefault(parts[site], []).append(k)
    made = []
    for names, at in sets.items():
        found = {n: (whole.found[n][0], tuple(whole.found[n][1][k] for k in at)) for n in names}
        sites = tuple(whole.sites[k] for k in at)
        made.append(whole._replace(sites=sites, found=found, at=tuple(at) if len(at) < len(whole.sites) else None))
    return made


def stacks(
    places: Sequence[Place], values: Callable[[], Lists], grads: Callable[[], Lists] | None = None
) -> list[Stack]:
    """Their tensors are made when they are read."""
    value, slope = cache(values), cache(grads or dict)

    def of(place: Place) -> Stack:
        tensors = LateMapping(lambda: {n: stacked(place.tensors(n, value())) for n in place.found})
        slopes = LateMapping(lambda: {n: _slopes(place, n, slope(), value()) for n in place.found})
        return Stack(place.key, place.sites, place.r, tensors, slopes if grads else {}, place.at)

    return [of(place) for place in places]


def _slopes(place: Place, name: str, grads: Lists, values: Lists) -> Tensor:
    found = place.tensors(name, grads)
    if any(g is None for g in found):
        like = place.tensors(name, values)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, like, strict=True)]  # type: ignore[arg-type]
    return stacked(found)
