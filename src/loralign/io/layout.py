"""How factors are stored: ranks, scale, padding and precision of every site, and what each choice costs.

    product   ΔW = B·A                      as trained, fp32, scale folded into B
    stored    ΔW = alpha/R · B'·A'          R rows of A', the scale of stock PEFT
    uniform   one s for all sites, alpha_m = s·R_m: right in PEFT and in servers that read r and lora_alpha only
    one_alpha one alpha for all sites, scale alpha/R_m: right in readers that know no other alpha (llama.cpp)
    padded    s = 1, every site zero-padded to one rank: right wherever the tensors are read at all

Shapes:  A (R, d_in) · B (d_out, R)
Losses are relative: ‖stored − ΔW‖_F / ‖ΔW‖_F per site, and √(Σ‖stored − ΔW‖²/Σ‖ΔW‖²) of all sites together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loralign.carrier.sites import exact_alpha, factors
from loralign.carrier.slot import form_of, live_of
from loralign.maths.linalg import product_norm, truncate
from loralign.types import LoralignError, Site, WorkFailed


class Product(NamedTuple):
    """ΔW = B·A. A: (R, d_in). B: (d_out, R). fp32, on the CPU."""

    A: Tensor
    B: Tensor


class Stored(NamedTuple):
    """ΔW = alpha/R · B·A. A: (R, d_in). B: (d_out, R)."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Loss:
    """Relative Frobenius error of the update: by site, the largest, and of all sites together."""

    by_site: Mapping[str, float]
    largest: float
    total: float


def read(found: Sequence[Site], drop: Mapping[str, Sequence[int]]) -> dict[str, Product]:
    """The trained update of every site, without the slots named in `drop` (positions in the folded factors).

    Raises LoralignError where a dropped slot is not zero, WorkFailed where a factor is not finite.
    """
    unknown = sorted(set(drop) - {site.name for site in found})
    if unknown:
        raise LoralignError(f"`drop` names {unknown[0]!r}, which is no adapted site")
    products = {}
    for site in found:
        A, B = factors(site)
        if isinstance(A, DTensor) or isinstance(B, DTensor):
            raise LoralignError("the model is sharded: gather it first (accelerator.unwrap_model, full state dict)")
        A, B = A.cpu(), B.cpu()
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise WorkFailed(f"{site.name} holds NaN or infinite values: the run has diverged, lower the learning rate")
        products[site.name] = _without(site.name, Product(A, B), drop.get(site.name, ()))
    return products


def empty_slots(found: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Slots that rules have left dead (row and column zero) or switched off (a gate of the form is zero), by site; of a
    chain that has committed links, also those that start from zero and never trained."""
    empty, chain = {}, any(live_of(site.layer, site.adapter).links for site in found)
    for site in found:
        A, B = factors(site)
        if isinstance(A, DTensor) or isinstance(B, DTensor):
            continue  # `read` refuses it
        form = form_of(site.layer, site.adapter)
        off = ~B.any(0) if form is not None and form.facts.switches else ~B.any(0) & ~A.any(1)
        off = off | ~B.any(0) | ~A.any(1) if chain else off
        if bool(off.any()):
            empty[site.name] = tuple(off.nonzero().flatten().tolist())
    return empty


def inhabited(products: Mapping[str, Product]) -> dict[str, Product]:
    """The sites that have a slot that is not zero; the first one where there is none."""
    kept = {n: p for n, p in products.items() if p.A.shape[0] > 1 or bool(p.A.any()) or bool(p.B.any())}
    return kept or dict(list(products.items())[:1])


def _without(name: str, product: Product, slots: Sequence[int]) -> Product:
    """The product without these slots; a site that loses all of them keeps one zero slot, so that it still loads."""
    A, B = product
    keep = torch.ones(A.shape[0], dtype=torch.bool)
    for j in slots:
        if not 0 <= j < A.shape[0]:
            raise LoralignError(f"`drop` names slot {j} of {name}, which has {A.shape[0]}")
        if bool(A[j].any()) and bool(B[:, j].any()):
            raise LoralignError(f"slot {j} of {name} is not zero: dropping it would change the model, use `max_rank`")
        keep[j] = False
    if not bool(keep.any()):
        return Product(A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))
    return Product(A[keep], B[:, keep])


def limited(products: Mapping[str, Product], max_rank: int | None) -> tuple[dict[str, Product], Loss | None]:
    """Products of rank at most `max_rank` by truncated SVD of B·A, and the loss; None where nothing was cut."""
    if max_rank is not None and max_rank < 1:
        raise LoralignError(f"max_rank = {max_rank}: ranks start at 1")
    cut = {} if max_rank is None else {n: p for n, p in products.items() if p.A.shape[0] > max_rank}
    if not cut or max_rank is None:
        return dict(products), None
    made = dict(products)
    for name, (A, B) in cut.items():
        B_r, A_r, _ = truncate(B, A, min(max_rank, *A.shape, *B.shape))
        made[name] = Product(A_r, B_r)
    return made, loss(products, {n: Stored(p.A, p.B, float(p.A.shape[0])) for n, p in made.items()})


def uniform(products: Mapping[str, Product], scales: Mapping[str, float]) -> dict[str, Stored]:
    """One scale for all sites, the commonest of training: A as it is, B' = B/s, alpha = s·R."""
    s = Counter(scales.values()).most_common(1)[0][0]
    return {n: Stored(A, B / s, exact_alpha(s, A.shape[0])) for n, (A, B) in products.items()}


def one_alpha(products: Mapping[str, Product], scales: Mapping[str, float]) -> dict[str, Stored]:
    """One alpha, with which the commonest rank has the commonest scale of training: A as it is, B' = B·R/alpha."""
    (s, _), (R, _) = (
        Counter(x).most_common(1)[0] for x in (scales.values(), [p.A.shape[0] for p in products.values()])
    )
    alpha = float(torch.tensor(s * R, dtype=torch.float32))  # as such files hold it
    return {n: Stored(A, B / (alpha / A.shape[0]), alpha) for n, (A, B) in products.items()}


def padded(products: Mapping[str, Product], *, power_of_two: bool) -> dict[str, Stored]:
    """Scale 1 and one rank: zero rows of A and columns of B up to the largest site's (or the power of two above)."""
    R = max(p.A.shape[0] for p in products.values())
    R = 1 << (R - 1).bit_length() if power_of_two else R
    made = {}
    for name, (A, B) in products.items():
        more = R - A.shape[0]
        rows, columns = A.new_zeros(more, A.shape[1]), B.new_zeros(B.shape[0], more)
        made[name] = Stored(torch.cat([A, rows]), torch.cat([B, columns], dim=1), float(R))
    return made


def rounded(stored: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Stored]:
    return {n: Stored(A.to(dtype), B.to(dtype), alpha) for n, (A, B, alpha) in stored.items()}


def loss(products: Mapping[str, Product], stored: Mapping[str, Stored]) -> Loss:
    """What storing changed, from the factors alone: r×r Gram matrices in float64, ΔW is never formed.

    Where the ranks agree the difference is taken factor by factor, B'A' − BA = (B' − B)A' + B(A' − A), so that the
    small error of rounding is not the difference of two large products.
    """
    errors, norms = {}, {}
    for name, (A, B) in products.items():
        kept = stored[name]
        A, B, A2, B2 = A.double(), B.double(), kept.A.double(), kept.B.double() * kept.scale
        r = A.shape[0]
        if kept.rank >= r:  # the same slots, rounded or padded
            B = torch.cat([B, B.new_zeros(B.shape[0], kept.rank - r)], dim=1)
            A = torch.cat([A, A.new_zeros(kept.rank - r, A.shape[1])])
            errors[name] = product_norm(torch.cat([B2 - B, B], dim=1), torch.cat([A2, A2 - A]))
        else:
            errors[name] = product_norm(torch.cat([B2, -B], dim=1), torch.cat([A2, A]))
        norms[name] = product_norm(B, A)
    by_site = {n: float(e / norms[n]) if norms[n] > 0 else 0.0 for n, e in errors.items()}
    whole = float(sum(n.square() for n in norms.values())) ** 0.5
    lost = float(sum(e.square() for e in errors.values())) ** 0.5
    return Loss(by_site, max(by_site.values()), lost / whole if whole else 0.0)
