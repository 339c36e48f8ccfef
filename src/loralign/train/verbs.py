"""What each verb of a plan does to the slots of its sites, and what optimizer state must follow.

Verbs of one kind that follow one another are carried out together where that saves calls (`TOGETHER`). Masks that a
device chose are rank 0's everywhere, or compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loralign.carrier.links import add_frozen
from loralign.carrier.slot import whole
from loralign.maths.draws import keyed_generator
from loralign.maths.lists import joined
from loralign.optim.shards import sharded, wholes
from loralign.train.stage import Stage, write_all
from loralign.types import (
    Copy,
    Elements,
    Freeze,
    Off,
    On,
    Prox,
    Set,
    Site,
    SlotChange,
    Unborn,
    Verb,
    WorkFailed,
    Zero,
    ZeroWhere,
)

Changes = Sequence[tuple[str, SlotChange | None]]
"""What happened to the slots of sites, in order; None: nothing that optimizer state follows."""


def _off(stage: Stage, site: Site, verb: Any) -> SlotChange:
    stage.put(site, verb.slots, None, None)
    stage.mark(site, verb.slots, dead=True)
    return SlotChange(off=tuple(verb.slots))


def _on(stage: Stage, site: Site, verb: On) -> SlotChange:
    source = keyed_generator(stage.seed, "slots come alive", stage.step, site.name)
    rows = (2 * torch.rand(site.r, site.d_in, generator=source) - 1) / site.d_in**0.5
    stage.put(site, verb.slots, rows[list(verb.slots)], None)
    stage.mark(site, verb.slots, dead=False)
    return SlotChange(fresh=tuple(verb.slots))


def _zero(stage: Stage, verbs: Sequence[Zero]) -> None:
    """One collective for sharded tensors; vectors (gates) of one length as one, with one copy of the places to the
    device."""
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    for verb in verbs:
        slots = wanted.setdefault(verb.name, {})
        slots[verb.site] = slots.get(verb.site, ()) + verb.slots
    for name, slots in wanted.items():
        if name in ("A", "B"):
            _zero_wide([stage.factor(stage.site(site), name) for site in slots], "AB".index(name), list(slots.values()))
            continue
        for sites, ps in stage.alike(slots, name):
            if ps[0].dim() > 1:
                _zero_wide(ps, 0, [slots[site] for site in sites])
                continue
            r = len(ps[0])
            places = [k * r + j for k, site in enumerate(sites) for j in slots[site]]
            joint, rows = stage.optimizer.layout.scratch(wholes(ps))
            joint.view(-1).index_fill_(0, torch.tensor(places, device=joint.device).long(), 0.0)
            write_all(ps, rows)


def _zero_wide(ps: Sequence[Tensor], axis: int, slots: Sequence[tuple[int, ...]]) -> None:
    values = wholes(ps)
    rows = [torch.tensor(at, device=x.device).long() for x, at in zip(values, slots, strict=True)]
    write_all(ps, [x.index_fill(axis, at, 0.0) for x, at in zip(values, rows, strict=True)])


def _zero_where(stage: Stage, verbs: Sequence[ZeroWhere]) -> None:
    """One collective for sharded vectors, one for the masks, a few calls for all vectors of one length."""
    for verb in verbs:
        places = [place for place in stage.optimizer.layout.all if verb.name in place.found]
        masks = _of_rank_0([stage.state.pop(f"{verb.mask}|{place.key}") for place in places])
        ps: list[list[Any]] = [place.tensors(verb.name, stage.lists) for place in places]
        values = iter(wholes([p for some in ps for p in some]))
        kinds: dict[object, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for mask, some in zip(masks, ps, strict=True):
            now = list(islice(values, len(some)))
            kind = kinds.setdefault((now[0].shape, now[0].dtype, now[0].device), ([], [], []))
            kind[0].append(mask)
            kind[1].extend(some)
            kind[2].extend(now)
        for off, written, now in kinds.values():
            joint, rows = stage.optimizer.layout.scratch(now)
            joint.masked_fill_(torch.cat(off).to(joint.device), 0.0)
            write_all(written, rows)


def _of_rank_0(masks: Sequence[Tensor]) -> Sequence[Tensor]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks
    sent = torch.cat([mask.reshape(-1) for mask in masks]).to(torch.uint8)
    dist.broadcast(sent, 0)
    parts = sent.bool().split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def _tensor(stage: Stage, site: str, name: str) -> tuple[Tensor, int]:
    """A tensor and the axis of its slots."""
    if name in ("A", "B"):
        return stage.factor(stage.site(site), name), "AB".index(name)
    return stage.own(site, name), 0


def _copy(stage: Stage, verbs: Sequence[Copy]) -> Changes:
    """Sites of one shape together; their factors are written as a whole."""
    kinds: dict[object, list[Copy]] = {}
    for verb in verbs:
        A, B = (stage.factor(stage.site(verb.site), side) for side in "AB")
        kinds.setdefault((verb.snapshot, A.shape, B.shape, A.dtype, B.dtype, A.device), []).append(verb)
        if verb.site in stage.optimizer.dead:
            stage.mark(stage.site(verb.site), verb.to, dead=False)
    for alike in kinds.values():
        found = [(k, to, source) for k, v in enumerate(alike) for to, source in zip(v.to, v.source, strict=True)]
        for side in "AB":
            ps = [stage.factor(stage.site(verb.site), side) for verb in alike]
            joint = torch.stack(wholes(ps))
            held = [stage.state[f"{v.snapshot}|{v.site}|{side}"] for v in alike if v.snapshot]
            source_of = torch.stack(held).to(joint) if held else joint
            rows, sources = (x if side == "A" else x.mT for x in (joint, source_of))
            at, to, source = torch.tensor(found, device=joint.device).long().view(-1, 3).unbind(1)
            rows[at, to] = sources[at, source]
            write_all(ps, joint.unbind())
    return [(v.site, SlotChange(copied=tuple(zip(v.to, _sources(v), strict=True)))) for v in verbs]


def _sources(verb: Copy) -> tuple[int, ...]:
    return (-1,) * len(verb.to) if verb.snapshot else verb.source


def _set(stage: Stage, verbs: Sequence[Set]) -> None:
    for name in dict.fromkeys(verb.name for verb in verbs):
        wanted = {verb.site: verb for verb in verbs if verb.name == name}
        for sites, ps in stage.alike(wanted, name):
            flat, r = torch.cat(wholes(ps)), len(ps[0])
            at = torch.tensor([k * r + j for k, site in enumerate(sites) for j in wanted[site].slots]).to(flat.device)
            flat.index_copy_(0, at, torch.tensor([x for site in sites for x in wanted[site].values]).to(flat))
            write_all(ps, flat.view(len(ps), r).unbind())
            states = [stage.optimizer.state[p] for p in ps]
            for key in ("exp_avg", "exp_avg_sq") if any(states) else ():
                moments = [state[key] if state else torch.zeros(r, device=flat.device) for state in states]
                flat = torch.cat(moments).index_fill_(0, at, 0.0)
                torch._foreach_copy_(moments, list(flat.view(len(ps), r).unbind()))


def _prox(stage: Stage, verbs: Sequence[Prox]) -> None:
    """x − min(max(x, −ξ), ξ). One collective for sharded ones, a few calls for all: due at every step."""
    for verb in verbs:
        for _, ps in stage.alike(verb.sites, verb.name):
            values = wholes(ps)
            joint, rows = stage.optimizer.layout.scratch(values)
            joint.clamp_(-verb.threshold, verb.threshold)
            if sharded(ps):
                write_all(ps, torch._foreach_sub(values, rows))
            else:
                torch._foreach_sub_(ps, rows)


def _freeze(stage: Stage, site: Site, verb: Freeze) -> None:
    A, B = whole(stage.factor(site, "A")), whole(stage.factor(site, "B"))
    add_frozen(site.layer, site.adapter, A.clone(), verb.weight * B)


def _elements(stage: Stage, verbs: Sequence[Elements]) -> None:
    """One comparison and one collective for all of them, three calls for those of one width."""
    masks: dict[tuple[str, str], Tensor] = {}
    for verb in verbs:
        key, mask = (verb.site, verb.name), stage.state[verb.mask]
        masks[key] = masks[key] | mask if key in masks else mask
    _same_everywhere(masks)
    ps = [_tensor(stage, *key)[0] for key in masks]
    kinds: dict[object, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for p, value, mask in zip(ps, wholes(ps), masks.values(), strict=True):
        kinds.setdefault((value.shape[1:], value.dtype, value.device), []).append((p, value, mask))
    for alike in kinds.values():
        written, values, off = zip(*alike, strict=True)
        joint = torch.cat(values).masked_fill_(joined(off).to(values[0].device), 0.0)
        write_all(written, joint.split([len(value) for value in values]))


def _same_everywhere(masks: Mapping[tuple[str, str], Tensor]) -> None:
    """Raise where the processes computed different masks, of tensors by (site, name)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    digests = [hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=7).digest() for mask in masks.values()]
    mine = torch.tensor([int.from_bytes(d, "big") for d in digests], device=next(iter(masks.values())).device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    apart = [site for (site, _), differs in zip(masks, low.ne(high).tolist(), strict=True) if differs]
    if apart:
        raise WorkFailed(f"the processes computed different element masks at {apart[0]}")


ACTIONS: dict[type[Verb], Callable[[Stage, Site, Any], SlotChange | None]] = {
    Off: _off,
    Unborn: _off,
    On: _on,
    Freeze: _freeze,
}
TOGETHER: dict[type[Verb], Callable[[Stage, Sequence[Any]], Changes | None]] = {
    Zero: _zero,
    ZeroWhere: _zero_where,
    Copy: _copy,
    Set: _set,
    Prox: _prox,
    Elements: _elements,
}
"""Verbs that are carried out for all their sites in a few calls."""
