"""Common directions for every site: read from a basis file or extracted, the side chosen, gaps reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loralign.carrier.sites import weight
from loralign.evidence.ranks import rank
from loralign.evidence.sources import WEIGHTS_WARNING, Leading, Members, Target, cut, leading, pattern
from loralign.evidence.subspace import SIDES, Basis, Shared, Side, consensus_of, extract, read_basis
from loralign.evidence.tap import Passes
from loralign.types import Batch, CommonSubspace, Directions, LoralignError, Site

log = logging.getLogger("loralign")


def common_subspace(
    need: CommonSubspace, passes: Passes, sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, Directions]:
    """Per site the shared directions of one side, U or V; fewer than r, or none, where no more are shared."""
    if rank() != 0 and need.sources:  # the model's own layers may be sharded: then every rank must take part
        return {}
    basis = _basis(need, passes, sites)
    found = {site.name: _directions(need, basis, site) for site in sites}
    if need.sources and not any(len(d.S) for d in found.values()):
        raise LoralignError(
            "the sources share no direction above chance at any module: give more of them, closer to the task, or take "
            "another init"
            if any(basis.at(site.name) for site in sites)
            else f"the basis knows none of the {len(sites)} modules, {sites[0].name} first: it belongs to another model"
        )
    _report_gaps(found, sites)
    for name, d in found.items():
        log.debug("%s: %s", name, d.note)
    return found


def _report_gaps(found: Mapping[str, Directions], sites: Sequence[Site]) -> None:
    """Fewer than r in common is usual and said; nothing in common is a warning."""
    for wanted, level in ((1, logging.WARNING), (None, logging.INFO)):
        short = [site.name for site in sites if len(found[site.name].S) < (wanted or site.r)]
        if short:
            what = "no direction" if wanted else "fewer than r directions"
            said = f"{len(short)} of {len(sites)} sites have {what} in common, {short[0]} first: the rest is filled up"
            log.log(level, "%s", said)


def _basis(need: CommonSubspace, passes: Passes, sites: Sequence[Site]) -> Basis:
    if not need.sources:
        return consensus_of(_own_layers(sites, need.width), passes.progress)
    if len(need.sources) == 1 and Path(need.sources[0]).is_file():
        if need.base:
            raise LoralignError("a basis file needs no `base`: leave it out")
        kept = read_basis(Path(need.sources[0]))
        if kept.facts["kind"] == "weights":
            log.warning("%s", WEIGHTS_WARNING)
        return kept
    targets = [Target(s.name, s.d_out, s.d_in, bool(getattr(s.layer, "fan_in_fan_out", False))) for s in sites]
    return extract(need.sources, base=need.base, targets=targets, width=need.width, progress=passes.progress)


def _own_layers(sites: Sequence[Site], width: int) -> Members:
    """The layers of the model itself, read from its memory."""
    groups: dict[str, list[Leading]] = {}
    for site in sites:
        few = cut(width, Target(site.name, site.d_out, site.d_in))
        groups.setdefault(pattern(site.name), []).append(partial(_read, site, few))
    about = {"kind": "weights", "sources": [{"name": "the model's own layers"}], "base": None, "width": width}
    return Members(groups, width, about)


def _read(site: Site, width: int) -> tuple[Tensor, Tensor]:
    U, V = leading(weight(site).read(), width)
    return U.cpu(), V.cpu()


def choose_side(need: CommonSubspace, kind: str, sides: dict[Side, Shared], r: int) -> Side:
    """The wanted side; on "auto" the one where more directions (up to r) stand out, then the one where they do more.

    Adapters: left, since their right sides also share the seed they were drawn from.
    """
    if need.side != "auto":
        return need.side
    if kind == "adapters":
        return "left"

    def evidence(side: Side) -> tuple[int, float]:
        s = sides[side]
        return min(r, s.significant), float(s.share[:r].sum()) / s.null

    return max(SIDES, key=evidence)


def _directions(need: CommonSubspace, basis: Basis, site: Site) -> Directions:
    sides = dict(basis.at(site.name) or {})
    if not sides:
        side: Side = "right" if need.side == "right" else "left"
        empty = torch.zeros(site.d_out if side == "left" else site.d_in, 0)
        return _one_sided(side, empty, torch.zeros(0), f"not among the sources; {side} side filled up")
    side = choose_side(need, basis.facts["kind"], sides, site.r)
    shared = sides[side]
    if shared.basis.shape[0] != (site.d_out if side == "left" else site.d_in):
        raise LoralignError(
            f"the basis has {shared.basis.shape[0]} rows for {site.name}, which is ({site.d_out}, {site.d_in}): it "
            "belongs to another model"
        )
    n = min(site.r, shared.significant)
    first = f"{float(shared.share[0]):.2f}" if len(shared.share) else "nothing"
    note = f"{side} side, {n} of {site.r} directions shared by {shared.sources} (first {first}, null {shared.null:.2f})"
    return _one_sided(side, shared.basis[:, :n], shared.share[:n], note)


def _one_sided(side: Side, basis: Tensor, share: Tensor, note: str) -> Directions:
    agreed = float(share.mean()) if len(share) else None
    left, right = (basis, None) if side == "left" else (None, basis)
    return Directions(left, share, right, captured=agreed, exact=True, note=note)
