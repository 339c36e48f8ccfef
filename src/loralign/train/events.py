"""Carry out what rules plan: slots die, come alive, are copied; Parameters and shapes stay, optimizer state follows.

Every process computes the plan, since a rule's memory must be the same everywhere; what rank 0 planned is carried out
by all, so that no rounding can drive them apart. What may be due at every step (`OFTEN`) is not sent as text: it
follows from the step alone, and the masks of a `ZeroWhere` are sent from device to device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from loralign.carrier.slot import add_frozen, whole, write
from loralign.maths.draws import keyed_generator
from loralign.maths.lists import joined
from loralign.optim.pairs import PairOptimizer
from loralign.optim.shards import sharded, wholes
from loralign.optim.stacks import listed
from loralign.types import (
    Copy,
    Elements,
    Freeze,
    LoralignError,
    Off,
    On,
    Plan,
    Prox,
    RuleState,
    Set,
    Site,
    SlotChange,
    Unborn,
    Verb,
    WorkFailed,
    Zero,
    ZeroWhere,
)

OFTEN = (Prox, ZeroWhere)
VERBS: dict[str, type[Any]] = {v.__name__: v for v in get_args(Verb)}


def agreed(plan: Plan | None) -> Plan:
    """Rank 0's plan, on every rank. Where nothing is due all know it, and what is the same everywhere anyway is not
    sent: nobody waits for the others at steps without an event."""
    if plan is None or (plan and all(isinstance(verb, OFTEN) for verb in plan)):
        return plan or ()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return plan or ()
    text = json.dumps([[type(verb).__name__, dataclasses.astuple(verb)] for verb in plan or ()]).encode()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, 0)
    body = torch.frombuffer(bytearray(text.ljust(int(length), b" ")[: int(length)]), dtype=torch.uint8).to(device)
    dist.broadcast(body, 0)
    found = json.loads(bytes(body.cpu().tolist()))
    return tuple(VERBS[name](*map(_tuples, values)) for name, values in found)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


Changes = Sequence[tuple[str, SlotChange | None]]
"""What happened to the slots of sites, in order; None: nothing that optimizer state follows."""


class Stage:
    """The adapted sites and their optimizer, on which the verbs of one rule act."""

    def __init__(self, optimizer: PairOptimizer, state: RuleState, seed: int, step: int) -> None:
        self.optimizer, self.state, self.seed, self.step = optimizer, state, seed, step

    def site(self, name: str) -> Site:
        if name not in self.optimizer.sites:
            raise LoralignError(f"a rule planned for {name}, which is not adapted")
        return self.optimizer.sites[name]

    def factor(self, site: Site, side: str) -> Tensor:
        """The live Parameter of one factor."""
        p: Tensor = getattr(site.layer, f"lora_{side}")[site.adapter]._parameters["weight"]
        return p

    @cached_property
    def lists(self) -> dict[str, list[Any]]:
        return listed(self.optimizer.param_groups)

    def own(self, site: str, name: str) -> Tensor:
        role, k = self.optimizer.layout.where.get(site, {}).get(name, ("", 0))
        if role != "form":
            raise LoralignError(f"a rule planned for the tensor {name!r} of {site}, which its form does not have")
        p: Tensor = self.lists[role][k]
        return p

    def alike(self, sites: Iterable[str], name: str) -> list[tuple[list[str], list[Tensor]]]:
        """A form's own tensors of these sites, those of one shape together."""
        kinds: dict[object, tuple[list[str], list[Tensor]]] = {}
        for site in sites:
            p = self.own(site, name)
            names, ps = kinds.setdefault((p.shape, p.dtype, p.device), ([], []))
            names.append(site)
            ps.append(p)
        return list(kinds.values())

    def put(self, site: Site, slots: Sequence[int], A: Tensor | None, B: Tensor | None) -> None:
        """Rows of A and columns of B of these slots; None: zeros. Only they are touched."""
        at = list(slots)
        for p, value, axis in ((self.factor(site, "A"), A, 0), (self.factor(site, "B"), B, 1)):
            now = whole(p)
            new = torch.zeros_like(now.index_select(axis, torch.tensor(at, device=now.device)))
            set_slots(p, at, axis, new if value is None else value.to(new))

    def mark(self, site: Site, slots: Sequence[int], dead: bool) -> None:
        mask = self.optimizer.dead.get(site.name, torch.zeros(site.r, dtype=torch.bool)).clone()
        mask[list(slots)] = dead
        self.optimizer.dead[site.name] = mask


@torch.no_grad()
def set_slots(p: Tensor, at: Sequence[int], axis: int, value: Tensor) -> None:
    """Write slots of a possibly sharded tensor in place."""
    if p is not whole(p):  # sharded
        full = whole(p).clone()
        full.index_copy_(axis, torch.tensor(list(at), device=full.device), value)
        write(p, full)
    else:
        p.index_copy_(axis, torch.tensor(list(at), device=p.device), value)


def write_all(ps: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write full tensors into possibly sharded ones."""
    if not sharded(ps):
        torch._foreach_copy_(list(ps), list(values))
        return
    for p, value in zip(ps, values, strict=True):
        write(p, value)


@torch.no_grad()
def apply_plan(stage: Stage, plan: Plan) -> set[str]:
    """Carry out the verbs in order; the names of the sites whose slots changed."""
    changes: dict[str, list[SlotChange]] = {}
    for kind, verbs in _runs(plan):
        if kind in TOGETHER:
            found = TOGETHER[kind](stage, verbs)
        else:
            found = [(verb.site, ACTIONS[kind](stage, stage.site(verb.site), verb)) for verb in verbs]
        for site, change in found or ():
            if change is not None:
                changes.setdefault(site, []).append(change)
    stage.optimizer.on_slots(changes)
    return {site for verb in plan for site in _sites(stage, verb)}


def _sites(stage: Stage, verb: Verb) -> Iterable[str]:
    if isinstance(verb, ZeroWhere):
        return [site for place in stage.optimizer.layout.all if verb.name in place.found for site in place.sites]
    return verb.sites if isinstance(verb, Prox) else (verb.site,)


def _runs(plan: Sequence[Any]) -> Iterator[tuple[type[Any], list[Any]]]:
    """Verbs of one kind that follow one another; of those that read what they write, one for each tensor."""
    for kind, alike in groupby(plan, type):
        run: dict[object, Any] = {}
        for verb in alike:
            key: object = (verb.site, getattr(verb, "name", "")) if kind in (Copy, Set) else len(run)
            if key in run:
                yield kind, list(run.values())
                run = {}
            run[key] = verb
        yield kind, list(run.values())


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
