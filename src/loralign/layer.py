"""The one low-rank forward and backward: y = base + s·x·Aᵀ·Bᵀ as a single autograd node.

    A = [A_live; A0]        B = [B_live | B0]   (slots)      or      B = [B0 + ΔB | ΔB]   (twin, A_live = ΔA)
    h = x·Aᵀ                y = base + s·h·Bᵀ
    backward:  gh = s·g·B   gx = gh·A   gA = gh_liveᵀ·x   gB = s·gᵀ·h_live   (twin: gΔB = s·gᵀ·(h_1 + h_2))

Shapes:  x (..., d_in) · base, y, g (..., d_out) · A (R, d_in) · B (d_out, R)
Cost:    keeps x (shared with whoever else keeps it) and the live columns of h; the folded factors are formed again in
         backward; no gradient is computed for frozen slots. Products run in the dtype of `base`; gradients of the
         factors come in the factors' own dtype (fp32 masters on CUDA: accumulated in fp32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fold_A(A: Tensor, A0: Tensor | None) -> Tensor:
    """A (r, d_in), A0 (f, d_in) -> (r + f, d_in)."""
    return A if A0 is None or A0.shape[0] == 0 else torch.cat([A, A0.to(A.dtype)], dim=0)


def fold_B(B: Tensor, B0: Tensor | None, *, twin: bool = False) -> Tensor:
    """B (d_out, r), B0 (d_out, f) -> (d_out, r + f); for a twin B is ΔB, f = r and the result is [B0 + ΔB | ΔB]."""
    if B0 is None or B0.shape[1] == 0:
        return B
    return torch.cat([B0.to(B.dtype) + B, B] if twin else [B, B0.to(B.dtype)], dim=1)


def _outer(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """gᵀ·x in the dtype of `like`; half-precision operands on CUDA are summed and returned in fp32."""
    if g.is_cuda and g.dtype != torch.float32 and like.dtype == torch.float32:
        return torch.mm(g.T, x, out_dtype=torch.float32)
    return torch.mm(g.T, x).to(like.dtype)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        s: float,
        twin: bool,
    ) -> Tensor:
        dtype, r = base.dtype, A.shape[0]
        x2 = x.to(dtype).reshape(-1, x.shape[-1])
        h = torch.mm(x2, fold_A(A, A0).to(dtype).T)
        full_B = fold_B(B, B0, twin=twin).to(dtype)
        flat = base.reshape(-1, base.shape[-1])
        if base.is_contiguous() and base._base is None and not base.is_inference():
            ctx.mark_dirty(base)  # what PEFT's layers hand over is the fresh output of the base layer
            flat.addmm_(h, full_B.T, alpha=s)
            y = base
        else:
            y = torch.addmm(flat, h, full_B.T, alpha=s).view(base.shape)
        live_h = (h[:, :r] + h[:, r:] if twin else h[:, :r].contiguous()) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, live_h, A, B, A0, B0)
        ctx.x_shape, ctx.x_dtype, ctx.s, ctx.twin = x.shape, x.dtype, s, twin
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, live_h, A, B, A0, B0 = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        gx = gA = gB = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            gh = torch.mm(g2, fold_B(B, B0, twin=ctx.twin).to(g.dtype)).mul_(ctx.s)
            if ctx.needs_input_grad[1]:
                gx = torch.mm(gh, fold_A(A, A0).to(g.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
            if ctx.needs_input_grad[2]:
                gA = _outer(gh[:, : A.shape[0]], x.to(g.dtype).reshape(-1, x.shape[-1]), A)
        if ctx.needs_input_grad[3]:
            gB = _outer(g2, live_h, B).mul_(ctx.s)
        return g, gx, gA, gB, None, None, None, None


def low_rank(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    twin: bool = False,
) -> Tensor:
    """base + s·x·[A; A0]ᵀ·[B | B0]ᵀ (see the module); may write into `base`, which must be a fresh layer output."""
    y: Tensor = _LowRank.apply(base, x, A, B, A0, B0, s, twin)
    return y


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, sink: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ctx.sink(grads[0], x)
        return grads[0], None, None, None


def tap(y: Tensor, x: Tensor, anchor: Tensor, sink: Any) -> Tensor:
    """y unchanged; in backward `sink(δ, x)` is called with δ = dL/dy (..., d_out) and the layer input x (..., d_in).

    x is kept as a saved tensor, so both kinds of gradient checkpointing recompute it instead of holding it.
    anchor: any scalar that requires grad, so that the first block's layers are reached too.
    """
    out: Tensor = _Tap.apply(y, x, anchor, sink)
    return out
