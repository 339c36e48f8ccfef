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
         Presets: r, alpha, dropout, clip, u, m and n of the paper; its optimizer is paged, ours is not; warm-up (0.03)
         and the NF4 base are the file's to say. Targets are ours, too: all linear layers.
         Start: A_0 and A_u uniform with LoRA's bound 1/√d_in (the paper's rectified start), B_0 = B_u = 0; where
         m = n = 1 or u = r, LoRA's own numbers.
Cost:    u·(d_in + d_out) + r'·(⌈d_in/m⌉ + ⌈d_out/n⌉) trained numbers; the products of LoRA at rank r and a copy of the
         factors, r·(d_in + d_out), in every forward, made for all sites of a shape at once; PEFT's own A and B of rank
         r are kept beside, at zero.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralign.maths.bounds import Count, Place, bounded
from loralign.maths.operators import Dense
from loralign.types import Draw, Facts, FormBase, Live, Operator, Weight

ROTATION = 1
"""Version of the direction and the strides: copy j is torch.roll(chunk, −j·stride)."""


class Layout(NamedTuple):
    """How a chunk is laid out: so many copies side by side, cut off at `size`; axis: of the ranks, 1 for B."""

    copies: int
    size: int
    axis: int

    def of(self, chunk: Tensor) -> tuple[int, int, int, int]:
        """Ranks, width, stride, and how often the ranks stand one after the other so that each copy is a window."""
        ranks, c = chunk.shape[self.axis], chunk.shape[1 - self.axis]
        stride = max(ranks // self.copies, 1)
        return ranks, c, stride, 1 - (1 - self.copies) * stride // ranks


def repeated(chunk: Tensor, copies: int, size: int, axis: int = 0) -> Tensor:
    """(r', c) -> (r', size): `copies` of the chunk side by side, each with its ranks rotated further, cut off.

    axis: of the ranks; 1 for chunks (c, r') of B.
    """
    return _laid_out([chunk], Layout(copies, size, axis))[0]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _laid_out(chunks: Sequence[Tensor], how: Layout) -> Tensor:
    """(sites, r', size), or (sites, size, r') for B."""
    stacked = _stack(chunks)
    if how.copies == 1:
        return stacked
    ranks, c, stride, times = how.of(chunks[0])
    rows = torch.cat([stacked] * times, 1 + how.axis)
    n, width, wide = len(chunks), how.copies * c, times * ranks
    if how.axis:
        windows = rows.as_strided((n, how.copies, c, ranks), (c * wide, stride, wide, 1))
        whole = windows.reshape(n, width, ranks)
    else:
        windows = rows.as_strided((n, ranks, how.copies, c), (wide * c, c, stride * c, 1))
        whole = windows.reshape(n, ranks, width)
    return whole if width == how.size else whole.narrow(2 - how.axis, 0, how.size)


def _summed(g: Tensor, chunk: Tensor, how: Layout) -> Tensor:
    """The adjoint of `_laid_out`: what the copies of a rank got, (sites, r', c), or (sites, c, r') for B."""
    if how.copies == 1:
        return g.contiguous()
    ranks, c, stride, times = how.of(chunk)
    n, width, wide = g.shape[0], how.copies * c, times * ranks
    if missing := width - how.size:
        g = nn.functional.pad(g, (0, 0, 0, missing) if how.axis else (0, missing))
    rows, last = torch.cat([g] * times, 1 + how.axis), wide - ranks
    if how.axis:
        windows = rows.as_strided((n, how.copies, c, ranks), (width * wide, c * wide - stride, wide, 1), last)
    else:  # the last copy first, since strides are not negative
        begin = (last - (how.copies - 1) * stride) * width + (how.copies - 1) * c
        windows = rows.as_strided((n, how.copies, ranks, c), (wide * width, stride * width - c, width, 1), begin)
    return windows.sum(1)


class _Factors(torch.autograd.Function):
    """The factor of each site, chunks laid out with the ranks of their own behind: one node for all sites of a shape.

    It keeps no tensors, so forwards under activation checkpointing may make it again. Sites that nobody used get none.
    """

    @staticmethod
    def forward(ctx: Any, how: Layout, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.how, ctx.n, ctx.own, ctx.chunk = how, n, len(tensors) > n, tensors[0].detach().to("meta")
        made = _laid_out(tensors[:n], how)
        return (torch.cat([made, _stack(tensors[n:])], 1 + how.axis) if ctx.own else made).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        axis, ranks = 1 + ctx.how.axis, ctx.chunk.shape[ctx.how.axis]
        used = [k for k, g in enumerate(grads) if g is not None]
        found: list[Tensor | None] = [None] * (2 * ctx.n if ctx.own else ctx.n)
        if used:
            g = _stack([g for g in grads if g is not None])
            parts = [_summed(g.narrow(axis, 0, ranks), ctx.chunk, ctx.how)]
            if ctx.own:
                parts.append(g.narrow(axis, ranks, g.shape[axis] - ranks).contiguous())
            for first, part in zip((0, ctx.n), parts, strict=False):
                for k, value in zip(used, part.unbind(0), strict=True):
                    found[first + k] = value
        return None, None, *found


def _factors(chunks: Sequence[Tensor], own: Sequence[Tensor], how: Layout) -> Sequence[Tensor]:
    if not chunks:
        return own
    if not torch.compiler.is_compiling():
        made: Sequence[Tensor] = _Factors.apply(how, len(chunks), *chunks, *own)
        return made
    laid = _laid_out(chunks, how)
    return (torch.cat([laid, _stack(own)], 1 + how.axis) if own else laid).unbind(0)


@dataclass(frozen=True)
class PartialRotation(FormBase):
    unshared: int
    share_A: int
    share_B: int

    @property
    def facts(self) -> Facts:
        return Facts(
            stock="",
            tied=True,
            together=self.together,
            own_decay=True,
            version=ROTATION,
            least_rank=self.unshared,
            least_option="unshared",
        )

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
        return self.together([own])[0]

    def together(self, sites: Sequence[Live]) -> Sequence[tuple[Operator, Operator]]:
        def parts(name: str) -> list[Tensor]:
            return [site.own[name] for site in sites if name in site.own]

        first = sites[0]
        A = _factors(parts("chunk_A"), parts("own_A"), Layout(self.share_A, first.A.shape[1], 0))
        B = _factors(parts("chunk_B"), parts("own_B"), Layout(self.share_B, first.B.shape[0], 1))
        return [(Dense(a), Dense(b)) for a, b in zip(A, B, strict=True)]


@bounded
def partial_rotation(unshared: Place = 1, share_A: Count = 4, share_B: Count = 4) -> PartialRotation:
    """PRoLoRA."""
    return PartialRotation(unshared, share_A, share_B)
