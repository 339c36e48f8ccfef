"""PRoLoRA (arXiv 2402.16902) entry by entry: A[k, j·c + t] = A_0[(k + j·s) mod r', t], and its block structure."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shared(chunk: Tensor, copies: int, size: int) -> Tensor:
    """chunk (r', c) -> (r', size)."""
    r, c = chunk.shape
    stride = max(r // copies, 1)
    out = torch.zeros(r, size, dtype=chunk.dtype)
    for k in range(r):
        for column in range(size):
            out[k, column] = chunk[(k + column // c * stride) % r, column % c]
    return out


def gradient(outer: Tensor, copies: int, width: int) -> Tensor:
    """dL/dA_0 (r', c) of dL/dA_sh (r', size): the chunks' gradients, rotated back and summed."""
    r, size = outer.shape
    stride = max(r // copies, 1)
    padded = torch.cat([outer, outer.new_zeros(r, copies * width - size)], dim=1)
    return sum((torch.roll(padded[:, j * width : (j + 1) * width], j * stride, 0) for j in range(copies)),
               torch.zeros(r, width, dtype=outer.dtype))  # fmt: skip


def trained_numbers(shapes: list[tuple[int, int]], r: int, u: int, m: int, n: int, layers: int) -> int:
    """shapes: (d_out, d_in) of one layer's targets."""
    return layers * sum(u * (i + o) + (r - u) * (math.ceil(i / m) + math.ceil(o / n)) for o, i in shapes)
