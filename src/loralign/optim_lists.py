"""Lists of tensors treated as one: stacks of equal shapes, Adam by one fused call, masks by one product per shape; and
collections that are only made where somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from loralign.types import Grad, Pair


def adam_state(p: Tensor) -> dict[str, Tensor]:
    """Empty Adam state of one tensor: step (), exp_avg and exp_avg_sq like p, fp32 (float64 stays)."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    zeros = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """One (n, ...) tensor of n equal shapes, at least fp32; for what a group of pairs has in common."""
    whole_group = torch.stack([t for t in tensors if t is not None])
    return whole_group.to(torch.promote_types(whole_group.dtype, torch.float32))


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
    """−lr·m̂/(√v̂ + ε) of each tensor by torch's fused AdamW on a zero buffer; changes state in place."""
    live = [(g, st) for g, st in zip(grads, state, strict=True) if g is not None and st is not None]
    updates = [torch.empty_like(st["exp_avg"]) for _, st in live]
    if live:
        torch._foreach_zero_(updates)
        torch_adamw(
            updates,
            [g.to(st["exp_avg"].dtype) for g, st in live],
            [st["exp_avg"] for _, st in live],
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
    rest = iter(updates)
    return [None if g is None else next(rest) for g in grads]


def masked(values: dict[str, Grad], pairs: Sequence[Pair], masks: Iterable[Sequence[Grad] | None]) -> dict[str, Grad]:
    """Values times masks, one product for all tensors of a shape."""
    for mask in (m for m in masks if m is not None):
        for factor in ("A", "B"):
            groups: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
            for pair, m in zip(pairs, mask, strict=True):
                v, on = getattr(values[pair.name], factor), getattr(m, factor)
                if v is not None and on is not None:
                    groups.setdefault((v.shape, on.shape, v.device), []).append((pair.name, v, torch.atleast_2d(on)))
            for group in groups.values():
                names, vs, ons = zip(*group, strict=True)
                made = torch.stack(vs) * torch.stack(ons)
                values.update((n, values[n]._replace(**{factor: v})) for n, v in zip(names, made.unbind(), strict=True))
    return values


T = TypeVar("T")


class LateSequence(Sequence[T]):
    """A sequence that is made when it is first read: most rules look at a moment and find that it is not theirs."""

    def __init__(self, make: Callable[[], Sequence[T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Sequence[T]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._made)


class LateMapping(Mapping[str, T]):
    """As `LateSequence`."""

    def __init__(self, make: Callable[[], Mapping[str, T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, T]:
        return self._make()

    def __getitem__(self, key: str) -> T:
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
