"""Lists of sharded tensors, as FSDP2 leaves them: whole ones by one collective for all, sums without any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from loralign.carrier.slot import parted


def sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether some are. Asked several times a step, so without a loop in Python."""
    return DTensor in set(map(type, tensors))


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The full tensors; those that lie by rows over a mesh of one dimension come together, the same on every rank."""
    found = list(tensors)
    if not sharded(tensors):
        return found
    groups: dict[tuple[object, torch.dtype], list[int]] = {}
    for k, t in enumerate(tensors):
        if isinstance(t, DTensor):
            if _by_rows(t):
                groups.setdefault((t.device_mesh, t.dtype), []).append(k)
            else:
                found[k] = t.full_tensor()
    for at in groups.values():
        for k, whole in zip(at, _gathered([tensors[k] for k in at]), strict=True):  # type: ignore[misc]
            found[k] = whole
    return found


def add_(ps: Sequence[Tensor], us: Sequence[Tensor]) -> None:
    """p += u in place, in the dtype of p. u is whole, or sharded as p is."""
    if not sharded(ps):
        torch._foreach_add_(list(ps), [u if u.dtype == p.dtype else u.to(p.dtype) for p, u in zip(ps, us, strict=True)])
        return
    local: list[tuple[Tensor, Tensor]] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for p, u in zip(ps, us, strict=True):
        if not isinstance(p, DTensor):
            local.append((p, u.to(p.dtype)))
        elif isinstance(u, DTensor) or not _by_rows(p):
            parts.append((p, parted(u.to(p.dtype), p)))
        else:
            start, stop = _rows(p.shape[0], p.device_mesh.size(), p.device_mesh.get_local_rank())
            local.append((p.to_local(), u[start:stop].to(p.dtype)))
    for pairs in (local, parts):
        if pairs:
            torch._foreach_add_([p for p, _ in pairs], [u for _, u in pairs])


def _by_rows(t: DTensor) -> bool:
    return t.device_mesh.ndim == 1 and tuple(t.placements) == (Shard(0),)


def _rows(height: int, ranks: int, rank: int) -> tuple[int, int]:
    """Which rows of a tensor a rank holds: as torch.chunk divides them."""
    most = -(-height // ranks)
    return min(rank * most, height), min((rank + 1) * most, height)


def _gathered(tensors: Sequence[DTensor]) -> list[Tensor]:
    mesh = tensors[0].device_mesh
    sizes = []
    for rank in range(mesh.size()):
        rows = [_rows(t.shape[0], mesh.size(), rank) for t in tensors]
        sizes.append(
            [(stop - start) * (t.numel() // t.shape[0]) for t, (start, stop) in zip(tensors, rows, strict=True)]
        )
    width = max(map(sum, sizes))
    mine = torch.cat([t.to_local().reshape(-1) for t in tensors])
    everyone = mine.new_empty(mesh.size() * width)
    dist.all_gather_into_tensor(
        everyone, torch.nn.functional.pad(mine, (0, width - mine.numel())), group=mesh.get_group()
    )
    parts = [part.split([*size, width - sum(size)]) for part, size in zip(everyone.split(width), sizes, strict=True)]
    return [torch.cat([part[k] for part in parts]).view(t.shape) for k, t in enumerate(tensors)]
