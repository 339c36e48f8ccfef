"""Factors made of one chunk each, repeated with its ranks rotated, beside a few ranks of their own.

    A = [A_0 | R(A_0) | R²(A_0) | …  ; A_u]    R: ranks rotated by s_A = max(⌊r'/m⌋, 1), row k of R(A_0) is row k + s_A
    B = [B_0 ; R(B_0) ; R²(B_0) ; …  , B_u]    the same on B's columns with s_B = max(⌊r'/n⌋, 1)
    W_eff = W0 + s·B·A        r' = r − u shared ranks, s = alpha/r

Shapes:  A_0 (r', ⌈d_in/m⌉) · B_0 (⌈d_out/n⌉, r') · A_u (u, d_in) · B_u (d_out, u) · A (r, d_in) · B (d_out, r); the
         repeated chunks are cut off at d_in and d_out
Source:  Wang et al., "PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA", arXiv 2402.16902, §3 and
         appendix A. Official code: Forence1999/PRoLoRA (modules/chunkwise_sharing_LoRA.py).
Differs: from the paper: rotation in the code's direction (the paper's gives the same update with the ranks in another
         order; compact files carry `ROTATION`), strides of r − u, not r, and sizes that m or n does not divide, all as
         the code has them. The unshared ranks come last. All tensors step by AdamW at one learning rate.
         Start: A_0 and A_u uniform with LoRA's bound 1/√d_in (the paper's rectified start), B_0 = B_u = 0; where
         m = n = 1 or u = r, LoRA's own numbers.
Cost:    u·(d_in + d_out) + r'·(⌈d_in/m⌉ + ⌈d_out/n⌉) trained numbers; the products of LoRA at rank r and a copy of the
         factors, r·(d_in + d_out), in every forward; PEFT's own A and B of rank r are kept beside, at zero.
Export:  exact.
Args:    unshared: u, ranks. share_A, share_B: m, n, copies of a chunk.
Example:
    >>> import torch
    >>> from loralign.methods.form.prolora import repeated
    >>> repeated(torch.arange(4.0)[:, None], 2, 2).tolist()  # rank 4, two copies: rotated by two
    [[0.0, 2.0], [1.0, 3.0], [2.0, 0.0], [3.0, 1.0]]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralign.maths.bounds import Count, Place, bounded
from loralign.maths.operators import Dense
from loralign.types import Draw, Facts, FormBase, Live, Operator, Weight

ROTATION = 1
"""Version of the direction and the strides: copy j is torch.roll(chunk, −j·stride)."""


def repeated(chunk: Tensor, copies: int, size: int, axis: int = 0) -> Tensor:
    """(r', c) -> (r', size): `copies` of the chunk side by side, each with its ranks rotated further, cut off.

    axis: of the ranks; 1 for chunks (c, r') of B.
    """
    if copies == 1:
        return chunk
    ranks, c = chunk.shape[axis], chunk.shape[1 - axis]
    stride = max(ranks // copies, 1)
    rows = torch.cat([chunk] * (1 - (1 - copies) * stride // ranks), axis).contiguous()  # the ranks without an end
    if axis:
        whole = rows.as_strided((copies, c, ranks), (stride, rows.shape[1], 1)).reshape(copies * c, ranks)
    else:
        whole = rows.as_strided((ranks, copies, c), (c, stride * c, 1)).reshape(ranks, copies * c)
    return whole if copies * c == size else whole.narrow(1 - axis, 0, size)


def _starts(chunk: Tensor, copies: int, axis: int) -> list[int]:
    """The rank that each copy begins with."""
    ranks = chunk.shape[axis]
    return [j * max(ranks // copies, 1) % ranks for j in range(copies)]


class _Factor(torch.autograd.Function):
    """repeated(chunk), with the ranks of its own behind it: one node, since one for every part keeps a GPU waiting.

    backward: what the copies of a rank got is summed, in the order of the copies.
    """

    @staticmethod
    def forward(ctx: Any, chunk: Tensor, own: Tensor | None, copies: int, size: int, axis: int) -> Tensor:
        ctx.starts, ctx.axis, ctx.chunk, ctx.own = _starts(chunk, copies, axis), axis, chunk.shape, own is not None
        made = repeated(chunk, copies, size, axis)
        return made if own is None else torch.cat([made, own], axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), axis = grads, ctx.axis
        ranks, c = ctx.chunk[axis], ctx.chunk[1 - axis]
        shared = g.narrow(axis, 0, ranks)
        twice = g.new_zeros([n if k != axis else 2 * n for k, n in enumerate(ctx.chunk)])
        for start, part in zip(ctx.starts, shared.split(c, 1 - axis), strict=False):
            there = twice.narrow(axis, start, ranks)
            (there if part.shape == there.shape else there.narrow(1 - axis, 0, part.shape[1 - axis])).add_(part)
        own = g.narrow(axis, ranks, g.shape[axis] - ranks) if ctx.own else None
        return twice.narrow(axis, 0, ranks) + twice.narrow(axis, ranks, ranks), own, None, None, None


def _factor(chunk: Tensor | None, own: Tensor | None, copies: int, size: int, axis: int) -> Tensor:
    if chunk is None:
        assert own is not None
        return own
    if not torch.compiler.is_compiling():
        made: Tensor = _Factor.apply(chunk, own, copies, size, axis)
        return made
    made = repeated(chunk, copies, size, axis)
    return made if own is None else torch.cat([made, own], axis)


@dataclass(frozen=True)
class PartialRotation(FormBase):
    unshared: int
    share_A: int
    share_B: int

    @property
    def facts(self) -> Facts:
        return Facts(stock="", tied=True, own_decay=True, least_rank=self.unshared, version=ROTATION)

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        d_out, d_in = W.shape
        u = min(self.unshared, r)
        shared = r - u
        A = (2 * torch.rand(r, d_in, generator=draw("init A")) - 1) / d_in**0.5
        found = {
            "chunk_A": A[:shared, : math.ceil(d_in / self.share_A)],
            "chunk_B": torch.zeros(math.ceil(d_out / self.share_B), shared),
            "own_A": A[shared:],
            "own_B": torch.zeros(d_out, u),
        }
        return {name: value for name, value in found.items() if value.numel()}

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        A = _factor(own.own.get("chunk_A"), own.own.get("own_A"), self.share_A, own.A.shape[1], 0)
        B = _factor(own.own.get("chunk_B"), own.own.get("own_B"), self.share_B, own.B.shape[0], 1)
        return Dense(A), Dense(B)


@bounded
def partial_rotation(unshared: Place = 1, share_A: Count = 4, share_B: Count = 4) -> PartialRotation:
    """PRoLoRA."""
    return PartialRotation(unshared, share_A, share_B)
