"""The leading singular triples of every site's initial gradient, by a sketch or exactly.

G is the mean over micro-batches of each one's mean-loss gradient, and over ranks. A site is treated exactly where its
sketch would be no smaller than G, where no sketch is asked for, and where by the sketch's own estimate the exact
directions could hold much more of G: where G has no leading directions they could not, however poor the sketch. Exact
gradients are formed for one layer at a time and summed in fp32 on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from loralign.evidence.ranks import world
from loralign.evidence.sketch import (
    Accumulator,
    Dense,
    Draws,
    Shares,
    Side,
    Staging,
    Stream,
    estimated_quality,
    spectra,
)
from loralign.evidence.tap import Passes, Progress
from loralign.maths.draws import keyed_generator
from loralign.maths.linalg import top_svd
from loralign.types import Batch, Directions, Loss, Site, Sketch, TopGradient, WorkFailed

log = logging.getLogger("loralign")


def accumulate(
    passes: Passes, sites: Sequence[Site], batches: Sequence[Batch], into: Mapping[str, Accumulator], what: str,
    first: int = 0,
) -> None:  # fmt: skip
    """One pass over the micro-batches into these accumulators, summed over ranks."""
    passes(sites, batches, lambda site, delta, x: into[site.name].add(delta, x), what, first)
    passes.holds([t for a in into.values() for t in a.tensors()])
    for name, a in into.items():
        a.reduce()
        if not all(bool(torch.isfinite(t.sum())) for t in a.tensors()):
            raise WorkFailed(f"the {what} of {name} is not finite: look for broken rows, or use bf16 in place of fp16")


def exact_gradient(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], loss: Loss, progress: Progress | None = None
) -> dict[str, Tensor]:
    """G (d_out, d_in) of every site, fp32 on the CPU, averaged over micro-batches and ranks."""
    staging = Staging()
    into = {site.name: Dense(site, staging) for site in sites}
    accumulate(Passes(model, loss, 0, progress), sites, batches, into, "gradient")
    return {name: a.G.div_(len(batches) * world()) for name, a in into.items()}


def worth_a_sketch(site: Site, width: int) -> bool:
    """Whether a sketch of `width` columns is smaller than the gradient."""
    return width * (site.d_out + site.d_in) < site.d_out * site.d_in


def _exact(dense: Dense, site: Site, k: int, count: int, passes: Passes) -> Directions:
    G = dense.G.to(passes.device) / count
    U, S, V = top_svd(
        G, min(k, *G.shape), niter=4, generator=keyed_generator(passes.seed, "gradient svd", 0, site.name)
    )
    square = float(G.square().sum())
    share = float(S.square().sum()) / square if square > 0 else None
    return Directions(U, S.cpu(), V, captured=share, quality=1.0)


def sketch_width(site: Site, sketch: Sketch) -> int:
    """Columns of this site's sketch, 0 where the site is treated exactly from the start."""
    width = min(sketch.width * site.r, site.d_out, site.d_in)
    return width if worth_a_sketch(site, width) else 0


def top_gradient(
    need: TopGradient, passes: Passes, sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, Directions]:
    """The leading per_rank·r singular triples of every site's gradient."""
    used, held_out = batches[: need.micro_batches], batches[need.micro_batches :]
    count = len(used) * world()
    sketch = need.sketch or Sketch(passes=1, exact_above=1.0, held_out=0)
    width = {site.name: sketch_width(site, sketch) if need.sketch else 0 for site in sites}
    draws, staging = Draws(passes.seed), Staging()
    into: dict[str, Accumulator] = {
        s.name: Stream(s, width[s.name], draws) if width[s.name] else Dense(s, staging) for s in sites
    }
    accumulate(passes, sites, used, into, "gradient")
    energy = {name: a.energy() / count**2 for name, a in into.items() if isinstance(a, Stream)}
    found = _take_exact(into, need, sites, count, passes)
    todo = [site for site in sites if site.name in into]
    for _ in range(sketch.passes - 1 if todo else 0):
        into = {name: a.next() for name, a in into.items() if isinstance(a, Stream | Side)}
        accumulate(passes, todo, used, into, "gradient")
    sketches = [a for a in (into[site.name] for site in todo) if isinstance(a, Stream | Side)]
    for site, a, spectrum in zip(todo, sketches, spectra(sketches), strict=True):
        U, S, V = a.found(need.per_rank * site.r, spectrum)
        found[site.name] = _from_sketch(U, S, V, count, sketch.passes, energy[site.name])
    poor = [site for site in todo if _exactness_adds(found[site.name]) > sketch.exact_above]
    if poor:
        into = {site.name: Dense(site, staging) for site in poor}
        accumulate(passes, poor, used, into, "gradient")
        found |= _take_exact(into, need, poor, count, passes)
    _log_quality(found, poor, len(todo))
    found = checked({site.name: found[site.name] for site in sites}, "gradient")
    return _measured(found, sites, held_out, passes, len(used), draws) if held_out else found


def checked(found: dict[str, Directions], what: str) -> dict[str, Directions]:
    """The same; sites without directions, such as an expert that no token reached, are named."""
    silent = [name for name, d in found.items() if not float(d.S[0]) > 0]
    if silent:
        log.warning("the %s left %d sites without directions, %s first: plain start", what, len(silent), silent[0])
    return found


def _take_exact(
    into: dict[str, Accumulator], need: TopGradient, sites: Sequence[Site], count: int, passes: Passes
) -> dict[str, Directions]:
    """Decompose the dense sums one by one, removing each from `into`."""
    dense = [site for site in sites if isinstance(into[site.name], Dense)]
    found = {}
    for i, site in enumerate(dense):
        a = into.pop(site.name)
        assert isinstance(a, Dense)
        found[site.name] = _exact(a, site, need.per_rank * site.r, count, passes)
        passes.progress("svd", i + 1, len(dense))
    return found


def _from_sketch(U: Tensor, S: Tensor, V: Tensor, count: int, passes: int, energy: float) -> Directions:
    """U (d_out, k), V (d_in, k), S: all values of the sketch of count·G; energy: an estimate of ‖G‖²."""
    k = U.shape[1]
    held = float((S[:k] / count).square().sum())
    share = min(1.0, held / energy) if energy > 0 else None
    quality = estimated_quality(S, k, passes)
    return Directions(U, S[:k] / count, V, captured=share, exact=False, quality=quality)


def _exactness_adds(d: Directions) -> float:
    """The share of ‖G‖² by which the exact directions could exceed the sketch's, at most."""
    return (1.0 - (d.quality or 0.0)) * (1.0 if d.captured is None else d.captured)


def _log_quality(found: Mapping[str, Directions], poor: Sequence[Site], sketched: int) -> None:
    log.info(
        "gradient of %d sites: %d sketched, %d of them repeated exactly, %d exact from the start",
        len(found),
        sketched,
        len(poor),
        len(found) - sketched,
    )


def _measured(
    found: dict[str, Directions],
    sites: Sequence[Site],
    batches: Sequence[Batch],
    passes: Passes,
    first: int,
    draws: Draws,
) -> dict[str, Directions]:
    """The same directions with the share of a held-out gradient that they hold; logged, per site at debug level."""
    shares = {}
    for site in sites:
        d = found[site.name]
        assert d.U is not None and d.V is not None
        shares[site.name] = Shares(site, d.U, d.V, draws)
    accumulate(passes, sites, batches, shares, "held-out gradient", first)
    measured = {}
    for name, d in found.items():
        share = shares[name].share()
        log.debug(
            "%s: %d directions hold %s of a held-out gradient; quality %.3f%s",
            name,
            len(d.S),
            "nothing" if share is None else f"{share:.3f}",
            d.quality or 0.0,
            "" if d.exact else " (sketch)",
        )
        measured[name] = replace(d, held_out=share)
    known = {n: d.held_out for n, d in measured.items() if d.held_out is not None}
    if known:
        least = min(known, key=lambda n: known[n])
        log.info(
            "the directions hold %.1f %% of a held-out gradient on average over sites, least %.1f %% at %s",
            100 * sum(known.values()) / len(known),
            100 * known[least],
            least,
        )
    return measured
