"""The types hold every kind of method: one throw-away stub per kind, each a single class outside the library.

A gated form, a one-sided pair, a chain that commits live slots, a rule that kills slots (ragged ranks) and one that
copies them. Each trains under the Trainer, loads in stock PEFT, and stops and resumes bit-exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loralign import build, factors, peft_config, sites
from loralign.train.attach import attach
from loralign.types import (
    NOTHING,
    Directions,
    Draw,
    Episode,
    Factors,
    Live,
    Moment,
    Need,
    Plan,
    Recipe,
    SlotPlan,
    Weight,
)
from toy import batch_for, llama
from trainers import toy_trainer

STEPS = 6


@dataclass(frozen=True)
class Gated:
    """W_eff = W0 + s·B·diag(c)·A with a trained gate c, 0.5 at the start."""

    identity: bool = False
    exact: bool = True

    def extra(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {"gate": torch.full((r,), 0.5)}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()

    def effective(self, own: Live, others: Sequence[Live]) -> tuple[Tensor, Tensor]:
        return own.A, own.B * own.extra["gate"]


@dataclass(frozen=True)
class BorrowB:
    """A cross-layer form: each module adds the factors of the one before it."""

    identity: bool = False
    exact: bool = True

    def extra(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        kind = name.rsplit(".", 1)[-1]
        chain = [n for n in sites if n.endswith(kind)]
        return chain[: chain.index(name)][-1:]

    def effective(self, own: Live, others: Sequence[Live]) -> tuple[Tensor, Tensor]:
        return torch.cat([own.A, *(o.A for o in others)]), torch.cat([own.B, *(o.B for o in others)], dim=1)


@dataclass(frozen=True)
class OneSided:
    """B constant and orthonormal, A = 0 trains."""

    needs: Need = NOTHING

    def largest_rank(self, d_out: int, d_in: int) -> int | None:
        return d_out

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Factors:
        B, _ = torch.linalg.qr(torch.randn(W.shape[0], r, generator=draw("one-sided")))
        return Factors(torch.zeros(r, W.shape[1]), B, train="A")


@dataclass(frozen=True)
class Links:
    """A chain: every `length` steps the live slots become frozen ones."""

    length: int = 2

    def episode(self, index: int, total_steps: int, sites: Sequence[str]) -> Episode | None:
        if index * self.length >= total_steps:
            return None
        return Episode(index, self.length, warm_up_steps=1)


class NoMasks:
    needs: Need = NOTHING

    def penalty_grad(self, pairs: Any, ctx: Any) -> None:
        return None

    grad_mask = update_mask = penalty_grad

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert not state


class Kill(NoMasks):
    """Slots 0 and 1 of the first site die after step 2: ragged ranks."""

    def event(self, moment: Moment) -> Plan | None:
        return {moment.pairs[0].name: SlotPlan(off=(0, 1))} if moment.step == 2 else None


class Copy(NoMasks):
    """After step 3 slot 0 of every site is overwritten by slot 1; counts its events, so it has state."""

    def __init__(self) -> None:
        self.events = torch.zeros(())

    def event(self, moment: Moment) -> Plan | None:
        if moment.step != 3:
            return None
        self.events += 1
        return {p.name: SlotPlan(copy=((0, 1),)) for p in moment.pairs}

    def state_dict(self) -> dict[str, Tensor]:
        return {"events": self.events}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.events = state["events"].clone()


def stub(kind: str) -> Recipe:
    base = build("lora", r=3, alpha=6, seed=5)
    assert isinstance(base, Recipe)
    changes: dict[str, dict[str, Any]] = {
        "gated": {"form": Gated()},
        "cross-layer": {"form": BorrowB()},
        "one-sided": {"init": OneSided()},
        "chain": {"outer": Links()},
        "kill": {"rules": (Kill(),)},
        "copy": {"rules": (Copy(),)},
    }
    return replace(base, name=f"stub {kind}", **changes[kind])


KINDS = ("gated", "cross-layer", "one-sided", "chain", "kill", "copy")


def run(folder: Path, recipe: Recipe, resume: Path | None = None) -> Any:
    trainer = toy_trainer(folder, peft_config(recipe, llama()), steps=STEPS, save_steps=3)
    callback = attach(trainer, recipe, resume_from=resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model, callback


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch_for(model)).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stub_trains_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    model, _ = run(tmp_path / "whole", stub(kind))
    out = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))  # W0 was never written
    assert (out - logits(llama())).abs().max() > 1e-3

    for step in (3, STEPS):  # any checkpoint is an adapter for stock PEFT
        stock = PeftModel.from_pretrained(llama(), tmp_path / "whole" / f"checkpoint-{step}")
        if step == STEPS:
            assert (logits(stock) - out).norm() / out.norm() < 1e-6
    for site in sites(model):
        A, B = factors(site)
        assert torch.allclose(B @ A, site.layer.get_delta_weight("default").detach(), atol=1e-6)

    again, _ = run(tmp_path / "resumed", replace(stub(kind), seed=99), resume=tmp_path / "whole" / "checkpoint-3")
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if kind != "chain" or "lora_" not in name:  # a chain's later links are drawn with the other seed
            assert torch.equal(p, q), name


def test_chain_resumes_with_its_own_seed(tmp_path: Path) -> None:
    model, callback = run(tmp_path / "whole", stub("chain"))
    again, _ = run(tmp_path / "resumed", stub("chain"), resume=tmp_path / "whole" / "checkpoint-3")
    assert torch.equal(logits(model), logits(again))
    assert {factors(site)[0].shape[0] for site in sites(model)} == {9}  # three links of rank 3
    assert callback.episodes.position == (2, 4)


def test_dead_slots_stay_dead_and_others_train(tmp_path: Path) -> None:
    model, callback = run(tmp_path / "run", stub("kill"))
    first, second = sites(model)[:2]
    A, B = factors(first)
    assert not A[:2].any() and not B[:, :2].any() and A[2].any() and B[:, 2].any()
    assert factors(second)[1].any(dim=0).all()
    assert callback.optimizer.dead[first.name].tolist() == [True, True, False]


def test_one_sided_factor_never_moves(tmp_path: Path) -> None:
    recipe = stub("one-sided")
    model, callback = run(tmp_path / "run", recipe)
    site = sites(model)[0]
    B = site.layer.lora_B["default"].weight
    start = OneSided()(Weight(site.name, (site.d_out, site.d_in), lambda: B), 3, 1.0, None, draw(recipe, site.name)).B
    assert torch.equal(B.detach(), start) and not B.requires_grad
    assert {g["role"] for g in callback.optimizer.param_groups} == {"A"}
    model.set_adapter("default")
    assert not site.layer.lora_B["default"].weight.requires_grad


def draw(recipe: Recipe, name: str) -> Draw:
    from loralign.carrier.sites import draw_for

    return draw_for(recipe.seed, name)
