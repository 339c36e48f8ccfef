"""Rules that decide which slots live: exact counts, laws, AdaLoRA against its oracle and where PEFT's goes wrong."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from loralign import LoralignError, Recipe, adapt, build, drive, factors, optimizer, peft_config, sites
from loralign.carrier.slot import trained_of
from loralign.io.adalora import is_adalora, write_plain
from loralign.io.export import export
from loralign.maths.budget import Window, cubic_budget, cubic_pruned, lowest, narrowed, widened, window
from loralign.methods.rule.adalora import Orthogonal, sensitivity
from loralign.methods.rule.combine import lowest_in, slots_of
from loralign.methods.rule.dynamic_rank import Variance
from loralign.methods.rule.dynamic_rank import shares as component_shares
from loralign.methods.rule.sora import SoftThreshold
from loralign.plan.combinations import check_combination
from loralign.plan.course import check_length, idle
from loralign.train.attach import attach
from loralign.train.driver import Driver
from loralign.train.rank_log import RankLog
from loralign.types import Ctx, Facts, Moment, Plan, RuleState, Stack, WorkFailed
from oracles import adalora, dynamic_rank_lora, sora
from planted import RANKS as PLANTED
from planted import SETTINGS, planted
from short_runs import driven
from stacking import by_name, stacks_of
from toy import batch_for, llama
from trainers import toy_trainer


class Toy(nn.Module):
    """Three maps of two shapes, tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return out


def made(name: str = "adalora", r: int = 4, **options: Any) -> Recipe:
    recipe = build(name, options, r=r, alpha=2.0 * r, targets=("one", "two", "three"), max_grad_norm=0.0)
    assert isinstance(recipe, Recipe)
    return recipe


def toy(recipe: Recipe) -> PeftModel:
    """Float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return adapt(Toy(), recipe).double()


def backward(model: Any, t: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(100 + t)
    x = torch.randn(16, 8, generator=g, dtype=torch.float64)
    y = torch.stack([x[:, :5].sin().sum(1) * (k + 1) for k in range(5)], dim=1)
    for p in model.parameters():
        p.grad = None
    loss: Tensor = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def gates(model: Any) -> dict[str, Tensor]:
    return {s.name: trained_of(s.layer, s.adapter)["gate"].detach().clone() for s in sites(model)}


def zeros(model: Any) -> set[tuple[str, int]]:
    return {(name, j) for name, c in gates(model).items() for j in (c == 0).nonzero().flatten().tolist()}


# --------------------------------------------------------------------------------------------------- counts and laws


def test_exact_counts_whatever_the_ties() -> None:
    scores = {name: torch.zeros(4) for name in ("b", "a", "c")}
    assert lowest(scores, 0) == {} and lowest(scores, 12) == {n: (0, 1, 2, 3) for n in "abc"}
    assert lowest(scores, 5) == {"b": (3,), "c": (0, 1, 2, 3)}  # names in order, later ones first to go
    draw = random.Random(0)
    for _ in range(50):
        found = {n: torch.tensor([draw.randint(0, 3) for _ in range(draw.randint(1, 5))]) for n in ("x", "y", "z")}
        count = draw.randint(0, sum(map(len, found.values())))
        got = {(n, j) for n, at in lowest(found, count).items() for j in at}
        assert got == adalora.dropped({n: [float(v) for v in s] for n, s in found.items()}, count)
    with pytest.raises(WorkFailed, match="not finite"):
        lowest({"a": torch.tensor([1.0, float("nan")])}, 1)


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_scores_that_are_not_finite_end_the_run_in_the_middle_of_its_window(late: bool) -> None:
    """An overflow, which no norm of a gradient shows. late: as on a GPU, when the next step begins."""
    recipe = made(interval=1)
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    opt.norms.late = late
    driver = drive(model, recipe, opt, 20)
    settles = recipe.rules[0].law.window(20).stop  # type: ignore[attr-defined]
    for t in range(20):
        if t == 8:
            for key, average in opt.rule_states[0].items():
                average.fill_(1e200 if key.startswith(("mean|", "spread|")) else 0)
        backward(model, t)
        before = gates(model)
        try:
            opt.step()
            driver.after_step()
        except WorkFailed as error:
            assert str(error).startswith("the scores of the slots are not finite")
            break
    assert t == (9 if late else 8) < settles
    assert not late or all(torch.equal(before[n], c) for n, c in gates(model).items())


def test_slots_of_stacks_count_in_the_order_of_the_names() -> None:
    """The stacks of a run lie in the order of shapes and modules."""
    stacks = [Stack("4", ("d", "b"), 2, {}), Stack("5", ("c", "a"), 3, {})]
    found = slots_of(stacks, [torch.arange(4).view(2, 2), torch.arange(10, 16).view(2, 3)])
    assert list(found) == ["a", "b", "c", "d"] and len(found) == 4
    by_hand = {"d": [0, 1], "b": [2, 3], "c": [10, 11, 12], "a": [13, 14, 15]}
    assert {name: row.tolist() for name, row in found.items()} == by_hand
    assert lowest(found, 5) == {"b": (0, 1), "c": (0,), "d": (0, 1)}
    ties = slots_of(stacks, [torch.zeros(2, 2), torch.zeros(2, 3)])
    assert lowest(ties, 3) == {"c": (2,), "d": (0, 1)}
    for scores in (found, ties):  # where they lie, and of a mapping on the host
        for count in range(11):
            for given in (scores, dict(scores)):
                off = lowest_in(stacks, given, count)
                rows = {s: m.nonzero().flatten() for st in stacks for s, m in zip(st.sites, off[st.key], strict=True)}
                assert {s: tuple(at.tolist()) for s, at in rows.items() if len(at)} == lowest(scores, count)


def test_a_factor_without_a_gradient_has_a_gradient_of_zero() -> None:
    """As an expert that no token came to; its neighbours of the same shape keep theirs."""
    recipe = made()
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    backward(model)
    one = sites(model)[0]
    trained_of(one.layer, one.adapter)["gate"].grad = None
    stack = next(s for s in opt.moment().stacks if one.name in s.sites)
    assert len(stack.sites) == 2
    for site, row in zip(stack.sites, stack.grads["gate"], strict=True):
        assert bool(row.any()) == (site != one.name)


def test_budgets() -> None:
    w = Window(100, 800, 1, 1000)
    want = {100: 120, 101: 119, 110: 118, 200: 105, 450: 85, 600: 80, 801: 80}
    assert {t: cubic_budget(t, w, 120, 80) for t in want} == want
    assert want == {t: adalora.budget(t, 1000, 120, 80, 100, 200) for t in want}
    course = [cubic_budget(t, w, 120, 80) for t in range(1000)]
    assert course == sorted(course, reverse=True)
    w = Window(150, 500, 100, 1000)
    assert [120 - cubic_pruned(t, w, 120, 80) for t in (150, 200, 300, 400, 500)] == [0, 0, 3, 14, 40]
    assert [t for t in range(1000) if w.due(t)] == [200, 300, 400, 500]
    for ratio in (1.0, 1.1, 1.3, 1.5, 2.0, 2.7):
        assert all(narrowed(widened(r, ratio), ratio) == r for r in range(1, 200))
    assert (widened(8, 1.5), widened(3, 1.5), widened(10, 1.1)) == (12, 5, 11)


def test_a_run_without_room_for_the_schedule_is_refused_beforehand(tmp_path: Path) -> None:
    assert window(3, 0.1, 0.3, None) == Window(0, 2, 1, 3)
    said = "adalora: its budget shrinks between 10% and 70% of the run, and 1 optimizer steps leave no step in between"
    assert idle(made(), 1).startswith(said) and idle(made(), 3) == "" and idle(made(), None) == ""
    check_length(made(), None)
    with pytest.raises(LoralignError, match="its budget shrinks"):
        check_length(made(), 1)
    with pytest.raises(LoralignError, match="its budget shrinks"):
        drive(toy(made()), made(), optimizer(toy(made()), made(), 1e-2), 1)
    recipe = build("adalora", r=2)
    assert isinstance(recipe, Recipe)
    with pytest.raises(LoralignError, match="its budget shrinks"):
        attach(toy_trainer(tmp_path, peft_config(recipe, llama()), steps=1), recipe)
    with pytest.raises(LoralignError, match=r"leave nothing: lower them"):
        made(first=0.5, last=0.5)


@dataclass(frozen=True)
class Late(SoftThreshold):
    """A schedule that was to act after step 3, and does not."""

    @property
    def facts(self) -> Facts:
        return Facts(events=True, acts_by=lambda total_steps: 3)

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        return state, None


def test_a_schedule_that_never_acts_is_an_error_at_the_end_of_its_window() -> None:
    recipe = replace(made("sora"), rules=(Late(0.1, 0.0),))
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, 8)
    for t in range(3):
        backward(model, t)
        opt.step()
        if t < 2:
            driver.after_step()
    with pytest.raises(WorkFailed, match="was to act by step 3, and nothing happened"):
        driver.after_step()


def test_skipped_steps_that_put_the_end_of_a_schedule_out_of_reach_are_an_error() -> None:
    """The budget of 10 steps is settled after the eighth, so that two may be skipped."""
    recipe = made()
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, 10)
    for step in range(1, 3):
        driver.skipped_step()
        driver.end_step(step)
    backward(model)
    opt.step()
    driver.after_step()
    driver.skipped_step()
    with pytest.raises(WorkFailed, match=r"overflowed at 3 of 4 steps, so the 8 steps that its schedule needs"):
        driver.end_step(4)


def test_a_run_that_is_stopped_before_its_budget_is_settled_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = build("adalora", r=2, alpha=4.0, targets=("q_proj",))
    assert isinstance(recipe, Recipe)
    trainer = toy_trainer(tmp_path, peft_config(recipe, llama()), steps=10)
    attach(trainer, recipe)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(Stop())
    with caplog.at_level("WARNING", "loralign"):
        trainer.train()
    assert "its schedule acts until step 8, and 3 were taken" in caplog.text


@pytest.mark.parametrize("other", ["lora-pro", "lora-rite", "riemannian", "lora-fa"])
def test_a_learned_gate_is_refused_where_the_transform_does_not_know_it(other: str) -> None:
    recipe = build(f"adalora + {other}") if other != "lora-fa" else None
    if recipe is None:
        recipe = replace(made(), transform=build("lora-fa").transform)  # type: ignore[union-attr]
    assert isinstance(recipe, Recipe)
    with pytest.raises(LoralignError, match="a trained gate stands between A and B"):
        check_combination(recipe)


def test_other_combinations_that_are_refused() -> None:
    with pytest.raises(LoralignError, match="two rules would decide about the same slots"):
        check_combination(replace(made(), rules=made().rules * 2))
    with pytest.raises(LoralignError, match="its rule switches slots by a trained gate, which this form does not have"):
        check_combination(replace(made(), form=build("lora").form, init=build("lora").init))  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------ AdaLoRA


def test_constant_sensitivity_earns_less_and_less() -> None:
    mean, spread = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    one, found = [torch.ones(1, dtype=torch.float64)], {}
    for n in range(1, 41):
        sensitivity(one, one, [mean], [spread], (0.85, 0.85))
        assert float(mean) == pytest.approx(1 - 0.85**n) and float(spread) == pytest.approx(0.15 * n * 0.85**n)
        found[n] = float(mean * spread)
    assert found[1] == pytest.approx(0.019125) and found[2] == pytest.approx(0.060148, abs=1e-6)
    assert found[5] == pytest.approx(0.185123, abs=1e-6) and found[10] == pytest.approx(0.237172, abs=1e-6)
    assert found[40] == pytest.approx(0.0090, abs=1e-4)


def test_the_regulariser_is_a_gradient_and_no_loss() -> None:
    model = toy(made())
    tensors = {(s.name, n): getattr(s.layer, f"lora_{n}")["default"].live.detach() for s in sites(model) for n in "AB"}
    stacks = stacks_of(tensors)
    found = by_name(stacks, Orthogonal(0.3)(stacks))
    As, Bs = ([v for (_, n), v in tensors.items() if n == side] for side in "AB")
    want = adalora.regulariser_gradients(As, Bs, 0.3)
    got = [v for (_, n), v in found.items() if n == "A"] + [v for (_, n), v in found.items() if n == "B"]
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g.double(), w, rtol=1e-6, atol=1e-9)
    assert Orthogonal(0.0)(stacks) is None


def test_at_the_start_only_the_gate_learns() -> None:
    model = toy(made())
    backward(model)
    for site in sites(model):
        assert not any(getattr(site.layer, f"lora_{n}")["default"].live.grad.any() for n in "AB")
        assert trained_of(site.layer, "default")["gate"].grad.all()
        assert site.r == 6 and site.s == 2.0  # alpha/r of the target


@pytest.mark.parametrize("interval", [1, 3])
def test_scores_masks_and_budget_equal_the_oracle(interval: int) -> None:
    """Every event of a run drops what the oracle drops from the same values and gradients."""
    recipe, T = made(interval=interval, first=0.1, last=0.3), 30
    model = toy(recipe)
    opt = optimizer(model, recipe, 3e-2)
    driver = drive(model, recipe, opt, T)
    averages = {s.name: adalora.Averages((0.85, 0.85)) for s in sites(model)}
    events, regrown, last = [], False, set[tuple[str, int]]()
    for t in range(T):
        backward(model, t)
        opt.step()
        regrown |= t < 21 and bool(last - zeros(model))
        moment: Moment = opt.moment()
        if t < T - 9:
            for name, found in averages.items():
                keys = [key for key in moment.tensors if key[0] == name]
                found.observe({k[1]: moment.tensors[k] for k in keys}, {k[1]: moment.grads[k] for k in keys})
        driver.after_step()
        if (3 < t < 21 and t % interval == 0) or t == 21:
            count = 18 - adalora.budget(t, T, 18, 12, 3, 9)
            want = adalora.dropped({n: found.scores() for n, found in averages.items()}, count)
            assert zeros(model) == want and len(want) == count, t
            events.append(t)
            last = want
        if t >= 21:
            assert zeros(model) == last and len(last) == 6, "final"
    for stack in opt.moment().stacks:  # nothing is observed from the end of the window on
        for name, row in zip(stack.sites, opt.rule_states[0][f"spread|{stack.key}|B"], strict=True):
            assert torch.allclose(row, averages[name].spread["B"], rtol=1e-9, atol=0)
    assert regrown, "c = 0 trains: some slot came back between events"
    assert {step - 1 for step, _ in driver.changes} <= set(events) and driver.changes[-1][0] == 22
    ranks = {s.name: int((factors(s)[1] != 0).any(0).sum()) for s in sites(model)}
    assert sum(ranks.values()) == 12


def test_equal_ranks_at_start_and_end_do_nothing_wrong() -> None:
    """PEFT's AdaLoRA fails at its first event (kthvalue of nothing)."""
    recipe = made(start_ratio=1.0)
    model = toy(recipe)
    _, driver = driven(model, recipe, backward, range(8), 8)
    assert not zeros(model) and not driver.changes


def test_nothing_is_lost_by_saving_between_events(tmp_path: Path) -> None:
    """Slots that regrew since the last event are in the file; PEFT cuts by the last event's mask. And the loss is the
    task's alone: training's and evaluation's agree, where PEFT adds the regulariser to both.
    """
    recipe = build("adalora", {"interval": 4, "first": 0.0, "orthogonal": 0.5}, r=2, alpha=4.0)
    assert isinstance(recipe, Recipe)
    model = adapt(llama(), recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, 20)
    for step in range(1, 7):
        model(**batch_for(model)).loss.backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
        if step == 5:
            assert len(zeros(model)) > 3, "event after t = 4"
    assert not zeros(model), "all have regrown"
    model.eval()
    with torch.no_grad():
        ours = model(**batch_for(model))
        task = nn.functional.cross_entropy(
            ours.logits[:, :-1].flatten(0, 1), batch_for(model)["labels"][:, 1:].flatten(), ignore_index=-100
        )
    assert abs(float(ours.loss - task)) < 1e-6
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(stock(**batch_for(model)).logits, ours.logits, atol=1e-5)


def test_peft_masks_what_we_mask() -> None:
    """The same values and gradients, step by step: PEFT's allocator and ours drop the same slots."""
    T, model = 20, llama()
    settings = {
        "init_r": 3,
        "target_r": 2,
        "tinit": 2,
        "tfinal": 6,
        "deltaT": 3,
        "total_step": T,
        "orth_reg_weight": 0.1,
    }
    theirs = get_peft_model(model, AdaLoraConfig(**settings, target_modules=["q_proj", "down_proj"], lora_alpha=6))
    recipe = build(
        "adalora", {"interval": 3, "first": 0.1, "last": 0.3}, r=2, alpha=4.0, targets=("q_proj", "down_proj")
    )
    assert isinstance(recipe, Recipe)
    ours = adapt(llama(), recipe)
    opt = optimizer(ours, recipe, 1e-2)
    driver = drive(ours, recipe, opt, T)
    for t in range(T):
        ours(**batch_for(ours, seed=t)).loss.backward()
        opt.step()
        _copy_into(theirs, ours)
        driver.after_step()
        theirs.base_model.update_and_allocate(t)
        for site in sites(ours):
            E = theirs.get_submodule(f"base_model.model.{site.name}").lora_E["default"].detach().flatten()
            assert torch.equal(E == 0, trained_of(site.layer, "default")["gate"].detach() == 0), (t, site.name)
        opt.zero_grad()
    assert sum(int((c != 0).sum()) for c in gates(ours).values()) == 8


@pytest.mark.parametrize("alpha", [6, 0])
def test_an_adapter_of_pefts_adalora_becomes_plain_lora(alpha: int, tmp_path: Path) -> None:
    """Its own rank pattern cuts the tensors, one module has lost every slot, a head travels; PEFT refuses to convert
    it. alpha: 0 stands for the rank."""
    targets = ["q_proj", "down_proj"]
    budget = {"init_r": 3, "target_r": 1, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 4}
    config = AdaLoraConfig(**budget, target_modules=targets, lora_alpha=alpha, modules_to_save=["lm_head"])  # type: ignore[arg-type]
    theirs: Any = get_peft_model(llama(), config)
    modules = [m for m in theirs.modules() if hasattr(m, "lora_E") and "default" in getattr(m, "lora_E", {})]
    with torch.no_grad():
        for k, module in enumerate(modules):
            module.lora_E["default"].copy_(torch.tensor([[0.0], [k * 1.0], [-k * 2.0]]))
        theirs.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    with torch.no_grad():
        want = theirs.eval()(**batch_for(theirs)).logits
    theirs.save_pretrained(tmp_path / "adalora")
    assert is_adalora(tmp_path / "adalora")
    (tmp_path / "plain").mkdir()
    write_plain(tmp_path / "adalora", tmp_path / "plain")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    with torch.no_grad():
        got = stock(**batch_for(stock)).logits
    assert (got - want).norm() < 1e-6 * want.norm() and len(sites(stock)) == len(modules) - 1 == 3
    assert {s.r for s in sites(stock)} == {2}
    assert all(s.s == pytest.approx((alpha or 3) / (3 + 1e-5), rel=1e-9) for s in sites(stock))
    (tmp_path / "adalora" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(LoralignError, match="no whole AdaLoRA adapter"):
        write_plain(tmp_path / "adalora", tmp_path / "plain")


def _copy_into(theirs: Any, ours: PeftModel) -> None:
    """Values and gradients."""
    for site in sites(ours):
        layer = theirs.get_submodule(f"base_model.model.{site.name}")
        mine = {"A": site.layer.lora_A["default"].live, "B": site.layer.lora_B["default"].live}  # type: ignore[index, union-attr]
        for side, p in {**mine, "E": trained_of(site.layer, "default")["gate"]}.items():
            q = getattr(layer, f"lora_{side}")["default"]
            q.data = p.detach().clone().view_as(q)
            q.grad = p.grad.clone().view_as(q)


# -------------------------------------------------------------------------------------------------- dynamic-rank LoRA


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_of_components_are_closed_forms() -> None:
    A, B, c = normal(5, 9), normal(7, 5, seed=1), normal(5, seed=2)
    found = component_shares(A, B, c)
    assert found.tolist() == pytest.approx(dynamic_rank_lora.shares(A, B, c), rel=1e-9)
    assert float(found.sum()) >= 1
    assert torch.allclose(component_shares(3 * A, B, -2 * c), found)
    assert component_shares(A, B, 0 * c).tolist() == [0.0] * 5
    Q, P = torch.linalg.qr(normal(9, 5))[0].T, torch.linalg.qr(normal(7, 5, seed=3))[0]
    assert float(component_shares(Q, P, c).square().sum()) == pytest.approx(1)
    w = Window(150, 500, 100, 1000)
    assert all(120 - cubic_pruned(t, w, 120, 80) == dynamic_rank_lora.pruned(t, 1000, 120, 80) for t in range(501))


def test_the_variance_is_a_gradient_that_ends_with_the_pruning() -> None:
    recipe = made("dynamic-rank-lora")
    (rule,) = recipe.rules
    As, Bs = [normal(3, 8), normal(4, 6)], [normal(5, 3, seed=1), normal(9, 4, seed=2)]
    tensors = {(f"w{k}", n): X for k in range(2) for n, X in (("A", As[k]), ("B", Bs[k]))}
    want = dynamic_rank_lora.variance_gradients(As, Bs, 0.1)

    def ctx(step: int) -> Ctx:
        return Ctx(0.1, 0.1, step, None, 100)  # type: ignore[arg-type]

    stacks = stacks_of(tensors)
    found = by_name(stacks, rule.penalty({}, stacks, ctx(51)))
    for g, w in zip([found[f"w{k}", n] for n in "AB" for k in range(2)], want, strict=True):
        assert torch.allclose(g, w, rtol=1e-9)
    assert rule.penalty({}, stacks, ctx(52)) is None
    constant = stacks_of({("w", "A"): torch.ones(2, 5)})
    assert float(by_name(constant, Variance(0.1)(constant))["w", "A"].abs().max()) < 1e-12


def test_dynamic_rank_drops_what_the_oracle_drops() -> None:
    recipe, T = made("dynamic-rank-lora", interval=2), 24
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, T)
    averages = {s.name: [0.0] * 6 for s in sites(model)}
    for t in range(T):
        backward(model, t)
        opt.step()
        for site in sites(model):
            values = opt.moment().tensors
            now = dynamic_rank_lora.shares(*(values[site.name, n] for n in ("A", "B", "gate")))
            if t < 12:
                averages[site.name] = [0.9 * a + 0.1 * b for a, b in zip(averages[site.name], now, strict=True)]
        driver.after_step()
        if t in (6, 8, 10, 12):
            w = window(T, 0.15, 0.5, 2)
            count = int((18 - 12) * ((t - 4) / 8) ** 3)
            assert (w.start, w.stop) == (4, 12) and zeros(model) == adalora.dropped(averages, count), t
        if t > 12:
            assert len(zeros(model)) == 6


# --------------------------------------------------------------------------------------------------------------- SoRA


def test_soft_threshold_of_gates_equals_the_oracle() -> None:
    recipe = made("sora", threshold=4e-3)
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    before = gates(model)["one"]
    assert 0.3 < float(torch.cat(list(gates(model).values())).std()) < 2  # N(0, 1)
    driver = drive(model, recipe, opt, 12)
    slopes = []
    for t in range(12):
        backward(model, t)
        slopes.append(trained_of(sites(model)[0].layer, "default")["gate"].grad.clone())  # type: ignore[union-attr]
        opt.step()
        driver.after_step()
        if t == 0:  # B = 0: no gradient, gates move by the threshold alone
            assert not slopes[0].any()
            want = torch.tensor([sora.soft(float(g), 4e-3) for g in before], dtype=torch.float64)
            assert torch.allclose(gates(model)["one"], want, atol=1e-7)
    for j in range(4):
        course = sora.adam_then_soft(float(before[j]), [float(s[j]) for s in slopes], 1e-2, 4e-3)
        assert float(gates(model)["one"][j]) == pytest.approx(course[-1], rel=1e-5)
    assert [sora.soft(x, 0.1) for x in (0.15, -0.25, 0.05)] == pytest.approx([0.05, -0.15, 0.0])


@pytest.mark.parametrize("name", ["adalora", "dynamic-rank-lora", "sora", "beamlora"])
def test_gates_have_a_rate_of_their_own(name: str) -> None:
    recipe = made(name, gate_lr=0.25)
    rates = {g["role"]: g["lr"] for g in optimizer(toy(recipe), recipe, 1e-2).param_groups}
    assert rates == {"A": 1e-2, "B": 1e-2, "form": 2.5e-3}


def test_a_target_rank_finds_the_threshold() -> None:
    """Gates equal those of an oracle that steers by itself, at every second step of so many; the budget is met, and
    what was cut stays zero."""
    recipe, T, end, n = made("sora", target_rank=2, last=0.25), 240, 180, 2
    model = toy(recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, T)
    xi, off = sora.first_threshold(torch.cat(list(gates(model).values())).tolist(), 6, end), set[tuple[str, int]]()
    for t in range(1, T + 1):
        backward(model, t)
        opt.step()
        stepped = gates(model)
        driver.after_step()
        flat = [abs(float(g)) for c in stepped.values() for g in c]
        if t <= end:
            xi = xi if t % n else sora.next_threshold(xi, flat, round(6 * t / end))
            want = {n: [sora.soft(float(g), xi) for g in c] for n, c in stepped.items()}
            assert all(c.tolist() == pytest.approx(want[n], abs=1e-12) for n, c in gates(model).items()), t
        elif t == end + 1:
            off = {slot for slot in zeros(model)}
            rank = sorted(((abs(float(g)), n, j) for n, c in stepped.items() for j, g in enumerate(c)))
            assert off == {(n, j) for _, n, j in rank[:6]}
        assert t <= end or zeros(model) == off
    assert sum(driver.ranks().values()) == 6
    with pytest.raises(LoralignError, match="leave one of the two out"):
        made("sora", target_rank=2, threshold=1e-3)
    with pytest.raises(LoralignError, match="asks for more slots than the rank has"):
        check_combination(made("sora", target_rank=5))


def test_without_a_threshold_sora_is_a_gated_lora() -> None:
    runs = []
    for rules in (made("sora", threshold=0.0).rules, ()):
        recipe = replace(made("sora"), rules=rules)
        model = toy(recipe)
        driven(model, recipe, backward, range(4), 4)
        runs.append(gates(model))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_gradient_descent_with_the_threshold_finds_the_sparse_minimum() -> None:
    """½(g − a)² + λ|g| is least at T_λ(a): steps η with threshold η·λ get there."""
    for a in (1.3, 0.2, -0.7):
        g = 1.0
        for _ in range(400):
            g = sora.soft(g - 0.1 * (g - a), 0.1 * 0.5)
        assert g == pytest.approx(sora.soft(a, 0.5), abs=1e-6)


def test_the_l1_option_adds_its_gradient() -> None:
    (rule,) = made("sora", l1=3.0).rules
    stacks = stacks_of({("a", "gate"): torch.tensor([2.0, -1.0, 0.0]), ("a", "A"): torch.ones(3, 2)})
    found = by_name(stacks, rule.penalty({}, stacks, None))  # type: ignore[arg-type]
    assert list(found) == [("a", "gate")] and found["a", "gate"].tolist() == [1.0, -1.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("profile", ["peft", "portable"])
def test_ranks_by_module_reload_and_empty_modules_are_left_out(profile: Any, tmp_path: Path) -> None:
    recipe = build("adalora", r=2, alpha=4.0)
    assert isinstance(recipe, Recipe)
    model = adapt(llama(), recipe)
    first, second, *rest = sites(model)
    with torch.no_grad():
        for k, site in enumerate([first, second, *rest]):
            gate = trained_of(site.layer, site.adapter)["gate"]
            gate.fill_(float(k))
            gate[: k % 3] = 0.0
    with torch.no_grad():
        before = model.eval()(**batch_for(model)).logits
        with model.disable_adapter():
            base = model(**batch_for(model)).logits
    report = export(model, tmp_path / "out", profile=profile, base_id="toy", probes=batch_for(model))
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    with torch.no_grad():
        after = stock(**batch_for(stock)).logits
    assert (after - before).norm() < 1e-6 * before.norm() and (before - base).norm() > 1e-4 * base.norm()
    ranks = {s.name: s.r for s in sites(stock)}
    if profile == "portable":
        assert set(ranks.values()) == {3} and report.exact
    else:  # the first module's gates are all zero
        assert first.name not in ranks and ranks == {s.name: 3 - (k + 1) % 3 for k, s in enumerate([second, *rest])}
        assert {s.s for s in sites(stock)} == {2.0}


def test_the_log_says_what_became_of_the_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = build("adalora", r=2, alpha=4.0)
    assert isinstance(recipe, Recipe)
    trainer = toy_trainer(tmp_path, peft_config(recipe, llama()), steps=6)
    callback = attach(trainer, recipe)
    with caplog.at_level("INFO", "loralign"):
        trainer.train()
    assert "adalora: budget 42 → 28 slots: " in caplog.text and "of 14 modules alive" in caplog.text
    course = [sum(ranks.values()) for _, ranks in callback.ranks]
    assert [step for step, _ in callback.ranks] == [1, 2, 3, 4, 5, 6] and course[-1] == 28 and course[0] > 28


# -------------------------------------------------------------------------------------------------------------- resume

RESUMED: dict[str, dict[str, Any]] = {
    "adalora": {"interval": 3, "first": 0.0},
    "dynamic-rank-lora": {"interval": 3, "first": 0.0, "last": 0.3},
    "sora": {"threshold": 0.02},
    "sora, steered": {"target_rank": 1, "last": 0.6},
    "beamlora": {"interval": 4, "keep": 0.6, "until": 2.0},
    "prilora": {"interval": 4},
    "chain-of-lora + adalora": {"links": 2, "first": 0.0, "last": 0.4},
    "chain-of-lora + beamlora": {"links": 2, "interval": 2, "keep": 0.6, "until": 2.0},
    "xgblora + sora": {"link_steps": 5, "target_rank": 1, "last": 0.4},
}


def _run(folder: Path, name: str, steps: int, resume: Path | None, **args: Any) -> Any:
    recipe = build(name.split(",")[0], RESUMED[name], r=2, alpha=4.0, targets=("q_proj", "down_proj"))
    assert isinstance(recipe, Recipe)
    trainer = toy_trainer(folder, peft_config(recipe, llama()), steps=steps, **args)
    callback = attach(trainer, recipe, resume_from=resume)
    if name == "adalora":  # the picture takes its time
        trainer.add_callback(RankLog(callback, folder, int(resume.name.split("-")[1]) if resume else None))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model, callback


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_before_at_and_after_an_event_and_resumed_is_the_same_run(name: str, tmp_path: Path) -> None:
    """Averages, masks and snapshots come back; the budget counts from its own start (PEFT's counts the cut layers, and
    prunes too much). In a chain the schedule starts again after step 5, the knot.
    """
    whole, callback = _run(tmp_path / "whole", name, 10, None, save_steps=1)
    assert callback.driver.changes
    want = {n: p.detach().clone() for n, p in whole.named_parameters() if "lora_" in n}
    kept = tmp_path / "whole" / "ranks.jsonl"
    lines = kept.read_text() if name == "adalora" else ""
    for step in (4, 5, 6) if " + " in name else (3, 4, 5):
        (tmp_path / f"from-{step}").mkdir()
        (tmp_path / f"from-{step}" / "ranks.jsonl").write_text("\n".join(lines.splitlines()[:9]) + '\n{"step": 9, "ra')
        model, again = _run(tmp_path / f"from-{step}", name, 10, tmp_path / "whole" / f"checkpoint-{step}")
        got = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        assert all(torch.equal(got[n], p) for n, p in want.items()), step
        assert again.driver.ranks() == callback.driver.ranks()
        assert again.driver.started == callback.driver.started
        assert not lines or ((tmp_path / f"from-{step}" / kept.name).read_text() == lines and lines.count("\n") == 11)
        states = again.optimizer.rule_states[0], callback.optimizer.rule_states[0]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_skipped_step_is_not_observed(tmp_path: Path) -> None:
    """As fp16's scaler does: the trainer says that a step is over, the optimizer took none."""
    recipe = build("adalora", r=2, alpha=4.0, targets=("q_proj",))
    assert isinstance(recipe, Recipe)
    trainer = toy_trainer(tmp_path, peft_config(recipe, llama()), steps=4)
    callback = attach(trainer, recipe)
    trainer.train()
    assert callback.optimizer is not None
    before = {k: v.clone() for k, v in callback.optimizer.rule_states[0].items()}
    kept = {n: p.clone() for n, p in trainer.model.named_parameters()}
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, float("inf")) if p.requires_grad else None
    forgotten: list[None] = []
    callback.driver.inputs = SimpleNamespace(taken=lambda: forgotten.append(None))  # type: ignore[assignment,union-attr]
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert len(forgotten) == 1
    assert all(torch.equal(before[k], v) for k, v in callback.optimizer.rule_states[0].items())
    assert all(torch.equal(kept[n], p) for n, p in trainer.model.named_parameters())


def test_a_stop_knows_what_was_skipped_before_and_that_nothing_acted_yet() -> None:
    """Two of the eight steps of the first link were skipped, so the schedule of the second is two behind the run."""
    recipe = made("chain-of-lora + adalora", r=2, links=2, first=0.0, last=0.5)

    def train(driver: Driver, steps: range) -> None:
        for t in steps:
            backward(driver.model, t)
            if t in (2, 3):
                driver.skipped_step()
                driver.end_step(t + 1)
            else:
                driver.optimizer.step()
                driver.after_step()

    model = toy(recipe)
    driver = drive(model, recipe, optimizer(model, recipe, 1e-2), 16)
    train(driver, range(9))
    kept, moments = deepcopy(driver.state()), deepcopy(driver.optimizer.state_dict())
    index, start = driver.episodes.position
    assert (index, start, driver.optimizer.steps_in_link, driver.acted) == (1, 8, 1, [False])
    train(driver, range(9, 16))
    other = toy(recipe)
    again = Driver(recipe, other, optimizer(other, recipe, 1e-2))
    again.optimizer.load_state_dict(moments)
    again.begin(16, step=9, episode=index, episode_start=start)
    again.load(kept)
    again.before_step()
    assert (again.optimizer.steps_in_link, again.acted) == (1, [False])
    train(again, range(9, 16))
    assert again.ranks() == driver.ranks() and again.changes == driver.changes[-len(again.changes) :]
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for (name, p), q in pairs if "lora_" in name)


# ------------------------------------------------------------------------------------------------------- planted truth


@cache
def uniform_losses(**steps: int) -> list[float]:
    """LoRA's at the same budget, of ten seeds."""
    return [planted("lora", seed, **steps).loss for seed in range(10)]


def test_planted_ranks_are_found_by_one_seed() -> None:
    uniform = planted("lora", 0).loss
    for name in ("adalora", "sora"):
        found = planted(name, 0, **SETTINGS[name])
        assert found.rho >= 0.9 and found.loss < uniform, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_planted_ranks_are_found(name: str) -> None:
    """Ten seeds at the right budget: ranks in the planted order, and a lower loss than uniform LoRA's."""
    runs = [planted(name, seed, **SETTINGS[name]) for seed in range(10)]
    steps = {key: value for key, value in SETTINGS[name].items() if key == "steps"}
    uniform = uniform_losses(**steps)
    assert median(found.rho for found in runs) >= 0.9, [found.rho for found in runs]
    most = 6 if "threshold" in SETTINGS[name] else 0
    assert all(abs(sum(found.ranks) - sum(PLANTED)) <= most for found in runs)
    assert all(found.loss < plain for found, plain in zip(runs, uniform, strict=True)), (runs, uniform)
