"""Both factors uniform and wide; a gate that is zero keeps the product zero.

    A_ij ~ U(−√(6/d_in), √(6/d_in))        B_ij ~ U(−√(6/r), √(6/r))        c = 0, so W_eff = W0

Shapes:  A (r, d_in) · B (d_out, r)
Source:  Mao et al., "DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution", arXiv 2405.17357;
         official code: MIkumikumi0116/DoRA@235e21f (`kaiming_uniform_` with a = 0 on both factors).
Differs: drawn from a generator keyed by (seed, module name).
Cost:    none.
Export:  exact.
Args:    none.
Example:
    >>> import torch
    >>> from loralign.methods.init.kaiming_both import kaiming_both
    >>> from loralign.types import Weight
    >>> W = Weight("w", (600, 24), lambda: torch.zeros(600, 24))
    >>> f = kaiming_both()(W, 6, 1.0, None, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> bool(f.A.abs().max() <= 0.5), bool(f.B.abs().max() <= 1.0)
    (True, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Weight


@dataclass(frozen=True)
class KaimingBoth:
    facts: ClassVar[Facts] = Facts()
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        return Start(_uniform(r, d_in, draw("init A")), _uniform(d_out, r, draw("init B")))


def _uniform(rows: int, fan_in: int, source: torch.Generator) -> Tensor:
    return (2 * torch.rand(rows, fan_in, generator=source) - 1) * (6 / fan_in) ** 0.5


def kaiming_both() -> KaimingBoth:
    """A and B uniform, each by its own fan-in."""
    return KaimingBoth()
