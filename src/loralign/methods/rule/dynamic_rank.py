"""Keep the rank-1 components that are largest within their module, as many as a shrinking budget allows.

    S_j = ‖c_j·b_j·a_jᵀ‖_F / (‖B·diag(c)·A‖_F + 1e-8)        Ŝ ← β·Ŝ + (1 − β)·S, every step
        = |c_j|·‖b_j‖·‖a_j‖ / (√(cᵀ[(BᵀB) ⊙ (AAᵀ)]c) + 1e-8)
    pruned(x) = ⌊(b0 − bT)·x³⌋, x: progress from 0.15·T to 0.5·T;  at each event c ← 0 for the lowest Ŝ of all modules
    R = η/(2·Σr)·Σ(Var(a_j) + Var(b_j))                      dR/da = η/(2·Σr)·2(a − ā)/(d_in − 1), until pruning ends

Shapes:  A (r, d_in) · B (d_out, r) · c, S (r,) · ΔW is never formed
Source:  Mao et al., "DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution", arXiv 2405.17357.
         Official code: MIkumikumi0116/DoRA@235e21f, Finetune_Utils.py. Not weight-decomposed DoRA (2402.09353).
Differs: from the code: steps are optimizer steps (there micro-batches), counts are exact (there ties prune more, and
         one slot is pruned where none is due), nothing is pruned at the window's start; s = alpha/r of the target rank.
         B's start is as in the code, its bound √(6/r) is large, c = 0 hides it.
Unverified: the paper's text was not at hand: equations as its code and a third party's quotations have them.
Cost:    O(r(d_in + d_out) + r²(d_in + d_out)) FLOPs a module and step, r numbers of state.
Export:  exact; ranks differ by module, some may be 0.
Args:    start_ratio: slots at the start over those at the end, 1.5. first, last: shares of the run before and after the
         budget shrinks, 0.15 and 0.5. interval: optimizer steps between events, 100 in the code; None: T/500.
         beta: β, 0.9. variance: η, 0.1 in the code, 0.1 to 0.5 in the paper by a third party.
Example:
    >>> import torch
    >>> from loralign.methods.rule.dynamic_rank import shares
    >>> shares(torch.eye(2, 3), torch.eye(4, 2), torch.tensor([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import AtLeastOne, Beta, Count, NotNegative, Share, bounded
from loralign.maths.budget import cubic_pruned
from loralign.maths.linalg import gram, grams
from loralign.methods.rule.combine import GATE, Law, Shrink, average, slots_of, window_shares
from loralign.types import Joint, Moment, RuleState, Stack

TINY = 1e-8


def shares(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """‖c_j b_j a_jᵀ‖ over ‖B·diag(c)·A‖, (..., r)."""
    return _shares(gram(A.mT), gram(B), c)


def _shares(rows: Tensor, columns: Tensor, c: Tensor) -> Tensor:
    """Of AAᵀ and BᵀB."""
    each = c.abs() * (rows.diagonal(dim1=-2, dim2=-1) * columns.diagonal(dim1=-2, dim2=-1)).clamp_min(0).sqrt()
    whole = (rows * columns * c[..., None, :] * c[..., :, None]).sum((-2, -1)).clamp_min(0).sqrt()
    return each / (whole[..., None] + TINY)


def shares_of(stacks: Sequence[Stack]) -> list[Tensor]:
    """(n, r) of each; the small matrices of all stacks of a rank are treated together."""
    kinds: dict[object, list[Stack]] = {}
    for stack in stacks:
        kinds.setdefault((stack.r, stack.tensors[GATE].device), []).append(stack)
    made: dict[str, Tensor] = {}
    for alike in kinds.values():
        rows, columns = map(grams, zip(*map(_upright, alike), strict=True))
        joint = _shares(rows, columns, torch.cat([st.tensors[GATE] for st in alike]))
        made.update(zip((st.key for st in alike), joint.split([len(st.sites) for st in alike]), strict=True))
    return [made[stack.key] for stack in stacks]


def _upright(stack: Stack) -> tuple[Tensor, Tensor]:
    return stack.tensors["A"].mT, stack.tensors["B"]


@dataclass(frozen=True)
class ComponentShare:
    beta: float
    transient: ClassVar[float] = 1.0

    @torch.no_grad()
    def observe(self, state: RuleState, moment: Moment) -> None:
        now = shares_of(moment.stacks)
        kept = [average(state, f"share|{st.key}", like) for st, like in zip(moment.stacks, now, strict=True)]
        torch._foreach_lerp_(kept, now, 1 - self.beta)

    def scores(self, state: RuleState, moment: Moment) -> Mapping[str, Tensor]:
        return slots_of(moment.stacks, [state[f"share|{stack.key}"] for stack in moment.stacks])


@dataclass(frozen=True)
class Variance:
    """The entries of a row of A, or of a column of B, are drawn towards their mean."""

    eta: float

    def __call__(self, stacks: Sequence[Stack]) -> Joint | None:
        slots = sum(len(stack.sites) * stack.r for stack in stacks if "A" in stack.tensors)
        if not self.eta or not slots:
            return None
        return [
            {name: self._slope(X, 2 if name == "A" else 1, slots) for name, X in st.tensors.items() if name in "AB"}
            for st in stacks
        ]

    def _slope(self, X: Tensor, axis: int, slots: int) -> Tensor:
        """η/(2·Σr)·2(x − x̄)/(d − 1) along an axis."""
        return (X - X.mean(axis, keepdim=True)).mul_(self.eta / slots / max(1, X.shape[axis] - 1))


@bounded
def component_budget(
    start_ratio: AtLeastOne = 1.5,
    first: Share = 0.15,
    last: Share = 0.5,
    interval: Count | None = None,
    beta: Beta = 0.9,
    variance: NotNegative = 0.1,
) -> Shrink:
    """Dynamic-rank LoRA's allocation of the budget."""
    window_shares(first, last)
    law = Law(start_ratio, first, last, interval, cubic_pruned)
    return Shrink(ComponentShare(beta), law, Variance(variance), regularised_to_the_end=False)
