"""What a step reads: the trained Parameters, the values of pairs, their gradients; whole tensors of sharded ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralign.carrier.slot import parted
from loralign.carrier.storage import SlotLinear
from loralign.optim.shards import sharded, wholes
from loralign.types import Grad, Pair, Site, Train

Live = dict[str, dict[str, nn.Parameter]]
"""Site -> the Parameters of its pair, "A" and "B"."""

Own = dict[tuple[str, str], nn.Parameter]
"""(site, name) -> a form's own tensor; shared ones have the site ""."""


def live_pairs(groups: Iterable[Mapping[str, Any]]) -> Live:
    """The factors of every site, as the parameter groups hold them now."""
    found: Live = {}
    for group in groups:
        if group["role"] in ("A", "B"):
            for name, p in zip(group["names"], group["params"], strict=True):
                found.setdefault(name, {})[group["role"]] = p
    return found


def live_own(groups: Iterable[Mapping[str, Any]]) -> Own:
    """A form's own tensors, as the parameter groups hold them now."""
    found = {}
    for group in groups:
        if group["role"] == "form":
            for key, p in zip(group["names"], group["params"], strict=True):
                site, _, name = key.rpartition("|")
                found[site, name] = p
    return found


def letters(factors: Iterable[str]) -> Train:
    """Of these factors of a pair."""
    found = set(factors)
    return "AB" if len(found) == 2 else "A" if "A" in found else "B"


def with_grads(factors: Mapping[str, nn.Parameter]) -> Train:
    return letters(f for f, p in factors.items() if p.grad is not None)


def leave_out(live: Live, own: Own, asleep: Iterable[str], trains: Mapping[str, Train]) -> None:
    """Sites that sleep and factors that an episode freezes get no gradient: neither clip nor step sees them."""
    resting = set(asleep)
    for name in resting:
        for p in live[name].values():
            p.grad = None
    for name, train in trains.items():
        for factor in set("AB") - set(train):
            live[name][factor].grad = None
    for (site, _), p in own.items():
        if site in resting:
            p.grad = None


def leave_stacks(state: Mapping[Any, dict[str, Tensor]], live: Live, pairs: Sequence[Pair]) -> None:
    """State of factors that rest in this step leaves the stacks of those that step, which would live on through it."""
    steps = {(pair.name, factor) for pair in pairs for factor in pair.train}
    if len(steps) == sum(map(len, live.values())):
        return
    for name, factors in live.items():
        for factor, p in factors.items():
            kept = state.get(p, {}) if (name, factor) not in steps else {}
            kept.update({key: value.clone() for key, value in kept.items() if value._base is not None})


class Values:
    """The present values and gradients of pairs."""

    def __init__(self, sites: Sequence[Site], *, whole: bool) -> None:
        self.scale = {site.name: site.s for site in sites}
        self.modules: dict[str, dict[str, Any]] = {
            site.name: {side: getattr(site.layer, f"lora_{side}")[site.adapter] for side in "AB"} for site in sites
        }
        self.whole = whole
        """Sharded factors are gathered."""

    def pairs(self, live: Mapping[str, Mapping[str, nn.Parameter]], trains: Mapping[str, Train]) -> list[Pair]:
        """The values of these sites' factors; those of twins are sums, formed in one call per side."""
        found: dict[str, list[Tensor]] = {"A": [], "B": []}
        twins: dict[str, list[tuple[int, Tensor]]] = {"A": [], "B": []}
        for k, (name, factors) in enumerate(live.items()):
            sides = self.modules[name]
            twin = isinstance(sides["B"], SlotLinear) and sides["B"].kind == "T"
            for role, values in found.items():
                values.append(factors[role].data)
                if twin:
                    r = factors["A"].shape[0]
                    frozen = sides[role].frozen
                    twins[role].append((k, frozen[:r] if role == "A" else frozen[:, :r]))
        if self.whole:
            both = wholes([*found["A"], *found["B"]])
            found = {"A": both[: len(live)], "B": both[len(live) :]}
        for role, frozen in twins.items():
            if frozen:
                live_ones = [found[role][k] for k, _ in frozen]
                starts = [parted(t, value) for value, (_, t) in zip(live_ones, frozen, strict=True)]
                sums = torch._foreach_add(live_ones, starts)
                for (k, _), value in zip(frozen, sums, strict=True):
                    found[role][k] = value
        rows = zip(live, found["A"], found["B"], strict=True)
        return [Pair(name, A, B, self.scale[name], trains.get(name, "AB")) for name, A, B in rows]

    def held(self, lists: Mapping[str, Sequence[Tensor]]) -> bool:
        """Whether the values are the Parameters themselves, neither sums of twins nor parts of sharded ones."""
        sides = (sides["B"] for sides in self.modules.values())
        twins = any(type(side) is SlotLinear and side.kind == "T" for side in sides)
        return not twins and not any(map(sharded, lists.values()))

    def grads(self, live: Mapping[str, Mapping[str, nn.Parameter]], names: Iterable[str]) -> dict[str, Grad]:
        """The gradients of these sites' factors."""
        wanted = list(names)
        found = {(n, f): p.grad for n in wanted for f, p in live[n].items() if p.grad is not None}
        if self.whole:
            found = dict(zip(found, wholes(list(found.values())), strict=True))
        return {n: Grad(found.get((n, "A")), found.get((n, "B"))) for n in wanted}


def named(pairs: Sequence[Pair], own: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """Values by (site, name): the factors that train, and a form's own tensors."""
    found = {(p.name, f): getattr(p, f) for p in pairs for f in p.train}
    return {**found, **{key: p.data for key, p in own.items()}}


def named_grads(grads: Mapping[str, Grad], own: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """As `named`, of gradients or updates."""
    found = {(n, f): getattr(g, f) for n, g in grads.items() for f in "AB" if getattr(g, f) is not None}
    return {**found, **own}
