"""Sites of one shape as one: where their tensors lie in stacks is worked out once, and read at every step.

A run's parameter groups hold its tensors as lists by role; whatever is stacked is given as lists in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralign.maths.lists import stacked, widened
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
        return list(_picker(places)(lists[role])) if len(places) > 1 else [lists[role][places[0]]]


@cache
def _picker(places: tuple[int, ...]) -> itemgetter[Any]:
    return itemgetter(*places)


class Scratch:
    """Small tensors of one shape below one another, in memory that is kept for the next time."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(n, ...) of n tensors of one shape, and its rows."""
        like = tensors[0]
        key = len(tensors), like.shape, like.dtype, like.device
        if key not in self._known:
            joint = like.new_empty(len(tensors), *like.shape)
            self._known[key] = joint, list(joint.unbind())
        joint, rows = self._known[key]
        if like.dim() == 1:  # faster than a stack
            torch.cat(list(tensors), out=joint.view(-1))
        else:
            torch.stack(list(tensors), out=joint)
        return joint, rows


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
        self.where = where
        """site -> name -> the role, and the place in that role's list."""
        self.names = {site: tuple(found) for site, found in where.items()}
        self.known: dict[object, list[Place]] = {}
        self.scratch = Scratch()
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


class Named(Mapping[str, Tensor]):
    """The tensors of one stack, made when they are read."""

    def __init__(self, names: Collection[str], made: Callable[[str], Tensor]) -> None:
        self._names, self._made = names, made

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._made(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stacks(
    places: Sequence[Place], values: Callable[[], Lists], grads: Callable[[], Lists] | None = None
) -> list[Stack]:
    """Their tensors are made when they are read, one name of all stacks at a time."""
    value, slope = cache(values), cache(grads or dict)
    tensors = cache(lambda name: _of_all(places, name, value()))
    slopes = cache(lambda name: _of_all(places, name, slope(), value()))

    def of(k: int, place: Place) -> Stack:
        found = Named(place.found, lambda name: tensors(name)[k])
        gone = Named(place.found, lambda name: slopes(name)[k]) if grads else {}
        return Stack(place.key, place.sites, place.r, found, gone, place.at)

    return [of(k, place) for k, place in enumerate(places)]


def _of_all(places: Sequence[Place], name: str, lists: Lists, values: Lists | None = None) -> dict[int, Tensor]:
    """One name of every stack that has it. Stacks whose tensors can stand below one another are made by one call."""
    kinds: dict[object, list[int]] = {}
    found: dict[int, list[Tensor]] = {}
    for k, place in enumerate(places):
        if name in place.found:
            found[k] = _there(place, name, lists, values)
            one = found[k][0]
            alone = k if one.dim() == 0 or one._base is not None else None  # rows of one tensor need no copy
            kinds.setdefault((one.shape[1:], one.dtype, one.device, alone), []).append(k)
    made: dict[int, Tensor] = {}
    for at in kinds.values():
        if len(at) == 1:
            made[at[0]] = stacked(found[at[0]])
            continue
        joint = widened(torch.cat([t for k in at for t in found[k]]))
        parts = joint.split([len(found[k]) * found[k][0].shape[0] for k in at])
        made.update((k, part.view(len(found[k]), *found[k][0].shape)) for k, part in zip(at, parts, strict=True))
    return made


def _there(place: Place, name: str, lists: Lists, values: Lists | None) -> list[Tensor]:
    """Its tensors; zeros like the `values` where a gradient is missing."""
    found = place.tensors(name, lists)
    if values is not None and type(None) in set(map(type, found)):
        like = place.tensors(name, values)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, like, strict=True)]  # type: ignore[arg-type]
    return found  # type: ignore[return-value]
