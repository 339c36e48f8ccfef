"""SD-LoRA (arXiv 2501.13198) in float64, dense: directions, weights, what distillation drops, ranks that fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def direction(B: Tensor, A: Tensor, epsilon: float = 0.0, norm: str = "product") -> Tensor:
    """D = B·A / √(‖B·A‖² + ε²), or by ‖B‖·‖A‖."""
    length = (B @ A).norm() if norm == "product" else B.norm() * A.norm()
    return B @ A / (length**2 + epsilon**2).sqrt()


def effective(W0: Tensor, directions: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """W0 + Σ α_k·D_k."""
    return W0 + sum((a * D for a, D in zip(alpha, directions, strict=False)), torch.zeros_like(W0))


def distilled(sites: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
    """Per site D_1 … D_t, dense: coefficients of the last in the others, one set for all sites, and the residual² as a
    share of Σ ‖D_t‖²."""
    columns = torch.cat([torch.stack([D.flatten() for D in Ds[:-1]], dim=1) for Ds in sites])
    target = torch.cat([Ds[-1].flatten() for Ds in sites])
    c = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    return c, float((target - columns @ c).square().sum() / target.square().sum())


def rank_of_task(task: int, ranks: Sequence[int], mu: int, nu: int) -> int:
    """Of task 1, 2, …: r_1 up to μ, r_μ up to ν, then r_ν."""
    return ranks[0] if task <= mu else ranks[1] if task <= nu else ranks[2]


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    alpha: Tensor


Batches = Sequence[tuple[Tensor, Tensor]]


def trained(
    weights: Mapping[str, Tensor],
    starts: Sequence[Mapping[str, Tensor]],
    tasks: Sequence[Batches],
    *,
    lr: float,
    magnitude: float,
    epsilon: float,
    norm: str,
    current: str,
) -> Trained:
    """Algorithm 1 on x -> head(tanh(down(tanh(up(x))))) with two classes a task: per task A_t given (`starts`, by
    module) and B_t = 0, Adam on all α, A_t, B_t and the head, cross-entropy among the task's own classes; after it D_t
    is a constant matrix."""
    names = list(starts[0])
    head = {n: weights[f"head.{n}"].clone().requires_grad_() for n in ("weight", "bias")}
    alpha = torch.full((len(tasks),), magnitude, dtype=torch.float64, requires_grad=True)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for t, batches in enumerate(tasks):
        As = {name: starts[t][name].clone().requires_grad_() for name in names}
        Bs = {n: A.new_zeros(weights[f"{n}.weight"].shape[0], A.shape[0]).requires_grad_() for n, A in As.items()}

        def link(name: str, As: Mapping[str, Tensor] = As, Bs: Mapping[str, Tensor] = Bs) -> Tensor:
            return Bs[name] @ As[name] if current == "raw" else direction(Bs[name], As[name], epsilon, norm)

        def moved(name: str, last: Tensor) -> Tensor:
            return effective(weights[f"{name}.weight"], [*kept[name], last], alpha)

        adam = torch.optim.Adam([alpha, *As.values(), *Bs.values(), *head.values()], lr=lr)
        for x, y in batches:
            for name in names:
                x = x @ moved(name, link(name)).T + weights[f"{name}.bias"]
                x = torch.tanh(x)
            own = slice(2 * t, 2 * t + 2)
            logits = (x @ head["weight"].T + head["bias"])[:, own]
            adam.zero_grad()
            torch.nn.functional.cross_entropy(logits, y - 2 * t).backward()
            adam.step()
        for name in names:
            kept[name].append(link(name).detach())
    with torch.no_grad():
        made = {f"{n}.weight": effective(weights[f"{n}.weight"], kept[n], alpha) for n in names}
    return Trained({**made, **{f"head.{n}": p.detach() for n, p in head.items()}}, alpha.detach())
