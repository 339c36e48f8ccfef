"""How much of a gradient that it has not seen a start can follow in its first step, beside other starts of that rank.

    share = ‖P_B·G + G·P_A − P_B·G·P_A‖² / ‖G‖²        (P_A of a start whose B moves, P_B of one whose A moves)

G is the mean gradient of W over held-out micro-batches, formed exactly: 4 bytes of host memory per adapted weight. The
best that any start of rank r could reach on it is Σ_{i≤2r} σ_i²/‖G‖². Starts with B = 0 (plain LoRA, hrp, cora-init)
can use one side only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralign.carrier.sites import draw_for, sites, weight
from loralign.carrier.slot import live_of
from loralign.evidence import Progress, collect, exact_gradient
from loralign.maths.linalg import first_step_energy, top_svd
from loralign.methods.build import build
from loralign.plan.combinations import misfit
from loralign.train.attach import loss_of
from loralign.train.undisturbed import undisturbed
from loralign.types import Batch, LoralignError, Loss, Recipe, Site, Start

log = logging.getLogger("loralign")

BESIDE = ("lora", "lora-ga", "hrp-sketch")
"""Random, gradient, preheated."""
BEST = "best possible"


@dataclass(frozen=True)
class Shares:
    """What each start holds of the held-out gradient: by start (the chosen one first, the bound last) and site.

    energy: ‖G‖² by site. A missing site: the start cannot serve it, or its gradient is zero.
    """

    of: Mapping[str, Mapping[str, float]]
    energy: Mapping[str, float]
    rank: Mapping[str, int]
    micro_batches: int
    held_out: str
    """Where the held-out rows come from."""

    def mean(self, start: str, among: Sequence[str]) -> float | None:
        """Over these sites, weighted by the energy of their gradients; None where the start serves none of them."""
        known = [n for n in among if n in self.of[start]]
        total = sum(self.energy[n] for n in known)
        return sum(self.energy[n] * self.of[start][n] for n in known) / total if total > 0 else None


def diagnose(
    trainer: Any,
    recipe: Recipe,
    *,
    beside: Sequence[str] = BESIDE,
    sources: Sequence[str] = (),
    micro_batches: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Shares:
    """Measure the start of an attached trainer that has not been trained.

    Args:
        beside: methods whose starts are measured too, at the ranks of the recipe, from the same training rows.
        sources: folders of adapters or checkpoints, or a basis file: their common subspace is measured as `cora-init`.
        micro_batches: of held-out rows: the evaluation rows, else training rows that no init sees.
    """
    model, loss = trainer.model, loss_of(trainer)
    found = sites(model)
    others = _others(recipe, beside, sources)
    with undisturbed(trainer, model):
        draws = max(r.init.needs.draws for r in (recipe, *others.values()))
        seen, held_out, where = _batches(trainer, draws, micro_batches)
        starts = {recipe.name: {site.name: _moving(*_present(site)) for site in found}}
        for name, other in others.items():
            starts[name] = _start(model, other, found, seen, loss, cache, progress)
        gradients = exact_gradient(model, found, held_out, loss, progress)
    return _shares(found, starts, gradients, len(held_out), where)


def _others(recipe: Recipe, beside: Sequence[str], sources: Sequence[str]) -> dict[str, Recipe]:
    options: dict[str, dict[str, Any]] = {name: {} for name in beside if name != recipe.name}
    if sources:
        options["cora-init"] = {"sources": list(sources)}
    found = {}
    for name, given in options.items():
        made = build(name, given, r=recipe.r, alpha=recipe.alpha, ranks=recipe.ranks, seed=recipe.seed)
        if not isinstance(made, Recipe):
            raise LoralignError(f"{name} has no start to compare with: leave it out")
        found[name] = made
    return found


def _batches(trainer: Any, draws: int, count: int) -> tuple[list[Batch], list[Batch], str]:
    """Micro-batches for the inits, and held-out ones."""
    if trainer.eval_dataset is not None:
        held_out, where = _taken(trainer.get_eval_dataloader(), count), "the evaluation rows"
        return _taken(trainer.get_train_dataloader(), draws), held_out, where
    rows = _taken(trainer.get_train_dataloader(), draws + count)
    if len(rows) <= draws:
        raise LoralignError(
            f"the starts read all {len(rows)} micro-batches and leave none to measure on: set `data.eval`"
        )
    return rows[:draws], rows[draws:], "training rows that no init saw"


def _taken(loader: Any, count: int) -> list[Batch]:
    try:
        return list(islice(iter(loader), count))
    finally:
        getattr(loader, "end", lambda: None)()  # accelerate counts a loader as running until it is exhausted


Basis = tuple[Tensor, Tensor]
"""(B, A) with zeros for the one whose partner does not move: what a first step can use."""


def _present(site: Site) -> tuple[Start, bool, bool]:
    """The factors in the model now (a twin stores them as A0 + ΔA, B0 + ΔB), and which of them move."""
    layer: Any = site.layer
    sides = layer.lora_A[site.adapter], layer.lora_B[site.adapter]
    live = live_of(layer, site.adapter)
    A, B = live.A.detach().float().cpu(), live.B.detach().float().cpu()
    if getattr(sides[1], "kind", "") == "T":
        A, B = A + live.A0.float().cpu(), B + live.B0.float().cpu()
    a_moves, b_moves = (any(p.requires_grad for p in side.parameters()) for side in sides)
    return Start(A, B), a_moves, b_moves


def _moving(factors: Start, a_moves: bool, b_moves: bool) -> Basis:
    return factors.B * float(a_moves), factors.A * float(b_moves)


def _start(
    model: nn.Module,
    recipe: Recipe,
    found: Sequence[Site],
    batches: Sequence[Batch],
    loss: Loss,
    cache: Path | None,
    progress: Progress | None,
) -> dict[str, Basis]:
    """The start that another recipe would write; sites that it cannot serve are missing."""
    why = {site.name: misfit(recipe, site) for site in found}
    for said in filter(None, why.values()):
        log.info("%s", said)
    served = [site for site in found if not why[site.name]]
    if not served:
        return {}
    known = collect(
        recipe.init.needs, model, served, batches, loss=loss, seed=recipe.seed, cache=cache, progress=progress
    )
    made = {}
    for site in served:
        start = recipe.init(weight(site), site.r, site.s, known.get(site.name), draw_for(recipe.seed, site.name))
        made[site.name] = _moving(start, "A" in start.train, "B" in start.train)
    return made


def _shares(
    found: Sequence[Site],
    starts: Mapping[str, Mapping[str, Basis]],
    gradients: Mapping[str, Tensor],
    count: int,
    where: str,
) -> Shares:
    of: dict[str, dict[str, float]] = {name: {} for name in (*starts, BEST)}
    energy = {}
    for site, G in _nonzero(found, gradients):
        energy[site.name] = float(G.double().square().sum())
        S = top_svd(G, min(2 * site.r, *G.shape), niter=8)[1]
        of[BEST][site.name] = min(1.0, float(S.double().square().sum()) / energy[site.name])
        for name, bases in starts.items():
            if site.name in bases:
                B, A = (t.to(G) for t in bases[site.name])
                of[name][site.name] = float(first_step_energy(B, A, G, S)) * of[BEST][site.name]
    return Shares(of, energy, {site.name: site.r for site in found}, count, where)


def _nonzero(found: Sequence[Site], gradients: Mapping[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    for site in found:
        G = gradients[site.name]
        if not torch.isfinite(G).all():
            raise LoralignError(f"the held-out gradient of {site.name} is not finite: look for broken rows")
        if bool(G.any()):
            yield site, G
