"""A link that the links before it make up already: their weights take it over, and it need not be kept.

min_c Σ_sites ‖D_t − Σ_{k<t} c_k·D_k‖²        G·c = g,  G_kl = Σ ⟨D_k, D_l⟩,  g_k = Σ ⟨D_k, D_t⟩
w_k ← w_k + c_k·w_t,  w_t ← its value at the start          where what is left is at most `most`·Σ ‖D_t‖²
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralign.carrier.slot import form_of, live_of, whole

Factors = tuple[Tensor, Tensor]


def gram_of(sites: Sequence[Sequence[Factors]]) -> Tensor:
    """⟨D_k, D_l⟩ summed over sites, in float64 on the CPU: per site the links as (A_k, B_k), D_k = B_k·A_k."""
    total = torch.zeros(())
    for links in sites:
        A, B = torch.cat([a for a, _ in links]), torch.cat([b for _, b in links], dim=1)
        slots = (B.T @ B) * (A @ A.T)
        owner = torch.cat([torch.full((a.shape[0],), k) for k, (a, _) in enumerate(links)])
        part = nn.functional.one_hot(owner, len(links)).to(slots)
        total = total + part.T @ slots @ part
    return total


def combination(gram: Tensor) -> tuple[Tensor, float]:
    """Of the last direction: coefficients of the others in it, and the share of its norm² that they leave."""
    G, g, square = gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1])
    c = torch.linalg.lstsq(G, g[:, None], driver="gelsd").solution[:, 0]
    left = square - 2 * float(c @ g) + float(c @ G @ c)
    return c, max(0.0, left) / square if square else 0.0


@torch.no_grad()
def absorb(layers: Sequence[Any], adapter: str, most: float) -> bool:
    """Whether the live link was taken over; the weights of the form are then changed. Not where it is the first."""
    form = form_of(layers[0], adapter)
    if form is None or form.facts.link is None or not live_of(layers[0], adapter).links:
        return False
    c, left = combination(gram_of([_links(layer, adapter) for layer in layers]))
    if left > most:
        return False
    name, t = form.facts.weights, len(c)
    w = live_of(layers[0], adapter).shared[name]
    w[:t] += c.to(w) * w[t]
    w[t] = form.shared()[name][t].to(w)
    return True


def _links(layer: Any, adapter: str) -> list[Factors]:
    """The committed links of a layer and its live one, in float64 on the CPU."""
    live, form = live_of(layer, adapter), form_of(layer, adapter)
    assert form is not None and form.facts.link is not None
    full = live._replace(A=whole(live.A).double(), B=whole(live.B).double())
    A0, B0 = (whole(t).cpu().double() for t in (live.A0, live.B0))
    kept = zip(A0.split(list(live.links)), B0.split(list(live.links), dim=1), strict=True)
    A, B = form.facts.link(full)
    return [*kept, (A.cpu(), B.cpu())]
