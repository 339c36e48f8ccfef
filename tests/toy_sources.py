"""Toy sources of common subspaces: plain PEFT adapters whose updates share a planted left space, and fine-tunes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralign import build, sites
from loralign.carrier.sites import put_in

SHARED = 2
"""Planted left directions of every site."""


def planted(d_out: int, name: str) -> Tensor:
    """(d_out, SHARED) orthonormal: what all sources of a site have in common."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.linalg.qr(torch.randn(d_out, SHARED, generator=g)).Q


def adapters(make: Callable[[], Any], folder: Path, count: int = 4) -> tuple[str, ...]:
    """Folders of adapters of rank SHARED + 1: each has the planted directions and one of its own on the left."""
    found = []
    for j in range(count):
        model = put_in(make(), build("lora", r=SHARED + 1, alpha=2.0))  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(100 + j)
        with torch.no_grad():
            for site in sites(model):
                A: Tensor = site.layer.lora_A[site.adapter].weight  # type: ignore[index, assignment]
                B: Tensor = site.layer.lora_B[site.adapter].weight  # type: ignore[index, assignment]
                A.copy_(torch.randn(A.shape, generator=g))
                own = torch.randn(site.d_out, 1, generator=g)
                B.copy_(torch.cat([planted(site.d_out, site.name), own / own.norm()], dim=1))
        model.save_pretrained(str(folder / f"adapter-{j}"))
        found.append(str(folder / f"adapter-{j}"))
    return tuple(found)


def fine_tunes(base: Any, folder: Path, names: Sequence[str], count: int = 3, size: float = 0.05) -> tuple[str, ...]:
    """Checkpoints: base + size·‖W‖·(planted direction, then one of their own) on the named modules; base saved too."""
    base.save_pretrained(str(folder / "base"))
    found = [str(folder / "base")]
    for j in range(count):
        g, model = torch.Generator().manual_seed(200 + j), copy.deepcopy(base)
        with torch.no_grad():
            for name in names:
                W = model.get_submodule(name).weight
                U = planted(W.shape[0], name)
                own = torch.linalg.qr(torch.randn(W.shape[0], 1, generator=g)).Q
                V = torch.linalg.qr(torch.randn(W.shape[1], SHARED + 1, generator=g)).Q
                W += size * W.norm() * torch.cat([U, own], dim=1) @ V.T
        model.save_pretrained(str(folder / f"tuned-{j}"))
        found.append(str(folder / f"tuned-{j}"))
    return tuple(found)
