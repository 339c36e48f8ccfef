"""Shortcuts between the adapters of one kind of module, from block to block.

    module n of its kind, n = 0, 1, … in depth; m_n = min(span, n)
    bs (blocks):   h_n = W_n·x_n + s·(Σ_{k≤m_n} B_{n−k}·A_{n−k})·x_n
    is (inputs):   h_n = W_n·x_n + s·B_n·A_n·(x_n + x_{n−1})            x_{−1} := x_0
    ms (middle):   h_n = W_n·x_n + s·B_n·Σ_{k≤m_n} A_{n−k}·x_{n−k}
    merged:        bs exactly, ranks (m_n + 1)·r; else B_n times 1 + Σ_k f_{n−k}/f_n, where f is the mean over the last
                   100 training forwards of ‖x‖_F (is; k = 1, and 2 at the start of a chain) or ‖A·x‖_F (ms)

Shapes:  A (r, d_in) · B (d_out, r)
Source:  Shi et al., "ResLoRA: Identity Residual Mapping in Low-Rank Adaptation", arXiv 2402.18039, §3; merging based on
         input. Official code: microsoft/LMOps reslora (its merge_flag 4).
Differs: all shortcuts carry s, as in the code; the paper omits it. Chains end where sizes change; in ms also where
         `ranks` change, since A·x of two ranks have no sum. Dropout draws one mask a module; the code draws one per
         block in bs. Merging based on weights is not offered: the paper measures it as worse for ms, and the code
         writes into the base there. Nor are merges by least squares, of α = E⟨x_{n−1}, x_n⟩/E‖x_n‖² or of a matrix,
         which lose less and are not the paper's. Norms are those of each process's own rows.
         Preset "paper": the authors' script for text; targets (q, v) and warm-up (0.06) are the file's to say.
Cost:    bs: (m_n + 1) times LoRA's products, no activation of another layer; is: one sum; ms: m_n sums of r features.
         is and ms hold inputs until the model's forward ends and refuse activation checkpointing.
Export:  bs: exact, ragged ranks. is, ms: lossy, the difference on the probes is stated.
Args:    shortcut: bs, is or ms. span: blocks before, at most; is has one.
Unverified: the tables of the paper.
Example:
    >>> from loralign.methods.form.reslora import shortcuts
    >>> names = [f"layers.{i}.{kind}" for i in range(4) for kind in ("q", "v")]
    >>> list(shortcuts(span=2).neighbours("layers.3.v", names))
    ['layers.2.v', 'layers.1.v']
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loralign.maths.bounds import Place, bounded
from loralign.maths.operators import Dense
from loralign.types import Draw, Facts, FormBase, Live, Operator, Weight

WINDOW = 100
"""Training forwards whose norms are averaged, the code's merge_4_len."""


def kind(name: str) -> str:
    """A module's name without the number of its block, the first number in it."""
    return re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "#", name, count=1)


def _mean(own: Live) -> Tensor:
    norms, seen = own.own["norms"], own.own["seen"]
    return norms.sum() / seen.clamp(1, WINDOW).to(norms.dtype)


@dataclass(frozen=True)
class Shortcuts(FormBase):
    shortcut: Literal["bs", "is", "ms"]
    span: int

    @property
    def facts(self) -> Facts:
        if self.shortcut == "bs":
            return Facts(cross_layer=True)
        return Facts(cross_layer=True, exact=False, path="inputs" if self.shortcut == "is" else "features")

    def constants(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        if self.shortcut == "bs":
            return {}
        return {"norms": torch.zeros(WINDOW), "seen": torch.zeros((), dtype=torch.int64)}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        chain = [other for other in sites if kind(other) == kind(name)]
        before = chain[: chain.index(name)][::-1]
        return before[: 1 if self.shortcut == "is" else self.span]

    def _sizes(self, live: Live) -> tuple[int, ...]:
        sizes = live.A.shape[1], live.B.shape[0]
        return (*sizes, live.A.shape[0]) if self.shortcut == "ms" else sizes

    def _linked(self, own: Live, others: Sequence[Live]) -> list[Live]:
        found = []
        for other in others:  # torch 2.11's dynamo does not know `takewhile`
            if self._sizes(other) != self._sizes(own):
                break
            found.append(other)
        return found

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        linked = self._linked(own, others)
        if self.shortcut == "bs":
            parts = [own, *linked]
            if len(parts) == 1:
                return Dense(own.A), Dense(own.B)
            return Dense(torch.cat([p.A for p in parts])), Dense(torch.cat([p.B for p in parts], dim=1))
        if self.shortcut == "is" and not linked:
            return Dense(own.A), Dense(2 * own.B)
        mine = _mean(own)
        ratios = [torch.where(mine > 0, _mean(other) / mine.clamp_min(1e-30), 1.0) for other in linked]
        return Dense(own.A), Dense(own.B * (1 + sum(ratios, torch.zeros_like(mine))))


@bounded
def shortcuts(shortcut: Literal["bs", "is", "ms"] = "bs", span: Place = 4) -> Shortcuts:
    """ResLoRA."""
    return Shortcuts(shortcut, span)
