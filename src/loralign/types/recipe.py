"""Recipes and the lines of the table; data, no logic beyond a scale's formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loralign.types.axes import Form, Init, Outer, Rule, Transform


def over_rank(alpha: float, r: int) -> float:
    """s = alpha / r."""
    return alpha / r


def over_sqrt_rank(alpha: float, r: int) -> float:
    """s = alpha / √r (rsLoRA, arXiv 2312.03732)."""
    return float(alpha / r**0.5)


@dataclass(frozen=True)
class Recipe:
    """One point in the product of the five axes, with the fair defaults that every method shares."""

    init: Init
    form: Form
    transform: Transform
    outer: Outer
    rules: tuple[Rule, ...] = ()
    scale: Callable[[float, int], float] = over_rank
    r: int = 16
    alpha: float | None = 32.0
    """None: it follows the rank of each site, alpha = r."""
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Module name (or suffix) to rank, where it differs from r."""
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global clip; 0 switches it off."""
    name: str = "lora"

    def s(self, r: int | None = None) -> float:
        """The scale at rank r, None: the recipe's own."""
        r = self.r if r is None else r
        return self.scale(float(r) if self.alpha is None else self.alpha, r)


@dataclass(frozen=True)
class Full:
    """The reference: full fine-tuning of the same matrices that a recipe would adapt."""

    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    """(groups, lr, weight decay) -> optimizer; None: AdamW."""
    name: str = "full"


ExportClass = Literal["exact", "exact at rank 2r", "exact, ragged ranks", "exact, rank grows", "lossy", "none"]


@dataclass(frozen=True)
class LrPrior:
    """A starting point for the learning rate, stated as lr·s at hidden size 2000: lr = lr_s/s · (2000/hidden)^power."""

    lr_s: float | None
    source: str
    power: float = 0.781
    tuned_on: tuple[str, str] | None = None
    """The task it was tuned on and the fingerprint of its training rows, where known: a study on these rows says so."""


@dataclass(frozen=True)
class Method:
    """One line of the table: which factories it puts on which axes (None: plain LoRA's), and its provenance."""

    id: str
    summary: str
    arxiv: str
    export: ExportClass
    prior: LrPrior
    init: Callable[..., Init] | None = None
    form: Callable[..., Form] | None = None
    transform: Callable[..., Transform] | None = None
    rules: tuple[Callable[..., Rule], ...] = ()
    outer: Callable[..., Outer] | None = None
    scale: Callable[[float, int], float] | None = None
    reference: bool = False
    """A fact: no adapter at all, the matrices themselves train."""
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    """Of a reference, see `Full`."""
    renamed: str = ""
    """The id that a user should take instead; this one goes with the next release."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Recipe` that the method sets where the user does not, for instance its own clipping."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named settings, for instance those of the paper."""
    unverified: str = ""
    """Non-empty for reconstructions of papers that could not be read in full."""
