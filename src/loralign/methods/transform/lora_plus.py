"""Another learning rate for B than for A.

    lr_B = ratio·lr_A        (at every step: the ratio lives in the parameter groups, schedulers keep it)

Shapes:  like the factors, A (r, d_in) and B (d_out, r)
Source:  Hayou, Ghosh & Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354. Official code:
         nikhil-ghosh-berkeley/loraplus (lora_plus.py); PEFT optimizers/loraplus.py.
Differs: from both codes: only B gets the ratio, not biases, norms and magnitudes (the paper speaks of B only); weight
         decay is the optimizer's and applies to both factors (PEFT: a passed `weight_decay` silently becomes 0);
         tensors outside pairs, embeddings too, keep the plain rate (official default for embeddings: 1e-6).
Cost:    none.
Export:  exact.
Args:    ratio: lr_B/lr_A, dimensionless, about 2^4 in the paper, required in the codes. With a large ratio the authors
         advise half of LoRA's rate for A. inner: the transform that both rates drive. momentum_dtype:
         what Adam keeps m in.
         Clipping: the usual global norm of 1.
Example:
    >>> from loralign.methods.transform.lora_plus import ratio_lr
    >>> ratio_lr(8.0).lr_ratio
    8.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loralign.maths.bounds import MomentumDtype, Positive, bounded
from loralign.methods.transform.adamw import adamw
from loralign.types import Facts, Grad, Group, LoralignError, Pair, Prepared, SlotChange, State, Transform


@dataclass(frozen=True)
class Ratio:
    inner: Transform
    lr_ratio: float

    @property
    def facts(self) -> Facts:
        return self.inner.facts

    def init(self, pair: Pair) -> State:
        return self.inner.init(pair)

    def prepare(self, group: Group) -> Prepared:
        return self.inner.prepare(group)

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        return self.inner.update(group, scalars, carry)

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        self.inner.on_slots(pair, state, change)


@bounded
def ratio_lr(
    ratio: Positive = 16.0, inner: Transform | None = None, momentum_dtype: MomentumDtype = "float32"
) -> Ratio:
    """`inner` (default: Adam) with lr_B = ratio·lr_A; refuses transforms that balance the factors themselves."""
    if inner is not None and momentum_dtype != "float32":
        raise LoralignError("lora-plus: momentum_dtype is Adam's, and another optimizer was given: set it there")
    driven: Transform = adamw(momentum_dtype=momentum_dtype) if inner is None else inner
    if "elementwise" not in driven.facts.accepts:
        raise LoralignError(
            f"lora-plus gives A and B different rates because Adam treats them alike; {type(driven).__name__} already "
            "weighs them against each other: use it alone"
        )
    return Ratio(driven, ratio * driven.lr_ratio)
