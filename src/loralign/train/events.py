"""Carry out what rules plan: slots die, come alive, are copied; Parameters and shapes stay, optimizer state follows.

Every process computes the plan, since a rule's memory must be the same everywhere; what rank 0 planned is carried out
by all, so that no rounding can drive them apart. What may be due at every step (`OFTEN`) is not sent as text: it
follows from the step alone, and the masks of a `ZeroWhere` are sent from device to device.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, get_args

import torch
import torch.distributed as dist

from loralign.train.stage import Stage
from loralign.train.verbs import ACTIONS, TOGETHER
from loralign.types import Copy, Plan, Prox, Set, SlotChange, Verb, ZeroWhere

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
