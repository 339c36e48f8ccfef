"""What an init or a rule must know before or while it acts, and what is found; data, no logic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Train = Literal["AB", "A", "B"]
"""Which factors of a pair train."""

Batch = Mapping[str, Any]
Batches = Iterable[Batch]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Weight:
    """A frozen base weight, read only by those who need its values."""

    name: str
    """Path of the module inside the base model, for instance `model.layers.3.self_attn.q_proj`."""
    shape: tuple[int, int]
    """(d_out, d_in), also where the module stores the transpose (Conv1D)."""
    read: Callable[[], Tensor]
    """Returns W (d_out, d_in), fp32, dequantised; costs a copy."""


@dataclass(frozen=True)
class Site:
    """One adapted linear map: the PEFT layer, its adapter and the shapes."""

    name: str
    layer: nn.Module
    adapter: str
    d_out: int
    d_in: int
    r: int
    s: float


class Draw(Protocol):
    """Keyed randomness: one (seed, link, purpose, step, module), one generator, on every machine and rank.

    link: which link of a chain the draw is for, 0 for the first and where there is no chain.
    """

    @property
    def link(self) -> int: ...

    def __call__(self, purpose: str, step: int = 0) -> torch.Generator: ...


@dataclass(frozen=True)
class Nothing:
    """The init or rule is computed from W, r and s alone."""

    draws: int = 0
    """Micro-batches that the collector takes."""


@dataclass(frozen=True)
class Sketch:
    """How the gradient is sketched: never formed, state of width·r·(d_out + d_in) numbers per site."""

    width: int = 8
    """Columns kept, in multiples of r; more than per_rank, so that the quality can be estimated."""
    passes: int = 1
    """Over the same micro-batches: the first compresses the running sum, each further one is half a power iteration."""
    exact_above: float = 0.1
    """Sites where the exact directions could hold more than this share of the gradient's energy in addition to what the
    sketch's hold, by its own estimate, are treated exactly; 1: none."""
    held_out: int = 1
    """Further micro-batches, on which only the captured share is measured; 0: not measured."""


@dataclass(frozen=True)
class TopGradient:
    """The leading k = per_rank·r singular triples of the initial gradient G, averaged over micro-batches."""

    per_rank: int = 2
    micro_batches: int = 8
    sketch: Sketch | None = None
    """None: the exact gradient, one layer's at a time, summed on the CPU. Otherwise how to sketch it."""

    @property
    def draws(self) -> int:
        return self.micro_batches + (self.sketch.held_out if self.sketch else 0)


@dataclass(frozen=True)
class Preheated:
    """The leading r triples of a temporary adapter's product after `steps` optimizer steps at rank R.

    steps = 0: no step is taken; two passes over different halves of the micro-batches sketch the gradient at width R.
    """

    rank: Callable[[int], int]
    """R as a function of r."""
    steps: int
    train: Train
    """The factors of the temporary adapter that move; the others stay random with orthonormal rows or columns."""
    micro_batches: int = 32
    """Drawn; the steps cycle through them."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    lr: float | None = None
    """Peak learning rate of the preheat's AdamW; None: plain LoRA's prior."""

    @property
    def draws(self) -> int:
        return self.micro_batches


@dataclass(frozen=True)
class CommonSubspace:
    """Directions that several sources share: adapters, deltas between checkpoints, or weights."""

    sources: tuple[str, ...] = ()
    """Folders of adapters or of checkpoints, or one basis file; (): the layers of the model itself."""
    base: str | None = None
    """Folder of the checkpoint that `sources` were fine-tuned from: their deltas are the sources."""
    side: Literal["left", "right", "auto"] = "auto"
    """The side whose directions are wanted: left belongs in B, right in A; auto: where the sources agree more."""
    width: int = 32
    """Leading directions taken from each source."""
    draws: int = 0


@dataclass(frozen=True)
class Activations:
    """Second moments of the module inputs over n micro-batches."""

    micro_batches: int = 8

    @property
    def draws(self) -> int:
        return self.micro_batches


@dataclass(frozen=True)
class Inputs:
    """A rule's: squares of every site's input features, summed over the tokens of each optimizer step."""

    draws: int = 0


@dataclass(frozen=True)
class Validation:
    """A rule's: losses on so many validation rows, which are neither training rows nor rows that are reported on."""

    rows: int = 32
    draws: int = 0


Need = Nothing | TopGradient | Preheated | CommonSubspace | Activations
RuleNeed = Nothing | Inputs | Validation
NOTHING = Nothing()


@dataclass(frozen=True)
class Directions:
    """Evidence about one site: singular triples, best first, and how much of the whole they hold.

    U: (d_out, k) or None. S: (k,). V: (d_in, k) or None; None for the side that is not known. captured: share of the
    measured thing's energy in these directions, in [0, 1]. held_out: the same share of data that they were not computed
    from. quality: their energy over that of the best k directions, estimated from below; 1 where exact. All None where
    unknown. exact: no sketch was involved. note: what to tell the user.
    """

    U: Tensor | None
    S: Tensor
    V: Tensor | None
    captured: float | None = None
    exact: bool = True
    note: str = ""
    held_out: float | None = None
    quality: float | None = None
