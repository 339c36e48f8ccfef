"""Momentum on each factor, then its matrix sign: every direction of a factor moves equally far.

    m ← μ·m + (1 − μ)·g        n = (1 − μ)·g + μ·m        update = −lr·0.2·√max(rows, columns)·msign(n)
    μ = 0:  n = g, and nothing is kept

`spectral` is this step on wide factors at s = √r (alpha = r under rsLoRA's scaling), where the rank of each step, not
the optimizer's state, is what holds LoRA back.

A step moves a factor by about ‖dA‖₂ = 0.2·lr·√d_in, ‖dB‖₂ = 0.2·lr·√d_out. A starts with singular values near 1/√3 at
any width and B = 0, so that ΔW = s·BA grows by s·0.2·lr·√(d_out/3) a step while A is near its start and as
s·(0.2·lr)²·t²·√(d_in·d_out) once it has moved. ΔW of spectral size √(d_out/d_in), which changes features equally at any
width (Yang et al. 2023, arXiv 2310.17813), asks for lr ∝ 1/(s·√width) in the first case, 1/√(s·width) in the second:

    lr = c / (s·√width),    c = 0.54

c was 0.54 to 0.58 on SmolLM2 (width 576, ranks 64 and 128), 0.57 to 0.78 on small Llamas of width 64 to 512, 0.27 on
MiniLM (384): records/2026-11-29-cpu-width. The task moves it by a factor of two each way.

Shapes:  g, m, n like the factor, A (r, d_in) or B (d_out, r)
Source:  Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io); the
         factor 0.2·√max is Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, eq. 4. Official code:
         KellerJordan/Muon (muon.py).
Differs: the momentum is damped, which has the direction of the undamped one (m ← μ·m + g, n = g + μ·m) and with it
         the same sign matrix; acts on the factors one by one, not on the product (arXiv 2606.12921 whitens by the
         other factor, as `lora_rite` does); Newton–Schulz in float32 on the r by r side, there in bf16 on the matrix.
Cost:    6·r²(d_in + d_out) FLOPs a step; state per trained number: 4 B, 2 B with momentum in bfloat16, none at μ = 0.
Export:  exact.
Args:    momentum: μ, 0.95 in Muon, 0.8 in `spectral`, 0: stateless. newton_steps: iterations, 5. momentum_dtype: what m
         is kept in. lr: in units of Adam's, RMS of an update about 0.2·lr.
         Clipping: no effect beyond the momentum's weighting, the sign has no size.
Example:
    >>> from loralign.methods.transform.muon import matrix_sign
    >>> matrix_sign().lr_ratio
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import Beta, Count, MomentumDtype, bounded
from loralign.maths.linalg import msign_each
from loralign.maths.lists import by_shape, kept, momentum_like, stacked
from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State


@dataclass(frozen=True)
class MatrixSign:
    momentum: float
    newton_steps: int
    momentum_dtype: MomentumDtype = "float32"
    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "gated", "shapes", "slots"}), transient=2.6)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        state: State = {factor: {} for factor in pair.train}
        for factor in pair.train if self.momentum else ():
            state[factor] = {"momentum": momentum_like(getattr(pair, factor), self.momentum_dtype)}
        return state

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads, state, ctx = group
        sides: list[tuple[str, list[int], Tensor]] = []  # factor, pairs, n of one shape
        for factor in (f for f in "AB" if getattr(grads[0], f) is not None):
            for at in by_shape(pairs):
                g = stacked([getattr(grads[k], factor) for k in at])
                sides.append((factor, at, self._ahead(g, [state[k][factor] for k in at])))
        small: dict[int, list[int]] = {}
        for i, (_, _, n) in enumerate(sides):
            small.setdefault(min(n.shape[-2:]), []).append(i)
        out = [Grad(None, None)] * len(pairs)
        for places in small.values():
            signs = msign_each([sides[i][2] for i in places], steps=self.newton_steps)
            for (factor, at, n), sign in zip((sides[i] for i in places), signs, strict=True):
                rate = -0.2 * max(n.shape[-2:]) ** 0.5 * (ctx.lr_A if factor == "A" else ctx.lr_B)
                for k, own in zip(at, (sign * rate).unbind(), strict=True):
                    out[k] = Grad(own, out[k].B) if factor == "A" else Grad(out[k].A, own)
        return out

    def _ahead(self, g: Tensor, states: Sequence[dict[str, Tensor]]) -> Tensor:
        """n of gradients g (n, rows, columns); the momentum is changed in place."""
        if not self.momentum:
            return g
        m = kept(states, "momentum")
        if m.dtype == g.dtype:
            return torch.lerp(g, m.lerp_(g, 1 - self.momentum), self.momentum)
        now = torch.lerp(m.to(g.dtype), g, 1 - self.momentum)
        m.copy_(now)
        return torch.lerp(g, now, self.momentum)

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Dead and fresh slots start without momentum."""
        gone = [*change.off, *change.fresh, *(to for to, _ in change.copied)]
        for factor, st in state.items():
            if not st:
                continue
            slots = st["momentum"] if factor == "A" else st["momentum"].T
            slots[gone] = 0.0


@bounded
def matrix_sign(
    momentum: Beta = 0.95, newton_steps: Count = 5, momentum_dtype: MomentumDtype = "float32"
) -> MatrixSign:
    """A Muon-like step on each factor."""
    return MatrixSign(momentum, newton_steps, momentum_dtype)


@bounded
def spectral(momentum: Beta = 0.8, newton_steps: Count = 5, momentum_dtype: MomentumDtype = "float32") -> MatrixSign:
    """The same step with the momentum that wide factors like; momentum 0 keeps no state at all."""
    return MatrixSign(momentum, newton_steps, momentum_dtype)
