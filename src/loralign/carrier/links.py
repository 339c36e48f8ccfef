"""Live slots become frozen ones: a chain's links are committed, rules add slots; W_eff stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loralign.carrier.ragged import leave_open
from loralign.carrier.slot import live_of, trained_of, whole, write
from loralign.carrier.storage import SlotLinear, axis_of, to_grid
from loralign.types import LoralignError, Start


@torch.no_grad()
def add_frozen(layer: Any, adapter: str, A: Tensor, B: Tensor) -> None:
    """Append constant slots, A (f, d_in) and B (d_out, f), to the frozen ones; W_eff follows as the form says."""
    sides = layer.lora_A[adapter], layer.lora_B[adapter]
    for side, value in zip(sides, (A, B), strict=True):
        if not isinstance(side, SlotLinear):
            raise LoralignError("this adapter has no room for frozen slots: a rule that adds some needs its own form")
        side.frozen = torch.cat([side.frozen, whole(value).to(side.frozen)], axis_of(side.kind))
        leave_open(side.frozen, axis_of(side.kind))
    variant = layer.lora_variant[adapter]
    variant.links = (*variant.links, int(A.shape[0]))


@torch.no_grad()
def make_room(layer: Any, adapter: str, slots: int) -> None:
    """As many frozen slots as a checkpoint holds, zero: a sharded one is read in place."""
    for side in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if isinstance(side, SlotLinear) and side.used < slots:
            axis = axis_of(side.kind)
            shape = list(side.frozen.shape)
            shape[axis] = slots - side.used
            side.frozen = torch.cat([side.frozen, side.frozen.new_zeros(shape)], axis)
            leave_open(side.frozen, axis)


def _live_alone(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """What a link leaves of its live tensors: the factors without frozen slots, or what the form says."""
    live, variant = live_of(layer, adapter), layer.lora_variant[adapter]
    if layer.lora_A[adapter].owner is None:
        return live.A, live.B
    if variant.form.facts.link is not None:
        made: tuple[Tensor, Tensor] = variant.form.facts.link(live._replace(A=whole(live.A), B=whole(live.B)))
        return made
    alone = live._replace(A0=live.A0[:0], B0=live.B0[:, :0], links=())
    A, B = variant.form.factors(alone, [live_of(other, adapter) for other in variant.neighbours])
    return A.dense(), B.dense()


@torch.no_grad()
def commit(layer: Any, adapter: str, fresh: Start, slots: int | None = None) -> None:
    """Live slots become frozen ones, `fresh` the live link; Parameters keep their identity, W_eff is unchanged.

    What a form makes of its live tensors alone is committed (gates folded in), and its own tensors start again by
    `fresh.own`. A twin is committed as it is folded, [B0 + ΔB | ΔB]·[ΔA; A0]: two frozen slots for each live one.
    slots: only so many first ones are kept, because the others are zero or nothing is to be kept; None: all.
    """
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    r = side_A.live.shape[0]
    some = slice(0, r if slots is None else min(r, slots))
    A, B = (whole(factor) for factor in _live_alone(layer, adapter))
    A, B = A[some], B[:, some]
    if side_B.kind == "T":
        A0, B0 = side_A.frozen[some], side_B.frozen[:, some]
        A, B = torch.cat([A, A0.to(A)]), torch.cat([B0.to(B) + B, B], dim=1)
        side_A.frozen, side_B.frozen = side_A.frozen[r:], side_B.frozen[:, r:]
        side_B.kind = "B"
    elif layer.lora_variant[adapter].form.facts.link is None:  # slots that a rule switched off leave nothing
        on = A.ne(0).any(1) & B.ne(0).any(0)
        A, B = A[on], B[:, on]
    if slots != 0 and len(A):
        add_frozen(layer, adapter, A, B)
    if fresh.twin:
        side_A.frozen = torch.cat([fresh.A.to(side_A.frozen), side_A.frozen])
        side_B.frozen = torch.cat([to_grid(fresh.B.float()).to(side_B.frozen), side_B.frozen], dim=1)
        leave_open(side_A.frozen, 0)
        leave_open(side_B.frozen, 1)
        side_B.kind = "T"
    for side, value in ((side_A, fresh.A), (side_B, fresh.B)):
        write(side.live, torch.zeros_like(value) if fresh.twin else value.to(side.frozen))
    layer.lora_variant[adapter].train = fresh.train
    for name, value in fresh.own.items():
        write(trained_of(layer, adapter)[name], value)
