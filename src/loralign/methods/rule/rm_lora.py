"""Push A's rows and B's columns towards an orthonormal set, and train a random subset of the slots at each step.

    R = c/|P|·[Σ_A ‖AAᵀ − I‖ + Σ_B ‖BᵀB − I‖]                           P: the trained factors of all pairs
    dR/dA = 2c/|P|·(AAᵀ − I)·A/‖AAᵀ − I‖        dR/dB = 2c/|P|·B·(BᵀB − I)/‖BᵀB − I‖
    from step 2 on: gA keeps q rows and gB keeps q columns, drawn anew at each step

Shapes:  A, gA (r, d_in) · B, gB (d_out, r) · masks (r, 1) and (r,)
Source:  Mao et al., "Enhancing Parameter Efficiency and Generalization in Large-Scale Models: A Regularized and Masked
         Low-Rank Adaptation Approach", arXiv 2407.12074. Official code: yz-mao/RM-LoRA (adalora_trainer.py).
Differs: from the code: tensors outside pairs train (there the mask freezes them from step 1 on), B is masked by its own
         columns also without the regulariser (there it froze), draws are keyed by (seed, step, module), so that all
         ranks agree; one draw per step, as the code and its help say (README: per epoch). Twins: A and B are the sums.
Cost:    6·r²(d_in + d_out) FLOPs a step where c > 0; two small masks per pair.
Export:  exact.
Args:    c: weight of R, 0.1 in README and run_glue.sh, 0 in run_qa.sh; it counts 1/|P|, so it is stronger on a small
         model. keep: q, slots that train, 2 of r = 4 and 4 of r = 8 there; None: half of r, rounded up.
         draw: "shared" (v1, B's columns are A's rows) or "separate" (v2). mask_target: "grad" as published, where
         Adam's momentum still moves masked slots, or "update", which keeps them bit for bit in that step as well.
Example:
    >>> import torch
    >>> from loralign.methods.rule.rm_lora import regulariser
    >>> float(regulariser([torch.eye(2, 5).mT, torch.zeros(4, 2)], 1.0))  # = √r/2
    0.7071067690849304
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loralign.maths.bounds import Count, NotNegative, bounded
from loralign.maths.draws import keyed_scores
from loralign.maths.linalg import gram
from loralign.maths.lists import joined
from loralign.types import Ctx, Facts, Joint, LoralignError, RuleBase, RuleState, Stack


def regulariser(factors: Sequence[Tensor], c: float) -> Tensor:
    """R of upright factors (d, r): pass Aᵀ and B."""
    sizes = [torch.linalg.matrix_norm(_excess(gram(X))) for X in factors]
    return c / len(sizes) * torch.stack(sizes).sum()


def _scaled(E: Tensor, c: float) -> Tensor:
    """2c·E/‖E‖, E (n, r, r), in place."""
    size = torch.linalg.vector_norm(E, dim=(-2, -1), keepdim=True)
    return E.mul_(2 * c / size.clamp_min_(torch.finfo(E.dtype).tiny))


def slopes(stacks: Sequence[Stack], c: float) -> Joint | None:
    """c·d‖XᵀX − I‖/dX = 2c·X·(XᵀX − I)/‖XᵀX − I‖ of each factor, over their number; 0 at the minimum. A's directions
    are its rows, B's its columns.

    The factors of one shape, and the small matrices of all of a rank, are treated together: launches count more than
    arithmetic here.
    """
    if not c:
        return None
    kinds: dict[tuple[object, ...], tuple[str, list[int]]] = {}
    for name in "AB":
        for k, st in enumerate(stacks):
            if name in st.tensors:
                X = st.tensors[name]
                kinds.setdefault((name, st.r, X.device, X.shape[1:]), (name, []))[1].append(k)
    count = sum(len(stacks[k].sites) for _, at in kinds.values() for k in at)
    if not count:
        return None
    made: list[dict[str, Tensor]] = [{} for _ in stacks]
    ranks: dict[object, list[tuple[str, list[int]]]] = {}
    for name, at in kinds.values():
        ranks.setdefault((stacks[at[0]].r, stacks[at[0]].tensors[name].device), []).append((name, at))
    for alike in ranks.values():
        found = [gram(X.mT if name == "A" else X) for name, at in alike for X in [_together(stacks, name, at)]]
        E = _scaled(_excess(torch.cat(found)), c / count)
        for (name, at), part in zip(alike, E.split([len(G) for G in found]), strict=True):
            X = _together(stacks, name, at)  # once more: of all kinds at once it would be the trained numbers again
            slope = torch.bmm(part, X) if name == "A" else torch.bmm(X, part)  # E is symmetric
            for k, own in zip(at, slope.split([len(stacks[k].sites) for k in at]), strict=True):
                made[k][name] = own
    return made


def _together(stacks: Sequence[Stack], name: str, at: Sequence[int]) -> Tensor:
    """The factors of some stacks, which are of one shape."""
    return joined([stacks[k].tensors[name] for k in at])


def _excess(H: Tensor) -> Tensor:
    """H − I, in place."""
    H.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return H


@dataclass(frozen=True)
class MaskedOrthogonal(RuleBase):
    c: float
    keep: int | None
    draw: Literal["shared", "separate"]
    mask_target: Literal["grad", "update"]

    @property
    def facts(self) -> Facts:
        return Facts(least_rank=self.keep or 1, least_option="keep", transient=1.2)

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return slopes(stacks, self.c)

    def grad_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return self._masks(stacks, ctx)

    def update_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return self._masks(stacks, ctx) if self.mask_target == "update" else None

    def _masks(self, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        """The same for gradients and updates of a step: the draw is keyed. None where all slots train."""
        if ctx.step == 1 or all(self._kept(stack) == stack.r for stack in stacks):
            return None
        return [self._drawn(stack, self._kept(stack), ctx) for stack in stacks]

    def _drawn(self, stack: Stack, q: int, ctx: Ctx) -> dict[str, Tensor]:
        """q of r: A's rows and B's columns of every module; one draw for all, keyed by name."""
        n, sides = len(stack.sites), 1 if self.draw == "shared" else 2
        scores = keyed_scores(stack.sites, sides * stack.r, ctx.draw("rm-lora", "")).view(n, sides, stack.r)
        on = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, scores.topk(q).indices, True)
        return {"A": on[:, 0, :, None], "B": on[:, -1, None]}

    def _kept(self, stack: Stack) -> int:
        q = (stack.r + 1) // 2 if self.keep is None else self.keep
        if q > stack.r:
            name = stack.sites[0]
            raise LoralignError(f"rm-lora keeps {q} slots, {name} has {stack.r}: lower `keep` or raise the rank")
        return q


@bounded
def masked_orthogonal(
    c: NotNegative = 0.1,
    keep: Count | None = None,
    draw: Literal["shared", "separate"] = "shared",
    mask_target: Literal["grad", "update"] = "grad",
) -> MaskedOrthogonal:
    """RM-LoRA: an orthogonality regulariser and a random slot mask."""
    return MaskedOrthogonal(c, keep, draw, mask_target)
