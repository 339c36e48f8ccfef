"""The types hold every kind of method: one throw-away stub per kind, each a single class outside the library.

A gated form, a one-sided pair, a chain that commits live slots, a rule that kills slots (ragged ranks) and one that
copies them. Each trains under the Trainer, loads in stock PEFT, and stops and resumes bit-exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loralign import LoralignError, adapt, build, drive, factors, optimizer, peft_config, sites
from loralign.maths.operators import Dense
from loralign.optim.values import live_pairs
from loralign.train.attach import attach
from loralign.types import (
    NOTHING,
    Copy,
    Ctx,
    Directions,
    Draw,
    Episode,
    Facts,
    Joint,
    Live,
    Moment,
    Need,
    Off,
    On,
    Operator,
    Plan,
    Recipe,
    RuleNeed,
    RuleState,
    SiteShape,
    Stack,
    Start,
    Unborn,
    Validation,
    Weight,
    WorkFailed,
)
from toy import batch_for, llama
from trainers import toy_trainer

STEPS = 6


@dataclass(frozen=True)
class Gated:
    """W_eff = W0 + s·B·diag(c)·A with a trained gate c, 0.5 at the start."""

    facts: ClassVar[Facts] = Facts(gated=True, commits=True, per_slot=frozenset({"gate"}))

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {"gate": torch.full((r,), 0.5)}

    def constants(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    def shared(self) -> Mapping[str, Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        return Dense(torch.cat([own.A, own.A0])), Dense(torch.cat([own.B * own.own["gate"], own.B0], dim=1))


@dataclass(frozen=True)
class Shared:
    """W_eff = W0 + s·α·B·A with one trained α for the whole model."""

    facts: ClassVar[Facts] = Facts(own_lr=2.0)

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    constants = trained

    def shared(self) -> Mapping[str, Tensor]:
        return {"alpha": torch.ones(())}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        return Dense(own.A), Dense(own.B * own.shared["alpha"])


@dataclass(frozen=True)
class BorrowB:
    """A cross-layer form: each module adds the factors of the one before it."""

    facts: ClassVar[Facts] = Facts(cross_layer=True)

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    constants = trained

    def shared(self) -> Mapping[str, Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        kind = name.rsplit(".", 1)[-1]
        chain = [n for n in sites if n.endswith(kind)]
        return chain[: chain.index(name)][-1:]

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        A, B = torch.cat([own.A, *(o.A for o in others)]), torch.cat([own.B, *(o.B for o in others)], dim=1)
        return Dense(A), Dense(B)


@dataclass(frozen=True)
class OneSided:
    """B constant and orthonormal, A = 0 trains."""

    needs: Need = NOTHING
    facts: ClassVar[Facts] = Facts()

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        B, _ = torch.linalg.qr(torch.randn(W.shape[0], r, generator=draw("one-sided")))
        return Start(torch.zeros(r, W.shape[1]), B, train="A")


@dataclass(frozen=True)
class Links:
    """A chain: every `length` steps the live slots become frozen ones."""

    length: int = 2
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        if index * self.length >= total_steps:
            return None
        return Episode(index, self.length, warm_up_steps=2)


class NoMasks:
    needs: RuleNeed = NOTHING
    facts = Facts(events=True, allocates=True)

    def init(self, sites: Sequence[SiteShape], total_steps: int) -> RuleState:
        return {}

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return None

    grad_mask = update_mask = penalty


class Kill(NoMasks):
    """Slots 0 and 1 of the first site die after step 2: ragged ranks."""

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        return state, (Off(moment.sites[0].name, (0, 1)),) if moment.step == 2 else None


class CopySlots(NoMasks):
    """After step 4 slot 0 of every site is overwritten by slot 1 as it was after step 2, which its state remembers."""

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 2:
            state |= {f"then|{site}|{name}": value.clone() for (site, name), value in moment.tensors.items()}
        return state, tuple(Copy(s.name, (0,), (1,), "then") for s in moment.sites) if moment.step == 4 else None


class Judge(NoMasks):
    """Slot 2 waits unborn. After step 4 the first site's slot whose loss without it is lowest dies, slot 2 is born."""

    needs: RuleNeed = Validation(4)

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        first = moment.sites[0].name
        if moment.step == 0:
            return state, (Unborn(first, (2,)),)
        if moment.step != 4:
            return state, None
        assert moment.losses is not None
        losses = moment.losses([{first: torch.arange(3) != k} for k in range(2)])
        state["losses"] = torch.tensor(losses)
        return state, (Off(first, (losses.index(min(losses)),)), On(first, (2,)))


def stub(kind: str) -> Recipe:
    base = build("lora", r=3, alpha=6, seed=5)
    assert isinstance(base, Recipe)
    changes: dict[str, dict[str, Any]] = {
        "gated": {"form": Gated()},
        "cross-layer": {"form": BorrowB()},
        "one-sided": {"init": OneSided()},
        "chain": {"outer": Links()},
        "kill": {"rules": (Kill(),)},
        "copy": {"rules": (CopySlots(),)},
        "shared": {"form": Shared()},
        "judge": {"rules": (Judge(),)},
    }
    return replace(base, name=f"stub {kind}", **changes[kind])


KINDS = ("gated", "cross-layer", "one-sided", "chain", "kill", "copy", "shared", "judge")


def run(folder: Path, recipe: Recipe, resume: Path | None = None) -> Any:
    trainer = toy_trainer(folder, peft_config(recipe, llama()), steps=STEPS, save_steps=3)
    rows = [batch_for(llama(), seed=50)] if "judge" in recipe.name else None
    callback = attach(trainer, recipe, resume_from=resume, validation=rows)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model, callback


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch_for(model)).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stub_trains_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    model, callback = run(tmp_path / "whole", stub(kind))
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

    again, resumed = run(tmp_path / "resumed", replace(stub(kind), seed=99), resume=tmp_path / "whole" / "checkpoint-3")
    dead, whole = (c.optimizer.dead for c in (resumed, callback))
    assert bool(whole) == (kind == "kill") or kind == "judge"
    assert {n: mask.tolist() for n, mask in dead.items()} == {n: mask.tolist() for n, mask in whole.items()}
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if kind not in ("chain", "judge") or "lora_" not in name:  # what comes alive later is drawn with the other seed
            assert torch.equal(p, q), name


def test_chain_resumes_with_its_own_seed(tmp_path: Path) -> None:
    model, callback = run(tmp_path / "whole", stub("chain"))
    again, _ = run(tmp_path / "resumed", stub("chain"), resume=tmp_path / "whole" / "checkpoint-3")
    assert torch.equal(logits(model), logits(again))
    assert {factors(site)[0].shape[0] for site in sites(model)} == {9}  # three links of rank 3
    assert callback.driver.episodes.position == (2, 4)


@pytest.mark.parametrize("kind", ["chain", "gated chain", "twin chain"])
def test_a_knot_does_not_move_the_function(kind: str) -> None:
    """What a form makes of its live slots is committed, gates and twins included; then all of it starts again."""
    made = replace(stub("chain"), max_grad_norm=0.0)
    if kind == "gated chain":
        made = replace(made, form=Gated())
    if kind == "twin chain":
        made = replace(made, init=build("pissa").init)  # type: ignore[union-attr]
    model = adapt(llama(), made)
    opt = optimizer(model, made, 3e-2)
    driver = drive(model, made, opt, STEPS)
    for step in range(STEPS):
        model.train()
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        opt.zero_grad()
        before = logits(model)
        driver.after_step()
        after = logits(model)
        assert (after - before).norm() <= 2e-6 * before.norm(), step
        for pair in opt.values.pairs(live_pairs(opt.param_groups), {}) if kind == "twin chain" else ():
            A, B = factors(opt.sites[pair.name])  # [ΔA; A0; links], s·[B0 + ΔB | ΔB | links]
            torch.testing.assert_close(pair.A, A[: made.r] + A[made.r : 2 * made.r])
            torch.testing.assert_close(pair.s * pair.B, B[:, : made.r])
    site = sites(model)[0]
    assert site.layer.lora_variant["default"].links == ((6, 6) if kind == "twin chain" else (3, 3))
    assert factors(site)[0].shape[0] == (18 if kind == "twin chain" else 9)
    assert (logits(model) - logits(llama())).norm() > 1e-2 * logits(llama()).norm()


def test_a_rule_that_needs_validation_losses_is_asked_for_them(tmp_path: Path) -> None:
    """Slot 2 waits until one of the others dies; losses with a slot off are those of the model without it."""
    with pytest.raises(LoralignError, match=r"validation=batches"):
        attach(toy_trainer(tmp_path / "none", peft_config(stub("judge"), llama()), steps=1), stub("judge"))
    model, callback = run(tmp_path / "whole", stub("judge"))
    again, resumed = run(tmp_path / "resumed", stub("judge"), resume=tmp_path / "whole" / "checkpoint-3")
    assert torch.equal(logits(model), logits(again))
    first = sites(model)[0].name
    losses = callback.optimizer.rule_states[0]["losses"]
    assert torch.equal(losses, resumed.optimizer.rule_states[0]["losses"]) and losses[0] != losses[1]
    assert callback.optimizer.dead[first].tolist() == [k == int(losses.argmin()) for k in range(2)] + [False]
    assert callback.driver.changes == [(0, 1), (4, 1)] and resumed.driver.changes == [(4, 1)]
    earlier = PeftModel.from_pretrained(llama(), tmp_path / "whole" / "checkpoint-3")
    assert not earlier.get_submodule(f"base_model.model.{first}").lora_B["default"].weight[:, 2].any()


def test_one_tensor_of_the_model_trains_once_at_the_rate_that_the_form_says(tmp_path: Path) -> None:
    model, callback = run(tmp_path / "run", stub("shared"))
    alpha = model.base_model.lora_shared["alpha"]
    (group,) = [g for g in callback.optimizer.param_groups if g["role"] == "form"]
    assert group["params"] == [alpha] and group["initial_lr"] == 2.0 * callback.optimizer.param_groups[0]["initial_lr"]
    assert alpha.item() != 1.0


def test_dead_slots_stay_dead_and_others_train(tmp_path: Path) -> None:
    model, callback = run(tmp_path / "run", stub("kill"))
    first, second = sites(model)[:2]
    A, B = factors(first)
    assert not A[:2].any() and not B[:, :2].any() and A[2].any() and B[:, 2].any()
    assert factors(second)[1].any(dim=0).all()
    assert callback.optimizer.dead[first.name].tolist() == [True, True, False]


def test_an_init_that_moves_the_model_away_from_its_base_is_refused() -> None:
    class Moves(OneSided):
        def __call__(self, *given: Any) -> Start:
            start = super().__call__(*given)
            return replace(start, A=torch.ones_like(start.A)) if given[0].name.endswith("down_proj") else start

    with pytest.raises(WorkFailed, match=r"moves model\.layers\.0\.mlp\.down_proj away from W0 without a twin"):
        adapt(llama(), replace(stub("one-sided"), init=Moves()))


def test_one_sided_factor_never_moves(tmp_path: Path) -> None:
    recipe = stub("one-sided")
    model, callback = run(tmp_path / "run", recipe)
    site = sites(model)[0]
    B = site.layer.lora_B["default"].weight
    start = OneSided()(Weight(site.name, (site.d_out, site.d_in), lambda: B), 3, 1.0, None, draw(recipe, site.name)).B
    assert torch.equal(B.detach(), start) and not B.requires_grad
    B_group = next(g for g in callback.optimizer.param_groups if g["role"] == "B")
    assert not any(callback.optimizer.state[p] for p in B_group["params"])
    model.set_adapter("default")
    assert not site.layer.lora_B["default"].weight.requires_grad


def draw(recipe: Recipe, name: str) -> Draw:
    from loralign.carrier.sites import draw_for

    return draw_for(recipe.seed, name)
