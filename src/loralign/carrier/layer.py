"""The one low-rank forward and backward: y = base + s·x·Aᵀ·Bᵀ as a single autograd node.

Under torch.compile, which fuses it, and for small outputs on a GPU, where the calls cost more than the arithmetic, the
same formula stands as plain statements.

    A = [A_live; A0]        B = [B_live | B0]   (slots)      or      B = [B0 + ΔB | ΔB]   (twin, A_live = ΔA)
    h = x·Aᵀ                y = base + s·h·Bᵀ
    backward:  gh = s·g·B   gx = gh·A   gA = gh_liveᵀ·x   gB = s·gᵀ·h_live   (twin: gΔB = s·gᵀ·(h_1 + h_2))

Shapes:  x (..., d_in) · base, y, g (..., d_out) · A (R, d_in) · B (d_out, R)
Cost:    keeps x (shared with whoever else keeps it) and the live columns of h; the folded factors are formed again in
         backward; no gradient is computed for frozen slots. Products run in the dtype of `base`; gradients of the
         factors come in the factors' own dtype (fp32 masters on CUDA: accumulated in fp32).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_forward_hooks

from loralign.maths.operators import Dense, Gather
from loralign.types import Operator

SMALL = {"cuda": 1 << 23}
"""Numbers of an output below which the host is taken to be the slower one, by device. Torch's own nodes run no Python
in backward (`bench_step.py --shapes host`), but move 8 B more per number in bf16: 20 µs for the largest of these at
3.35 TB/s. The limit is reckoned, not measured on a GPU."""


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Within: outputs on the CPU take the statements that they would take on this device, for plans and benchmarks."""
    before = dict(SMALL)
    SMALL["cpu"] = SMALL.get(device, 0)
    try:
        yield
    finally:
        SMALL.clear()
        SMALL.update(before)


def fold_A(A: Tensor, A0: Tensor | None) -> Tensor:
    """A (r, d_in), A0 (f, d_in) -> (r + f, d_in)."""
    return A if A0 is None or A0.shape[0] == 0 else torch.cat([A, A0.to(A.dtype)], dim=0)


def fold_B(B: Tensor, B0: Tensor | None, *, twin: bool = False) -> Tensor:
    """B (d_out, r), B0 (d_out, f) -> (d_out, r + f); a twin's are ΔB and [B0 | H], the result [B0 + ΔB | ΔB | H]."""
    if B0 is None or B0.shape[1] == 0:
        return B
    B0, r = B0.to(B.dtype), B.shape[1]
    if not twin:
        return torch.cat([B, B0], dim=1)
    return torch.cat([B0[:, :r] + B, B, B0[:, r:]] if B0.shape[1] > r else [B0 + B, B], dim=1)


def _outer(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """gᵀ·x in the dtype of `like`; half-precision operands on CUDA are summed and returned in fp32."""
    if g.dtype == like.dtype:
        return g.t().mm(x)
    if g.is_cuda and like.dtype == torch.float32:
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return g.t().mm(x).to(like.dtype)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _writable(base: Tensor) -> bool:
    return base._base is None and base.is_contiguous() and not base.is_inference()


class _LowRank(torch.autograd.Function):
    # plain statements on purpose: this runs per module and step, and small models feel every microsecond

    @staticmethod
    def forward(ctx: Any, base: Tensor, *args: Any) -> Tensor:
        if torch.is_autocast_enabled(base.device.type):  # it would round products behind our back, base's dtype decides
            with torch.autocast(base.device.type, enabled=False):
                return _LowRank._forward(ctx, base, *args)
        return _LowRank._forward(ctx, base, *args)

    @staticmethod
    def _forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        s: float,
        twin: bool,
        writable: bool,
    ) -> Tensor:
        dtype = base.dtype
        h = _as(_flat(x), dtype).mm(_as(fold_A(A, A0), dtype).t())
        full_B = _as(fold_B(B, B0, twin=twin), dtype).t()
        if writable and _writable(base):
            ctx.mark_dirty(base)  # what PEFT's layers hand over is the fresh output of the base layer
            _flat(base).addmm_(h, full_B, alpha=s)
            y = base
        else:
            y = torch.addmm(_flat(base), h, full_B, alpha=s).view(base.shape)
        if B0 is not None:
            r = A.shape[0]
            h = h[:, :r] + h[:, r : 2 * r] if twin else h[:, :r].contiguous()
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[2] else None, h if needs[3] else None, A, B, A0, B0)
        ctx.meta = (x.shape, x.dtype, s, twin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # with create_graph: right once, and loud where it is differentiated again, since h is kept as a constant
        run: Any = once_differentiable(_LowRank._backward) if torch.is_grad_enabled() else _LowRank._backward
        if torch.is_autocast_enabled(grads[0].device.type):
            with torch.autocast(grads[0].device.type, enabled=False):
                return run(ctx, *grads)
        return run(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, live_h, A, B, A0, B0 = ctx.saved_tensors
        x_shape, x_dtype, s, twin = ctx.meta
        needs, g2, dtype = ctx.needs_input_grad, _flat(g), g.dtype
        gx = gA = gB = None
        if needs[1] or needs[2]:
            gh = g2.mm(_as(fold_B(B, B0, twin=twin), dtype)).mul_(s)
            if needs[1]:
                gx = _as(gh.mm(_as(fold_A(A, A0), dtype)).view(x_shape), x_dtype)
            if needs[2]:
                gA = _outer(gh if A0 is None else gh[:, : A.shape[0]], _as(_flat(x), dtype), A)
        if needs[3]:
            gB = _outer(g2, live_h, B).mul_(s)
        return g, gx, gA, gB, None, None, None, None, None


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
    writable: bool = True,
) -> Tensor:
    """base + s·x·[A; A0]ᵀ·[B | B0]ᵀ (see the module).

    writable: `base` is a fresh layer output that nobody else keeps, so the result may be written into it.
    """
    # the compiler fuses the plain statements, and cannot trace a write into `base`
    if torch.compiler.is_compiling() or base.numel() < SMALL.get(base.device.type, 0):
        h = nn.functional.linear(_as(x, base.dtype), _as(fold_A(A, A0), base.dtype))
        return torch.add(base, nn.functional.linear(h, _as(fold_B(B, B0, twin=twin), base.dtype)), alpha=s)
    y: Tensor = _LowRank.apply(base, x, A, B, A0, B0, s, twin, writable)
    return y


def applied(
    base: Tensor, x: Tensor, A: Operator, B: Operator, s: float, dropout: nn.Module, *, writable: bool = True
) -> Tensor:
    """base + s·x·Aᵀ·Bᵀ with factors as a form has them, writable as in `low_rank`.

    Only dense pairs take the single node. Features that are only picked are dropped and cast after the picking.
    """
    if isinstance(A, Gather):
        h = _as(dropout(A.matmul(x)), base.dtype)
    else:
        x = x if dropout.__class__ is nn.Identity else dropout(x)
        if isinstance(A, Dense) and isinstance(B, Dense):
            return low_rank(base, x, A.M, B.M, s, writable=writable)
        h = A.matmul(_as(x, base.dtype))
    return B.add_to(base, h, s, writable=writable and not torch.compiler.is_compiling() and _writable(base))


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


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer as its hooks see it, however it was called."""
    x: Tensor = args[0] if args else kwargs["x"]
    return x


def watched(layer: Any) -> bool:
    """Whether hooks on the base layer may keep its output, so that it must not be written into."""
    return bool(layer.base_layer._forward_hooks) or bool(_global_forward_hooks)


def tap(y: Tensor, x: Tensor, anchor: Tensor, sink: Any) -> Tensor:
    """y unchanged; in backward `sink(δ, x)` is called with δ = dL/dy (..., d_out) and the layer input x (..., d_in).

    x is kept as a saved tensor, so both kinds of gradient checkpointing recompute it instead of holding it.
    anchor: any scalar that requires grad, so that the first block's layers are reached too.
    """
    out: Tensor = _Tap.apply(y, x, anchor, sink)
    return out
