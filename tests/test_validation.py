"""Rows that a rule decides by: drawn apart from training, and a judgement that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loralign import LoralignError, Recipe, adapt, build, sites
from loralign.evidence import model_loss
from loralign.train.validation import apart, validation_loss
from toy import batch_for, llama


def judge(seed: int = 0) -> Recipe:
    made = build("allocating-lora", {"rows": 8}, r=3, seed=seed, dropout=0.5)
    assert isinstance(made, Recipe)
    return made


def test_no_row_is_learnt_and_decided_by() -> None:
    rows = list(range(20))
    train, deciding = apart(rows, judge())
    assert len(deciding) == 8 and sorted([*train, *deciding]) == rows
    assert (train, deciding) == apart(rows, judge()) != apart(rows, judge(seed=1))
    assert apart(rows, build("lora")) == (rows, None)
    with pytest.raises(LoralignError, match=r"keeps 8 rows apart to decide by, and there are 15"):
        apart(rows[:15], judge())


@pytest.mark.parametrize("fails", [False, True])
def test_a_judgement_switches_slots_off_and_leaves_all_as_it_was(fails: bool) -> None:
    """The loss without slots is that of the model whose columns of B are zero, dropout off."""
    model: Any = adapt(llama(), judge()).train()
    first, second = sites(model)[:2]
    sides = [site.layer.lora_B["default"]._parameters["weight"] for site in (first, second)]  # type: ignore[index]
    for k, B in enumerate(sides):
        B.data.normal_(generator=torch.Generator().manual_seed(k))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    off = {first.name: torch.arange(first.r) != 1, second.name: torch.arange(second.r) == 2}
    masks, calls = [{}, {first.name: off[first.name]}, off], []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 3:
            raise RuntimeError("as a device that is full")
        torch.rand(1)
        return model_loss(model, batch)

    state = torch.get_rng_state()
    losses = validation_loss(model, [batch_for(model)], loss)()["losses"]
    if fails:
        with pytest.raises(RuntimeError, match="as a device"):
            losses(masks)
    else:
        found = losses(masks)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    if not fails:
        model.eval()
        for mask, got in zip(masks, found, strict=True):
            for site, B in zip((first, second), sides, strict=True):
                B.data.copy_(kept[f"base_model.model.{site.name}.lora_B.default.weight"] * mask.get(site.name, 1.0))
            assert got == pytest.approx(float(model_loss(model, batch_for(model)).detach()), rel=1e-6)
        assert len(set(found)) == 3
