"""Apply slot plans: slots die, come alive, are copied; Parameters and shapes stay, the optimizer state follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import add_frozen, live_of, whole, write
from loralign.optim.pairs import PairOptimizer
from loralign.types import LoralignError, Plan, SlotPlan


@torch.no_grad()
def apply_plan(model: PeftModel, optimizer: PairOptimizer, plan: Plan) -> None:
    """Carry out what a rule decided, in the order off, copy, on, zero elements, values, prox, frozen."""
    found = {site.name: site for site in sites(model)}
    for name, change in plan.items():
        if name not in found:
            raise LoralignError(f"a rule planned for {name}, which is not adapted")
        site = found[name]
        layer: Any = site.layer
        live = live_of(layer, site.adapter)
        A, B = whole(live.A).clone(), whole(live.B).clone()
        _move(A, B, change)
        write(live.A, A)
        write(live.B, B)
        _extras(live.extra, change)
        if change.frozen is not None:
            add_frozen(layer, site.adapter, *change.frozen)
        if change.off or change.on or change.copy:
            dead = optimizer.dead.get(name, torch.zeros(site.r, dtype=torch.bool))
            dead[list(change.off)] = True
            dead[[*change.on, *(d for d, _ in change.copy)]] = False
            optimizer.dead[name] = dead
        optimizer.on_plan(name, change)


def _move(A: Tensor, B: Tensor, change: SlotPlan) -> None:
    source_A, source_B = A.clone(), B.clone()
    A[list(change.off)], B[:, list(change.off)] = 0.0, 0.0
    for slot, source in change.copy:
        A[slot], B[:, slot] = change.rows.get(slot, (source_A[source], source_B[:, source]))
    for slot in change.on:
        if slot not in change.rows:
            raise LoralignError(f"slot {slot} comes alive without values for its row and column")
        A[slot], B[:, slot] = change.rows[slot]
    if change.zero_elements is not None:
        A[change.zero_elements.to(A.device)] = 0.0


def _extras(extra: Mapping[str, Tensor], change: SlotPlan) -> None:
    for key, value in change.values.items():
        write(extra[key], value.to(extra[key]))
    for key, threshold in change.prox.items():
        g = whole(extra[key])
        write(extra[key], g.sign() * (g.abs() - threshold).clamp_min(0.0))
