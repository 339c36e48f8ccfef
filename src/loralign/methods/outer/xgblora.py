"""XGBLoRA: boosters of rank 1, one after the other, each at a random part of the layers.

    W_l ← W_l + s·b_l·a_lᵀ   for the layers l of the booster's part S_t, |S_t| = L_s of L; others stay, asleep

Shapes:  none.
Source:  Zhang et al., "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs", arXiv
         2410.19694. Official code: none found.
Differs: W is never written: boosters become frozen slots, so the result is a plain adapter of ragged ranks; modules
         that no booster trained are left out of the export. The penalty λ(‖A‖² + ‖B‖²) is weight decay's, not in here.
         The deal (every layer once per cycle) is ours; "uniform" is the paper's. Shrinkage is 1, as in the paper.
Unverified: the paper's body could not be read; link length, rate and alpha are unknown: from reviews and other people's
         code.
Cost:    optimizer state and moments of L_s layers only; the backward pass still reaches the lowest of them.
Export:  exact, rank of a module = number of boosters that trained it.
Args:    fraction: L_s/L. link_steps: optimizer steps of a booster; None: a hundredth of the run, 50 at least. choice:
         "deal": a shuffled pack of layers dealt out L_s at a time, the last hand of a cycle may be smaller; "uniform":
         L_s layers drawn anew each time. warm_up_steps: of the rate in every booster but the first. keep_slots: at
         every knot what was committed is cut to the best so many slots per module (lossy: the loss is said); None: all.
Example:
    >>> import torch
    >>> from loralign.methods.outer.xgblora import boosters
    >>> names = [f"layers.{i}.{kind}" for i in range(3) for kind in "qv"]
    >>> part = boosters().episode(0, 1000, names, lambda purpose, step=0: torch.Generator().manual_seed(0)).sites
    >>> len(part), len({name.split(".")[1] for name in part})
    (2, 1)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval

from loralign.maths.bounds import Count, Steps, bounded
from loralign.methods.outer.chain import LinkSteps
from loralign.types import Draw, Episode, Facts

Fraction = Annotated[float, Interval(gt=0, le=1)]
Choice = Literal["deal", "uniform"]


@dataclass(frozen=True)
class Boosters:
    fraction: float
    link_steps: int | None
    choice: Choice
    warm_up_steps: int
    keep_slots: int | None
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        length = max(50, total_steps // 100) if self.link_steps is None else self.link_steps
        begin, end = index * length, min((index + 1) * length, total_steps)
        if begin >= end:
            return None
        layers = layers_of(sites)
        part = self._part(index, len(layers), draw)
        chosen = {name for k in part for name in list(layers.values())[k]}
        names = tuple(name for name in sites if name in chosen)
        return Episode(index, end - begin, sites=names, warm_up_steps=self.warm_up_steps, keep_slots=self.keep_slots)

    def _part(self, index: int, layers: int, draw: Draw) -> list[int]:
        """Positions of the layers that booster `index` trains."""
        hand = max(1, round(self.fraction * layers))
        if self.choice == "uniform":
            return torch.randperm(layers, generator=draw("layers", index))[:hand].tolist()
        hands = -(-layers // hand)
        cycle, place = divmod(index, hands)
        pack: list[int] = torch.randperm(layers, generator=draw("layers", cycle)).tolist()
        return pack[place * hand : (place + 1) * hand]


def layers_of(sites: Sequence[str]) -> dict[str, list[str]]:
    """The sites of each layer: equal names up to the first number; a site without one is its own."""
    found: dict[str, list[str]] = {}
    for name in sites:
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
        found.setdefault(numbered.group() if numbered else name, []).append(name)
    return found


@bounded
def boosters(
    fraction: Fraction = 1 / 3,
    link_steps: LinkSteps | None = None,
    choice: Choice = "deal",
    warm_up_steps: Steps = 0,
    keep_slots: Count | None = None,
) -> Boosters:
    """XGBLoRA."""
    return Boosters(fraction, link_steps, choice, warm_up_steps, keep_slots)
