"""Several processes: rank 0's values everywhere, sums and columns of all. One process is a world of one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def leave() -> None:
    """The group of processes, at the end of one that no other waits for. gloo has threads that must not outlive the
    interpreter; a communicator of GPUs goes with its process, since to end it before waits for the others."""
    if dist.is_initialized() and not torch.cuda.is_available():
        dist.destroy_process_group()


def same_everywhere(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_every_rank(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


def _communicable(t: Tensor) -> Tensor:
    """NCCL moves tensors of the GPU only."""
    return t.cuda() if dist.get_backend() == "nccl" and not t.is_cuda else t.contiguous()


def sum_ranks(t: Tensor) -> Tensor:
    """The sum over ranks, in place where possible."""
    if world() == 1:
        return t
    moved = _communicable(t)
    dist.all_reduce(moved)
    return moved.to(t.device)


def gather_columns(t: Tensor) -> Tensor:
    """(m, k) of every rank -> (m, world·k), the same on every rank."""
    if world() == 1:
        return t
    moved = _communicable(t)
    parts = [torch.empty_like(moved) for _ in range(world())]
    dist.all_gather(parts, moved)
    return torch.cat(parts, dim=1).to(t.device)


def from_rank_0(t: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank: decompositions of equal numbers may differ between devices."""
    if world() == 1:
        return t
    moved = _communicable(t)
    dist.broadcast(moved, src=0)
    return moved.to(t.device)
