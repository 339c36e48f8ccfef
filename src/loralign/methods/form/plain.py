"""The stock form: A and B themselves train, W_eff = W0 + s·B·A, with frozen slots appended.

Shapes:  A (r, d_in) · B (d_out, r)
Source:  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3. Official code:
         microsoft/LoRA (loralib/layers.py).
Differs: none.
Cost:    none beyond LoRA.
Export:  exact.
Args:    none.
Example:
    >>> from loralign.methods.form.plain import plain
    >>> plain().facts.identity
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.maths.operators import Dense
from loralign.types import Facts, FormBase, Live, Operator


@dataclass(frozen=True)
class Plain(FormBase):
    facts: ClassVar[Facts] = Facts(identity=True, commits=True)

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        return Dense(torch.cat([own.A, own.A0])), Dense(torch.cat([own.B, own.B0], dim=1))


def plain() -> Plain:
    """The stock form."""
    return Plain()
