"""Evidence: what an init may know before training, collected once and cached.

An Init states *what* it needs; this package knows *how* to get it: `gradient.py` (exact or by `sketch.py`),
`preheat.py` (a temporary adapter of high rank), `shared.py` (directions that other models or layers share). `tap.py`
runs the model, `store.py` keeps results, `partial.py` those of a preheat that was stopped, `ranks.py` makes all ranks
agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralign.evidence.gradient import exact_gradient as exact_gradient
from loralign.evidence.gradient import top_gradient
from loralign.evidence.partial import Partial
from loralign.evidence.preheat import preheated
from loralign.evidence.ranks import rank, same_everywhere, world
from loralign.evidence.shared import common_subspace
from loralign.evidence.store import Evidence as Evidence
from loralign.evidence.store import cache_folder, evidence_key, load_evidence, save_evidence
from loralign.evidence.tap import Passes as Passes
from loralign.evidence.tap import Progress as Progress
from loralign.evidence.tap import Sink as Sink
from loralign.evidence.tap import Spent as Spent
from loralign.evidence.tap import model_loss as model_loss
from loralign.evidence.tap import tapped as tapped
from loralign.types import (
    Batch,
    Batches,
    CommonSubspace,
    Directions,
    LoralignError,
    Loss,
    Nothing,
    Preheated,
    Site,
    TopGradient,
)

log = logging.getLogger("loralign")

Collector = Callable[[Any, Passes, Sequence[Site], Sequence[Batch]], dict[str, Directions]]
COLLECTORS: Mapping[type, Collector] = {
    TopGradient: top_gradient,
    Preheated: preheated,
    CommonSubspace: common_subspace,
}


def collect(
    need: Any,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches | None,
    *,
    loss: Loss = model_loss,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """What `need` asks for, per site; empty for `Nothing`. Equal on every rank.

    Computed from `need.draws` micro-batches, or read from `cache`, where a stopped preheat also goes on. The model is
    left as it was: weights, gradients, flags, mode and random generators. `.spent` of the result says what it cost, in
    passes, tokens and seconds.
    """
    if isinstance(need, Nothing):
        return Evidence()
    if type(need) not in COLLECTORS:
        raise LoralignError(f"no evidence collector for {type(need).__name__}")
    taken = list(islice(batches or (), need.draws))
    if need.draws and not taken:
        raise LoralignError("the init needs gradients, so it needs data: pass `batches`")
    if len(taken) < need.draws:
        log.warning("evidence: the data has %d of the %d micro-batches that the init asks for", len(taken), need.draws)
    passes = Passes(model, loss, seed, progress)
    path = None
    if cache:
        known = passes.value(taken[0]) if taken else 0.0
        path = (
            cache_folder(Path(cache)) / f"evidence-{evidence_key(need, model, sites, taken, seed, known)}.safetensors"
        )
        passes.partial = Partial(path.with_suffix(".partial"))
    kept = same_everywhere(load_evidence(path, sites) if path is not None and rank() == 0 else None)
    if kept is None:
        # only the model's own forward is the caller's to round
        with torch.enable_grad(), torch.autocast(passes.device.type, enabled=False):
            found = Evidence(COLLECTORS[type(need)](need, passes, sites, taken), passes.spent)
        if path is not None and rank() == 0:
            save_evidence(path, found)
            passes.partial.done()
        kept = same_everywhere(found.on_cpu() if world() > 1 else found)
    log.info("evidence: %s", kept.spent)
    return kept
