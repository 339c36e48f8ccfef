"""RAC-LoRA: in every link one factor is a fresh orthonormal draw and rests, the other one starts from zero and trains.

    A = c·Q, QQᵀ = I, B = 0, B trains        or        B = c·Q, QᵀQ = I, A = 0, A trains

Shapes:  A (r, d_in) · B (d_out, r) · Q Haar-uniform, (r, d_in) or (d_out, r)
Source:  Malinovsky et al., "Randomized Asymmetric Chain of LoRA", arXiv 2410.08305, algorithm 1; the coin: "Bernoulli-
         LoRA", arXiv 2508.03820. Official code: hammoudhasan/RACLora (not reused: its licence forbids it).
Differs: orthonormal where the paper draws Gaussian: its theorem is about projected steps, and with Q a plain step is
         one. c = 1/√3, the size of LoRA's own rows, so that rates tuned for LoRA carry over under Adam. The code's A,
         stored transposed, is 28 times larger. "smaller", "alternate" and "bernoulli" are not in the paper.
Unverified: the paper's body could not be read; from reviews and code.
Cost:    a QR of (d, r) per site and link. With one side fixed for the run its gradient is never formed.
Export:  exact, rank r·links.
Args:    frozen: the factor that rests: "A" or "B"; "smaller": the one along the smaller dimension, A where they are
         equal; "alternate": A in even links, B in odd ones; "bernoulli": a coin per link and site. chance: of B under
         "bernoulli". size: c.
Example:
    >>> import torch
    >>> from loralign.methods.init.rac_lora import random_side
    >>> from loralign.types import Weight
    >>> W = Weight("w", (6, 4), lambda: torch.zeros(6, 4))
    >>> start = random_side()(W, 2, 1.0, None, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> start.train, torch.allclose(3 * start.A @ start.A.T, torch.eye(2), atol=1e-6)
    ('B', True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from loralign.maths.bounds import Positive, bounded
from loralign.maths.draws import orthonormal
from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Train, Weight

Frozen = Literal["A", "B", "smaller", "alternate", "bernoulli"]
Chance = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class RandomSide:
    frozen: Frozen
    chance: float
    size: float
    needs: Need = NOTHING

    @property
    def facts(self) -> Facts:
        return Facts(turns=self.frozen in ("alternate", "bernoulli"))

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        sides = {"A": d_in, "B": d_out, "smaller": min(d_out, d_in)}
        most = sides.get(self.frozen, min(d_out, d_in))
        return "" if r <= most else f"it can start {most} slots at most"

    def trains(self, d_out: int, d_in: int, draw: Draw) -> Train:
        """The factor that trains in the link that `draw` is for."""
        if self.frozen == "smaller":
            return "A" if d_out < d_in else "B"
        if self.frozen == "alternate":
            return "A" if draw.link % 2 else "B"
        if self.frozen == "bernoulli":
            return "A" if float(torch.rand((), generator=draw("side"))) < self.chance else "B"
        return "A" if self.frozen == "B" else "B"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        train = self.trains(d_out, d_in, draw)
        if train == "A":
            return Start(torch.zeros(r, d_in), self.size * orthonormal(d_out, r, draw("draw B")), train="A")
        return Start(self.size * orthonormal(r, d_in, draw("draw A")), torch.zeros(d_out, r), train="B")


@bounded
def random_side(frozen: Frozen = "smaller", chance: Chance = 0.5, size: Positive = 3**-0.5) -> RandomSide:
    """RAC-LoRA's start of a link."""
    return RandomSide(frozen, chance, size)
