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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loralign.maths.bounds import Count, NotNegative, bounded
from loralign.maths.draws import keyed_scores
from loralign.maths.linalg import gram
from loralign.maths.lists import stacked
from loralign.types import NOTHING, Ctx, Grad, LoralignError, Moment, Need, Pair, Plan


def regulariser(factors: Sequence[Tensor], c: float) -> Tensor:
    """R of upright factors (d, r): pass Aᵀ and B."""
    sizes = [torch.linalg.matrix_norm(_excess(X)) for X in factors]
    return c / len(sizes) * torch.stack(sizes).sum()


def slope(X: Tensor) -> Tensor:
    """d‖XᵀX − I‖/dX = 2·X·(XᵀX − I)/‖XᵀX − I‖ of X (n, d, r), 0 at the minimum."""
    E = _excess(X)
    size = torch.linalg.matrix_norm(E, keepdim=True)
    return X @ (E * torch.where(size > 0, 2 / size, 0.0))


def _slopes(factors: Sequence[Tensor | None], weight: float, flat: bool) -> list[Tensor | None]:
    """weight·slope of each factor, one call per shape; flat: rows are the directions (A)."""
    made: list[Tensor | None] = [None] * len(factors)
    groups: dict[object, list[int]] = {}
    for k, X in enumerate(factors):
        if X is not None:
            groups.setdefault((X.shape, X.device, X.dtype), []).append(k)
    for at in groups.values():
        joint = stacked([factors[k] for k in at])
        g = slope(joint.mT).mT if flat else slope(joint)
        for k, own in zip(at, (weight * g).unbind(), strict=True):
            made[k] = own
    return made


def _excess(X: Tensor) -> Tensor:
    H = gram(X)
    return H - torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)


@dataclass(frozen=True)
class MaskedOrthogonal:
    c: float
    keep: int | None
    draw: Literal["shared", "separate"]
    mask_target: Literal["grad", "update"]
    needs: Need = NOTHING

    @property
    def least_rank(self) -> int:
        return self.keep or 1

    def penalty_grad(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None:
        if not self.c:
            return None
        weight = self.c / sum(len(p.train) for p in pairs)
        found = [_slopes([getattr(p, f) if f in p.train else None for p in pairs], weight, f == "A") for f in "AB"]
        return [Grad(a, b) for a, b in zip(*found, strict=True)]

    def grad_mask(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None:
        return self._masks(pairs, ctx)

    def update_mask(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None:
        return self._masks(pairs, ctx) if self.mask_target == "update" else None

    def _masks(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None:
        """The same for gradients and updates of a step: the draw is keyed. None where all slots train."""
        ranks: dict[tuple[int, torch.device, torch.dtype], list[Pair]] = {}
        for p in pairs:
            ranks.setdefault((p.A.shape[0], p.A.device, p.A.dtype), []).append(p)
        if ctx.step == 1 or all(self._kept(r, group[0].name) == r for (r, *_), group in ranks.items()):
            return None
        found: dict[str, Grad] = {}
        for (r, device, dtype), group in ranks.items():
            on = self._drawn([p.name for p in group], r, self._kept(r, group[0].name), ctx).to(device, dtype)
            rows, columns = on[:, 0, :, None].unbind(), on[:, 1].unbind()
            found.update((p.name, Grad(*masks)) for p, *masks in zip(group, rows, columns, strict=True))
        return [found[p.name] for p in pairs]

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

    def event(self, moment: Moment) -> Plan | None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the draws are keyed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


@bounded
def masked_orthogonal(
    c: NotNegative = 0.1,
    keep: Count | None = None,
    draw: Literal["shared", "separate"] = "shared",
    mask_target: Literal["grad", "update"] = "grad",
) -> MaskedOrthogonal:
    """RM-LoRA: an orthogonality regulariser and a random slot mask."""
    return MaskedOrthogonal(c, keep, draw, mask_target)
