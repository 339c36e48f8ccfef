"""CoRA: put directions that several models share into one factor, zero into the other; freeze the first or train both.

    left:   B0 = κ·Q,  A0 = 0        right:   A0 = κ·Qᵀ,  B0 = 0        W_eff(0) = W0
    Q (m, r): the first r directions that the sources share (`subspace.py`), filled up to r with the leading singular
    vectors of W0 on that side, made orthogonal to the shared ones

Shapes:  W (d_out, d_in) · A (r, d_in) · B (d_out, r) · m = d_out on the left, d_in on the right
Source:  Xiao et al., "CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models",
         arXiv 2409.02119, abstract: B becomes a common basis, frozen (mode 1) or as a start (mode 2). No official code
         was found.
Unverified: the paper's body could not be read; which models, matrices and decomposition it takes is unknown. The
         consensus of projectors, its null test and the choice of sides are ours.
Differs: A = 0 (forced by W_eff(0) = W0; the paper may keep LoRA's random A). The side is chosen per site where sources
         agree more (the paper: B); for adapters it is B, since A also shares the seed of its start.
Cost:    once: one leading SVD per source matrix, streamed. `common_basis` trains half of LoRA's numbers, with half its
         optimizer state.
Export:  exact; the frozen factor is stored too.
Args:    sources: folders of adapters or checkpoints, or one basis file; () = the layers of the model itself, which the
         log warns of. base: checkpoint that the sources were fine-tuned from. side: auto | left | right; paper left.
         width: directions taken per source, 32. kappa: κ, 1. fill: own (leading vectors of W0) | random.
Example:
    >>> import torch
    >>> from loralign.methods.init.cora import common_basis
    >>> from loralign.types import Directions, Weight
    >>> W, shared = Weight("w", (6, 4), lambda: torch.ones(6, 4)), Directions(torch.eye(6)[:, :2], torch.ones(2), None)
    >>> f = common_basis()(W, 2, 1.0, shared, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> f.train, bool((f.A == 0).all()), torch.equal(f.B.T @ f.B, torch.eye(2))
    ('A', True, True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Positive, bounded
from loralign.maths.linalg import top_svd
from loralign.types import CommonSubspace, Directions, Draw, Facts, LoralignError, Need, Start, Train, Weight

Fill = Callable[[Weight, int, bool, Draw], Tensor]
"""(W, columns, left, draw) -> (m, columns), what is added where too little is shared."""


def _own(W: Weight, columns: int, left: bool, draw: Draw) -> Tensor:
    U, _, V = top_svd(W.read().cpu(), columns, niter=8, generator=draw("cora fill"))
    return U if left else V


def _random(W: Weight, columns: int, left: bool, draw: Draw) -> Tensor:
    return torch.randn(W.shape[0 if left else 1], columns, generator=draw("cora fill"))


FILLS: dict[str, Fill] = {"own": _own, "random": _random}

FROZEN: dict[bool, Train] = {True: "A", False: "B"}
"""Factor that trains beside a frozen basis, by whether the basis is the left one."""
START: dict[bool, Train] = {True: "AB", False: "AB"}


@dataclass(frozen=True)
class CommonBasis:
    facts: ClassVar[Facts] = Facts()
    train: dict[bool, Train]
    fill: Fill
    kappa: float
    needs: Need

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        most = min(d_out, d_in)
        return "" if r <= most else f"it can start {most} slots at most"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        if evidence is None:
            raise LoralignError(f"cora has no common subspace for {W.name}")
        left = evidence.U is not None
        Q = evidence.U if evidence.U is not None else evidence.V
        assert Q is not None
        Q = self.kappa * self._filled(Q[:, :r], W, r, left, draw)
        if left:
            return Start(torch.zeros(r, d_in), Q.contiguous(), train=self.train[True])
        return Start(Q.T.contiguous(), torch.zeros(d_out, r), train=self.train[False])

    def _filled(self, Q: Tensor, W: Weight, r: int, left: bool, draw: Draw) -> Tensor:
        """Q (m, n ≤ r) orthonormal, extended to r orthonormal columns; Q itself where it has them."""
        if Q.shape[1] == r:
            return Q
        more = self.fill(W, r, left, draw).to(Q)
        for _ in range(2):  # once leaves what rounding brings back
            more = more - Q @ (Q.T @ more)
        fresh = torch.linalg.vector_norm(more, dim=0) > 0.1  # those that Q holds already come last
        order = torch.argsort(fresh.to(torch.int8), descending=True, stable=True)
        added = torch.linalg.qr(more[:, order[: r - Q.shape[1]]]).Q
        return torch.cat([Q, added - Q @ (Q.T @ added)], dim=1)


def _made(
    train: dict[bool, Train],
    sources: str | Sequence[str],
    base: str | None,
    side: str,
    width: int,
    kappa: float,
    fill: str,
) -> CommonBasis:
    if side not in ("auto", "left", "right") or fill not in FILLS:
        raise LoralignError("side is auto, left or right; fill is own or random")
    named = (sources,) if isinstance(sources, str) else tuple(str(s) for s in sources)
    if base and not named:
        raise LoralignError("`base` is what the sources were fine-tuned from: name them in `sources`, or leave it out")
    needs = CommonSubspace(named, base, side, width)  # type: ignore[arg-type]
    return CommonBasis(train, FILLS[fill], kappa, needs)


@bounded
def common_basis(
    sources: str | Sequence[str] = (),
    *,
    base: str | None = None,
    side: str = "auto",
    width: Count = 32,
    kappa: Positive = 1.0,
    fill: str = "own",
) -> CommonBasis:
    """CoRA's first mode: the common factor stays as it is, the other one trains."""
    return _made(FROZEN, sources, base, side, width, kappa, fill)


@bounded
def common_start(
    sources: str | Sequence[str] = (),
    *,
    base: str | None = None,
    side: str = "auto",
    width: Count = 32,
    kappa: Positive = 1.0,
    fill: str = "own",
) -> CommonBasis:
    """CoRA's second mode: the common factor is a start, both train."""
    return _made(START, sources, base, side, width, kappa, fill)
