"""A stays what it is; B follows the gradient projected onto A's rows, then Adam.

    b = (1/s²)·gB·(AAᵀ)⁻¹        so that s·b·A = G·P_A

Shapes:  A (r, d_in) · B, gB, b (d_out, r)
Source:  Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv
         2308.03303. Official code: PEFT optimizers/lorafa.py, which added the projection.
Differs: from PEFT: products in float32 also under autocast, s is the pair's. Where A trains too its gradient is ignored
         and A gets no update; an init with train="B" also saves its gradient and the layer inputs.
Cost:    2·r²(d_in + d_out) FLOPs a step; Adam's state of B.
Export:  exact.
Args:    betas, eps, momentum_dtype: Adam's. Clipping: the usual global norm of 1, over what trains.
Example:
    >>> from loralign.methods.transform.lora_fa import projected_gradient
    >>> sorted(projected_gradient().facts.accepts)
    ['one_sided', 'shapes', 'slots']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, MomentumDtype, bounded
from loralign.maths.linalg import gram, psd_inverse
from loralign.maths.lists import by_shape, scales, stacked
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import Chain, chain
from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State, WorkFailed


@dataclass(frozen=True)
class Projected:
    """Gradients of B to b; keeps nothing."""

    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "shapes", "slots"}), transient=1.0)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: {} for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads = group.pairs, group.grads
        if grads[0].B is None:
            raise WorkFailed(f"lora-fa trains B only, and B of {pairs[0].name} does not train")
        places = by_shape(pairs)
        inverse = psd_inverse(torch.cat([gram(stacked([pairs[k].A for k in at]).mT) for at in places]))
        out = [Grad(None, None)] * len(pairs)
        for at, iA in zip(places, inverse.split([len(at) for at in places]), strict=True):
            b = stacked([grads[k].B for k in at]) @ (iA / scales([pairs[k] for k in at], iA) ** 2)
            for k, own in zip(at, b.unbind(), strict=True):
                out[k] = Grad(None, own)
        return out

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing is kept."""


@bounded
def projected_gradient(
    betas: Betas = (0.9, 0.999), eps: Epsilon = 1e-8, momentum_dtype: MomentumDtype = "float32"
) -> Chain:
    """LoRA-FA: B alone moves."""
    return chain(Projected(), adamw(betas, eps, momentum_dtype))
