"""Every random draw of the project: keyed by (seed, purpose, step, module name), on the CPU, equal on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from operator import index

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """CPU generator seeded by the 64-bit blake2b hash of the key, for instance (seed, purpose, step, module name).

    The same on every machine, rank and Python version. Errors: TypeError for a part that is no integer and no string.
    torch's CPU engine keeps 32 bits of a seed: of a million keys about a hundred pairs draw the same numbers.
    """
    parts = tuple(part if isinstance(part, str) else int(index(part)) for part in key)
    return torch.Generator().manual_seed(int.from_bytes(_digest(parts), "little"))


def keyed_normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Independent N(0, 1) of that shape, float32, CPU."""
    return torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32)


def keyed_scores(names: Sequence[str], width: int, source: torch.Generator) -> Tensor:
    """(n, width) int64, CPU: for each name numbers that depend on the name and on `source` alone, not on its place.

    All at once, for draws that every step makes for every module: word k of a name is the finaliser of splitmix64
    (Steele, Lea & Flood 2014) over hash(name) + 63 bits of the source + (k + 1)·golden ratio.
    """
    own = [int.from_bytes(_digest(name), "little", signed=True) for name in names]
    salt = torch.randint(2**63 - 1, (), generator=source)
    x = torch.tensor(own)[:, None] + salt + torch.arange(1, width + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


@lru_cache
def hashed(names: tuple[str, ...]) -> int:
    """64 bits of names in their order, the same on every machine."""
    return int.from_bytes(_digest(names), "little", signed=True)


def _digest(value: object) -> bytes:
    return blake2b(ascii(value).encode(), digest_size=8).digest()


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def block_of(size: int, length: int, place: int, source: torch.Generator) -> Tensor:
    """(length,) int64: the block number `place` of a random order of range(size); blocks of one source are disjoint."""
    return torch.randperm(size, generator=source)[place * length : (place + 1) * length].clone()


def orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """(rows, cols), uniform over matrices of orthonormal rows (rows ≤ cols) or columns (rows > cols); float32, CPU."""
    normal = torch.randn(max(rows, cols), min(rows, cols), generator=generator, dtype=torch.float32)
    Q, R = torch.linalg.qr(normal)
    Q = torch.where(R.diagonal() < 0, -Q, Q)  # QR alone is not uniform
    return (Q if rows > cols else Q.T).contiguous()
