"""Preheating: train a temporary adapter of high rank for a few steps, keep the leading directions of its product.

    y ← y + s·x·A_hᵀ·B_hᵀ  on every adapted layer,  W_eff = W0 + s·B_h·A_h,  then  B_h·A_h = U·S·Vᵀ

The factors live outside the model, in forward hooks: no module, config or optimizer of the main run sees them, and
they are gone at the end. W0 is never written. With a cache, a preheat that was stopped goes on where it was. With
steps = 0 no step is taken: the gradient of the moving factor at the start, Z = Gᵀ·Ω_B or Y = G·Ω_Aᵀ, is a sketch of the
gradient, and a second pass over the other half of the micro-batches gives the triples.

Source:  the algorithm of the spec of HRP (init/hrp.py), §1.1 and §1.2; `product_svd` for the product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralign.carrier.abilities import width
from loralign.carrier.layer import first_input, low_rank, watched
from loralign.evidence.gradient import accumulate, checked
from loralign.evidence.partial import adam_state
from loralign.evidence.ranks import sum_ranks, world
from loralign.evidence.sketch import Side, orthonormal
from loralign.evidence.tap import Passes, ready
from loralign.maths.draws import keyed_normal
from loralign.maths.linalg import product_svd
from loralign.types import Batch, Directions, LoralignError, Preheated, Site, WorkFailed

log = logging.getLogger("loralign")

WARM_UP = 0.1
"""Share of the steps over which the learning rate grows linearly."""
CLIP = 1.0
"""Global norm of the temporary factors' gradient."""


@dataclass(frozen=True)
class Temporary:
    """The preheat's factors at one site: A (R, d_in), B (d_out, R), fp32 leaves; one of them may be constant."""

    site: Site
    A: Tensor
    B: Tensor

    def moving(self) -> list[Tensor]:
        return [t for t in (self.A, self.B) if t.requires_grad]


def _haar(rows: int, cols: int, device: torch.device, *key: int | str) -> Tensor:
    """(rows, cols), rows ≥ cols, orthonormal columns, uniform; orthonormalised on the device."""
    X = keyed_normal((rows, cols), *key).to(device)
    Q = orthonormal(X)
    return Q * torch.where((Q * X).sum(0) < 0, -1.0, 1.0)


def _factors(need: Preheated, site: Site, seed: int, device: torch.device) -> Temporary:
    """A_h with orthonormal rows and B_h = 0; where only A moves, B_h with orthonormal columns and A_h = 0."""
    R = min(need.rank(site.r), site.d_in, site.d_out)
    if need.train == "A":
        A, B = torch.zeros(R, site.d_in, device=device), _haar(site.d_out, R, device, seed, "preheat", site.name)
    else:
        A = _haar(site.d_in, R, device, seed, "preheat", site.name).T.contiguous()
        B = torch.zeros(site.d_out, R, device=device)
    return Temporary(site, A.requires_grad_("A" in need.train), B.requires_grad_("B" in need.train))


@contextmanager
def hooked(pairs: Sequence[Temporary]) -> Iterator[None]:
    """Within: the layers compute with the temporary factors on top of whatever they compute.

    Not where the adapter is switched off: a reference policy (DPO, KTO) is the model without it.
    """

    def hook(t: Temporary) -> Callable[..., Tensor]:
        def forward_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if module.disable_adapters:
                return output
            x = first_input(args, kwargs)
            return low_rank(output, x, t.A, t.B, t.site.s, writable=not watched(module))

        return forward_hook

    handles = [t.site.layer.register_forward_hook(hook(t), with_kwargs=True) for t in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prior_rate(s: float, hidden: int) -> float:
    """Plain LoRA's prior, 1e-3/s·(2000/hidden)^0.781 (LoRA Without Regret)."""
    return float(1e-3 / s * (2000 / hidden) ** 0.781)


def _step(optimizer: torch.optim.Optimizer, moving: Sequence[Tensor], rate: float) -> None:
    """Average over ranks, clip, step."""
    if world() > 1:
        for p in moving:
            assert p.grad is not None
            p.grad = sum_ranks(p.grad).div_(world())
    torch.nn.utils.clip_grad_norm_(moving, CLIP)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _train(need: Preheated, passes: Passes, pairs: Sequence[Temporary], batches: Sequence[Batch]) -> None:
    moving = [p for t in pairs for p in t.moving()]
    hidden = width(getattr(passes.model, "config", None)) or pairs[0].site.d_in
    peak = need.lr or prior_rate(pairs[0].site.s, hidden)
    optimizer = torch.optim.AdamW(moving, lr=peak, weight_decay=0.0, fused=True)
    warm_up, losses = max(1, round(WARM_UP * need.steps)), []
    state = adam_state(optimizer, moving)
    kept = passes.partial.restore(state)
    if kept:
        passes.tokens, passes.micro_batches = kept["tokens"], kept["micro_batches"]
    with ready(passes.model, [t.site for t in pairs], asleep=False), hooked(pairs):
        for step in range(kept["step"] if kept else 0, need.steps):
            total = 0.0
            for i in range(step * need.accumulate, (step + 1) * need.accumulate):
                total += passes.backward(batches[i % len(batches)], i, 1 / need.accumulate) / need.accumulate
            losses.append(total)
            for p in moving:  # an expert that no token reached
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _step(optimizer, moving, peak * min(1.0, (step + 1) / warm_up))
            if passes.partial.due():
                facts = {"step": step + 1, "tokens": passes.tokens, "micro_batches": passes.micro_batches}
                passes.partial.keep(state, facts)
            passes.progress("preheat", step + 1, need.steps)
    passes.holds([*moving, *moving, *moving, *moving])
    seen = f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "all of them before the stop"
    log.info("preheat: %d steps at lr %.1e, %s", need.steps, peak, seen)
    if losses and losses[-1] > 2 * losses[0]:
        log.warning("the preheat's loss rose: its directions are of little use, give `hrp` a lower `lr`")


def _trained(need: Preheated, passes: Passes, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Directions]:
    pairs = [_factors(need, site, passes.seed, passes.device) for site in sites]
    _train(need, passes, pairs, batches)
    found = {}
    for i, t in enumerate(pairs):
        U, S, V = product_svd(t.B.detach(), t.A.detach())
        if not torch.isfinite(S).all():
            raise WorkFailed("the preheat diverged: give `hrp` a lower `lr`")
        r = min(t.site.r, S.shape[0])
        square = float(S.square().sum())
        share = float(S[:r].square().sum()) / square if square > 0 else None
        found[t.site.name] = Directions(U[:, :r].cpu(), S[:r].cpu(), V[:, :r].cpu(), captured=share, exact=False)
        passes.progress("svd", i + 1, len(pairs))
    return found


def _sketched(
    need: Preheated, passes: Passes, sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, Directions]:
    """Accumulate only: the moving side's gradient, its basis, then the other side on other micro-batches."""
    halves = (batches[: (len(batches) + 1) // 2], batches[(len(batches) + 1) // 2 :] or batches)
    left = need.train == "B"
    into: dict[str, Side] = {}
    for site in sites:
        R = min(need.rank(site.r), site.d_in, site.d_out)
        side = site.d_in if left else site.d_out
        into[site.name] = Side(site, _haar(side, R, passes.device, passes.seed, "preheat", site.name), left=left)
    accumulate(passes, sites, halves[0], into, "preheat")
    into = {name: a.next() for name, a in into.items()}
    accumulate(passes, sites, halves[1], into, "preheat", len(halves[0]))
    found = {}
    for site in sites:
        U, S, V = into[site.name].found(site.r)
        square = float(S.square().sum())
        share = float(S[: site.r].square().sum()) / square if square > 0 else None
        S = S[: site.r] / (len(halves[1]) * world())
        found[site.name] = Directions(U, S, V, captured=share, exact=False)
    return found


def preheated(
    need: Preheated, passes: Passes, sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, Directions]:
    """The r leading triples of the preheated product, or of the two-pass sketch where no step is taken."""
    low = next((site for site in sites if need.rank(site.r) < site.r), None)
    if low:
        raise LoralignError(
            f"the preheat's rank {need.rank(low.r)} is below the adapter's {low.r} at {low.name}: raise `options.rank`"
        )
    return checked((_trained if need.steps else _sketched)(need, passes, sites, batches), "preheat")
