"""What a start costs before the first step: what evidence keeps and where, its operations, and its seconds.

lora-ga       a sketch beside the model, or exact gradients on the host; a site whose sketch is no smaller than its
              gradient is exact
hrp           factors of rank R beside the model; what moves of them with a gradient and two moments
hrp-sketch    a random side of rank R and its products beside the model
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from loralign.evidence.gradient import sketch_width
from loralign.plan.combinations import Probe, draw
from loralign.plan.trace import Step
from loralign.types import Activations, CommonSubspace, Need, Preheated, Recipe, Site, TopGradient, Weight


def evidence_bytes(need: Need, found: Sequence[Site]) -> tuple[int, int]:
    """Bytes of what a need collects, all sites together, fp32: on the host, and on the model's device."""
    match need:
        case TopGradient(sketch=sketch):
            columns = [(s, sketch_width(s, sketch) if sketch else 0) for s in found]
            exact = sum(4 * s.d_out * s.d_in for s, width in columns if not width)
            return exact, sum(4 * width * (s.d_out + s.d_in) for s, width in columns)
        case Preheated(rank=rank, steps=steps, train=train):
            A, B = (16 if steps and side in train else 4 for side in "AB")  # with a gradient and two moments
            return 0, sum(min(rank(s.r), s.d_out, s.d_in) * (A * s.d_in + B * s.d_out) for s in found)
        case CommonSubspace(sources=sources):
            return max(4 * len(sources) * s.d_out * s.d_in for s in found), 0  # one site at a time
        case Activations():
            return 0, sum(4 * s.d_in for s in found)
        case _:
            return 0, 0


def evidence_flops(need: Need, found: Sequence[Site], weights: int, tokens: int) -> float:
    """Operations of collecting a need: forward and backward over its micro-batches, and where asked G and its SVD."""
    batches = getattr(need, "micro_batches", 0)
    passes = 4.0 * weights * tokens * batches
    if not isinstance(need, TopGradient):
        return passes
    outer = sum(2.0 * s.d_out * s.d_in * tokens * batches for s in found)
    niter, oversampling = 4, 2
    svd = sum(2.0 * (2 * niter + 2) * oversampling * need.per_rank * s.r * s.d_out * s.d_in for s in found)
    return passes + outer + svd


def init_seconds(recipe: Recipe, start: Probe, found: Sequence[Site], weights: int, step: Step) -> float | None:
    """Evidence at this machine's matrix speed; where only W is read, the smallest site is timed and scaled by size."""
    if step.device == "cuda" and not torch.cuda.is_available():
        return None
    seconds = evidence_flops(recipe.init.needs, found, weights, step.rows * step.length) / matrix_speed(step.device)
    if start.read and not seconds:
        small = min(found, key=lambda s: s.d_out * s.d_in)
        values = torch.randn(small.d_out, small.d_in)
        weight = Weight(small.name, (small.d_out, small.d_in), lambda: values)
        began = time.perf_counter()
        recipe.init(weight, small.r, small.s, None, draw)
        seconds = (time.perf_counter() - began) * sum(s.d_out * s.d_in for s in found) / values.numel()
    return seconds


@cache
def matrix_speed(device: str) -> float:
    """Floating point operations per second of one fp32 product of 1024² matrices, the best of five."""
    square, best = torch.ones(1024, 1024, device=device), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        (square @ square)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return float(2 * 1024**3 / best)
