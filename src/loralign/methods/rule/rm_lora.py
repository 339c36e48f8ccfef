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
from loralign.maths.lists import stacked
from loralign.types import (
    NOTHING,
    Ctx,
    Facts,
    LoralignError,
    Moment,
    Named,
    Plan,
    RuleBase,
    RuleNeed,
    RuleState,
)


def regulariser(factors: Sequence[Tensor], c: float) -> Tensor:
    """R of upright factors (d, r): pass Aᵀ and B."""
    sizes = [torch.linalg.matrix_norm(_excess(X)) for X in factors]
    return c / len(sizes) * torch.stack(sizes).sum()


def slope(X: Tensor) -> Tensor:
    """d‖XᵀX − I‖/dX = 2·X·(XᵀX − I)/‖XᵀX − I‖ of X (n, d, r), 0 at the minimum."""
    E = _excess(X)
    size = torch.linalg.matrix_norm(E, keepdim=True)
    return X @ (E * torch.where(size > 0, 2 / size, 0.0))


def slopes(tensors: Named, c: float) -> Named | None:
    """c·slope of each factor over their number, one call per shape; A's directions are its rows, B's its columns."""
    factors = {key: X for key, X in tensors.items() if key[1] in "AB"}
    if not c or not factors:
        return None
    made: dict[tuple[str, str], Tensor] = {}
    groups: dict[object, list[tuple[str, str]]] = {}
    for key, X in factors.items():
        groups.setdefault((key[1], X.shape, X.device, X.dtype), []).append(key)
    for keys in groups.values():
        joint = stacked([factors[key] for key in keys])
        g = slope(joint.mT).mT if keys[0][1] == "A" else slope(joint)
        made.update(zip(keys, (c / len(factors) * g).unbind(), strict=True))
    return made


def _excess(X: Tensor) -> Tensor:
    H = gram(X)
    return H - torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)


@dataclass(frozen=True)
class MaskedOrthogonal(RuleBase):
    c: float
    keep: int | None
    draw: Literal["shared", "separate"]
    mask_target: Literal["grad", "update"]
    needs: RuleNeed = NOTHING

    @property
    def facts(self) -> Facts:
        return Facts(least_rank=self.keep or 1, transient=1.0)

    def penalty(self, state: RuleState, tensors: Named, ctx: Ctx) -> Named | None:
        return slopes(tensors, self.c)

    def grad_mask(self, state: RuleState, tensors: Named, ctx: Ctx) -> Named | None:
        return self._masks(tensors, ctx)

    def update_mask(self, state: RuleState, tensors: Named, ctx: Ctx) -> Named | None:
        return self._masks(tensors, ctx) if self.mask_target == "update" else None

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        return state, None

    def _masks(self, tensors: Named, ctx: Ctx) -> Named | None:
        """The same for gradients and updates of a step: the draw is keyed. None where all slots train."""
        ranks: dict[tuple[int, torch.device, torch.dtype], dict[str, None]] = {}
        for (site, name), X in tensors.items():
            if name in "AB":
                r = X.shape[0] if name == "A" else X.shape[1]
                ranks.setdefault((r, X.device, X.dtype), {})[site] = None
        if ctx.step == 1 or all(self._kept(r, next(iter(names))) == r for (r, *_), names in ranks.items()):
            return None
        found: dict[tuple[str, str], Tensor] = {}
        for (r, device, dtype), names in ranks.items():
            on = self._drawn(list(names), r, self._kept(r, next(iter(names))), ctx).to(device, dtype)
            for site, rows, columns in zip(names, on[:, 0, :, None].unbind(), on[:, 1].unbind(), strict=True):
                found[site, "A"], found[site, "B"] = rows, columns
        return found

    def _drawn(self, names: Sequence[str], r: int, q: int, ctx: Ctx) -> Tensor:
        """(n, 2, r) bool, q of r: A's rows and B's columns of every module; one draw for all, keyed by name."""
        sides = 1 if self.draw == "shared" else 2
        scores = keyed_scores(names, sides * r, ctx.draw("rm-lora", "")).view(len(names), sides, r)
        on = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, scores.topk(q).indices, True)
        return on.expand(-1, 2, -1)

    def _kept(self, r: int, name: str) -> int:
        q = (r + 1) // 2 if self.keep is None else self.keep
        if q > r:
            raise LoralignError(f"rm-lora keeps {q} slots, {name} has {r}: lower `keep` or raise the rank")
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
