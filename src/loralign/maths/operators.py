"""Factors as operators: a dense matrix, or a one-hot one that is indexed and never multiplied.

    Dense(M):            x·Mᵀ                                      M (m, n)
    Gather(I, n):        x[..., I]         M = rows e_I of the identity, (m, n): A of SBoRA-FA; keeps no x for backward
    Scatter(I, m):       y[..., I] = x     M = columns e_I of the identity, (m, n): B of SBoRA-FB

Indices in I are distinct. Every operator is differentiable in x, `Dense` in M too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """M (m, n) itself."""

    M: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.M.shape[0], self.M.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.M.to(x.dtype))

    def add_to(self, base: Tensor, x: Tensor, s: float, *, writable: bool = False) -> Tensor:
        add = base.add_ if writable else base.add
        return add(self.matmul(s * x.to(base.dtype)))  # s on the small side, forward and backward

    def dense(self) -> Tensor:
        return self.M


@dataclass(frozen=True)
class Gather:
    """Rows e_i of the identity, i in index: (m, n) with n = size."""

    index: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.numel(), self.size

    def matmul(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index.to(x.device))

    def add_to(self, base: Tensor, x: Tensor, s: float, *, writable: bool = False) -> Tensor:
        add = base.add_ if writable else base.add
        return add(self.matmul(s * x.to(base.dtype)))  # s on the small side, forward and backward

    def dense(self) -> Tensor:
        return torch.nn.functional.one_hot(self.index.long(), self.size).float()


@dataclass(frozen=True)
class Scatter:
    """Columns e_i of the identity, i in index: (m, n) with m = size."""

    index: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.index.numel()

    def matmul(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.size).index_copy(-1, self.index.to(x.device).long(), x)

    def add_to(self, base: Tensor, x: Tensor, s: float, *, writable: bool = False) -> Tensor:
        add = base.index_add_ if writable else base.index_add
        return add(-1, self.index.to(base.device), x.to(base.dtype), alpha=s)

    def dense(self) -> Tensor:
        return torch.nn.functional.one_hot(self.index.long(), self.size).float().T.contiguous()
