"""Lists of tensors treated as one: stacks of equal shapes, Adam by one fused call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from loralign.maths.bounds import MomentumDtype
from loralign.types import Pair, SlotChange


def momentum_like(p: Tensor, kept_in: MomentumDtype = "float32") -> Tensor:
    """An empty first moment: at least fp32 (float64 stays), or bf16."""
    dtype = torch.bfloat16 if kept_in == "bfloat16" else torch.promote_types(p.dtype, torch.float32)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)


def adam_state(p: Tensor, kept_in: MomentumDtype = "float32") -> dict[str, Tensor]:
    """Empty Adam state of one tensor: step (), exp_avg and exp_avg_sq like p, fp32 (float64 stays)."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": momentum_like(p, kept_in), "exp_avg_sq": momentum_like(p)}


def adam_slots(state: dict[str, Tensor], axis: int, change: SlotChange) -> None:
    """Adam's moments of one tensor whose slots lie along `axis`, after they changed.

    Dead slots lose their moments. New ones start with m = 0 and their source's v, or the mean v of those that were
    there: with v = 0 under a late step counter Adam's next updates would be up to 6.6·lr instead of at most lr.
    """
    fresh = [*change.fresh, *(to for to, source in change.copied if source < 0)]
    copies = [(to, source) for to, source in change.copied if source >= 0]
    m, v = (state[key].movedim(axis, 0) for key in ("exp_avg", "exp_avg_sq"))
    parts = [*change.off], fresh, [to for to, _ in copies], [source for _, source in copies]
    places = torch.tensor([slot for part in parts for slot in part], dtype=torch.int64, device=v.device)
    gone = places[: len(places) - len(copies)]
    _, new, to, origin = places.split([len(part) for part in parts])
    sources = v[origin] if copies else None
    if fresh:
        there = (v.flatten(1).any(1) if v.dim() > 1 else v > 0).index_fill_(0, gone, False).to(v.dtype)
        mean = (v * there.view(-1, *(1,) * (v.dim() - 1))).sum(0) / there.sum().clamp_min_(1.0)
    m.index_fill_(0, gone, 0.0)
    v.index_fill_(0, gone, 0.0)
    if fresh:
        v.index_copy_(0, new, mean.expand(len(fresh), *mean.shape))
    if sources is not None:
        v.index_copy_(0, to, sources)


def stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """One (n, ...) tensor of n equal shapes, at least fp32, not to be written to; no copy of rows of one tensor."""
    found = [t for t in tensors if t is not None]
    joint = _rows_of(found)
    if joint is None:
        # one (n·rows, ...) tensor is made faster than n views and a stack
        joint = torch.cat(found).view(len(found), *found[0].shape) if found[0].dim() else torch.stack(found)
    return widened(joint)


def widened(t: Tensor) -> Tensor:
    """At least fp32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def joined(stacks: Sequence[Tensor]) -> Tensor:
    """(Σn, ...) of stacks (n, ...), not to be written to; no copy where they follow one another in one tensor."""
    base, start = stacks[0]._base, stacks[0].data_ptr()
    end = start
    for X in stacks:
        if base is None or X._base is not base or X.data_ptr() != end or not X.is_contiguous():
            return torch.cat(list(stacks))
        end += X.numel() * X.element_size()
    return stacks[0].as_strided((sum(map(len, stacks)), *stacks[0].shape[1:]), stacks[0].stride())


_BASE = attrgetter("_base")


def _rows_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows, all and in order, these are; None where there is none."""
    base = tensors[0]._base
    if base is None or base.shape != (len(tensors), *tensors[0].shape) or not base.is_contiguous():
        return None
    step, start = base.stride(0) * base.element_size(), base.data_ptr()
    if tensors[0].stride() != base.stride()[1:] or not all(map(is_, map(_BASE, tensors), repeat(base))):
        return None
    places = list(map(Tensor.data_ptr, tensors))
    return base if places == list(range(start, start + len(tensors) * step, step)) else None


def kept(states: Sequence[dict[str, Tensor]], key: str) -> Tensor:
    """One (n, ...) tensor of which the states' tensors are the rows, so that writing to it changes them all."""
    found = [st[key] for st in states]
    joint = _rows_of(found)
    if joint is None:
        joint = torch.stack(found)
        for st, row in zip(states, joint.unbind(), strict=True):
            st[key] = row
    return joint


def by_shape(pairs: Sequence[Pair]) -> list[list[int]]:
    """The places of the pairs of each shape."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for k, p in enumerate(pairs):
        groups.setdefault((*p.A.shape, p.B.shape[0]), []).append(k)
    return list(groups.values())


def scales(pairs: Sequence[Pair], like: Tensor) -> Tensor | float:
    """s of every pair, (n, 1, 1); the one number where all agree, which saves a copy to the device."""
    found = [p.s for p in pairs]
    if len(set(found)) == 1:
        return found[0]
    return torch.tensor(found, dtype=torch.float64).to(like)[:, None, None]


def adam_updates(
    grads: Sequence[Tensor | None],
    state: Sequence[dict[str, Tensor] | None],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[Tensor | None]:
    """−lr·m̂/(√v̂ + ε) of each tensor by torch's fused AdamW on a zero buffer; changes state in place.

    The kernel wants m in the precision of v, so one that is kept in bf16 is widened for the step.
    """
    live = [(g, st) for g, st in zip(grads, state, strict=True) if g is not None and st is not None]
    updates = _zeros([st["exp_avg_sq"] for _, st in live])
    if live:
        m = [st["exp_avg"].to(u.dtype) for (_, st), u in zip(live, updates, strict=True)]
        torch_adamw(
            updates,
            [g if g.dtype == u.dtype else g.to(u.dtype) for (g, _), u in zip(live, updates, strict=True)],
            m,
            [st["exp_avg_sq"] for _, st in live],
            [],
            [st["step"] for _, st in live],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        for (_, st), now in zip(live, m, strict=True):
            if now is not st["exp_avg"]:
                st["exp_avg"].copy_(now)
    rest = iter(updates)
    return [None if g is None else next(rest) for g in grads]


def _zeros(like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of these shapes, those of one shape as rows of one tensor."""
    made: list[Tensor] = list(like)
    groups: dict[Any, list[int]] = {}
    for k, t in enumerate(like):
        if type(t) is Tensor:
            groups.setdefault((t.shape, t.dtype, t.device), []).append(k)
        else:
            made[k] = torch.zeros_like(t)
    for (shape, dtype, device), at in groups.items():
        for k, row in zip(at, torch.zeros((len(at), *shape), dtype=dtype, device=device).unbind(), strict=True):
            made[k] = row
    return made
