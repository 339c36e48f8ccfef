"""Transforms on gradients of a real model, from B = 0, beside the papers' algorithms in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cached_assets import asset, needs
from loralign import Recipe, adapt, build, optimizer, sites
from loralign.methods.transform.lora_pro import closest
from loralign.optim.pairs import PairOptimizer
from loralign.types import Site
from oracles import lora_pro, lora_rite

pytestmark = [pytest.mark.assets, needs("smollm2-2layer")]
RATE, STEPS = 3e-4, 5
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Step = tuple[PairOptimizer, dict[str, Site], dict[str, Four]]


def training(name: str, dtype: torch.dtype = torch.float32) -> Iterator[Step]:
    """Before each step: the optimizer, the sites, and A, B, gA, gB of every site in float64."""
    made = build(name, r=8, alpha=16.0)
    assert isinstance(made, Recipe)
    model = adapt(AutoModelForCausalLM.from_pretrained(asset("smollm2-2layer"), dtype=dtype), made).to(dtype)
    stepper, found = optimizer(model, made, RATE), {site.name: site for site in sites(model)}
    for t in range(STEPS):
        ids = torch.randint(0, 20_000, (2, 32), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        yield stepper, found, {n: numbers(s) for n, s in found.items()}
        stepper.zero_grad()


def numbers(site: Site) -> Four:
    A, B = (getattr(site.layer, f"lora_{side}")[site.adapter].weight for side in "AB")
    return tuple(t.detach().double().clone() for t in (A, B, A.grad, B.grad))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-10), (torch.float32, 1e-2)])
def test_rite_moves_every_product_as_the_paper_says(dtype: torch.dtype, share: float) -> None:
    """A jumps by O(1) at the second step, moments move to new bases. Of a step of B·A fp32 loses up to 3e-3 to rounding
    (4e-12 in float64)."""
    theirs: dict[str, lora_rite.Rite] = {}
    for stepper, found, values in training("lora-rite", dtype):
        for name in found:
            theirs.setdefault(name, lora_rite.Rite(RATE))
        norm = sum(theirs[name].norm(*four) for name, four in values.items()) ** 0.5
        stepper.step()
        for name, (A, B, gA, gB) in values.items():
            dA, dB = theirs[name].step(A, B, gA, gB, scale=min(1.0, 1.0 / norm))
            A1, B1, *_ = numbers(found[name])
            want = (B + dB) @ (A + dA) - B @ A
            assert (B1 @ A1 - B @ A - want).norm() < share * want.norm(), name


def test_pro_adjusts_real_gradients_as_published() -> None:
    for t, (stepper, found, values) in enumerate(training("lora-pro")):
        stepper.step()
        if t < 2:
            continue  # B is 0, then of the size of the damping
        for name, four in values.items():
            A, B, gA, gB = (x.float()[None] for x in four)
            mine = closest(A, B, gA, gB, found[name].s, damping=0.0, floor=1e-8)
            for x, y in zip(mine, lora_pro.published(*four, found[name].s), strict=True):
                assert x is not None and (x[0].double() - y).norm() < 1e-3 * y.norm(), name
