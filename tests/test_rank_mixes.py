"""Mixes of the rank axis: any scorer under any law, rank rules with forms, transforms and one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from loralign import METHODS, LoralignError, Recipe, adapt, build, drive, optimizer, sites
from loralign.carrier.slot import live_of
from loralign.io.export import export
from loralign.maths.budget import Window, cubic_budget, cubic_pruned
from loralign.methods.rule.adalora import Orthogonal, Sensitivity
from loralign.methods.rule.combine import GATE, Law, Shrink, unregularised
from loralign.methods.rule.dynamic_rank import ComponentShare, Variance
from loralign.plan.combinations import check_combination
from loralign.plan.course import check_length
from loralign.types import Moment, RuleState, Validation
from toy import batch_for, llama


def made(name: str) -> Recipe:
    recipe = build(name, r=2, alpha=4.0, targets=("0", "2"))
    assert isinstance(recipe, Recipe)
    return recipe


@dataclass(frozen=True)
class Size:
    """A scorer of one's own: the gate's size."""

    transient: ClassVar[float] = 0.0

    def observe(self, state: RuleState, moment: Moment) -> None:
        return None

    def scores(self, state: RuleState, moment: Moment) -> Mapping[str, Tensor]:
        return {site.name: moment.tensors[site.name, GATE].abs() for site in moment.sites}


def straight(t: int, window: Window, b0: int, bT: int) -> int:
    """A law of one's own: the budget falls at a constant rate."""
    return b0 - round((b0 - bT) * window.progress(t))


SCORERS = (Sensitivity((0.85, 0.85)), ComponentShare(0.9), Size())
BUDGETS: tuple[Callable[[int, Window, int, int], int], ...] = (cubic_budget, cubic_pruned, straight)
REGULARISERS = (unregularised, Orthogonal(0.1), Variance(0.1))


@pytest.mark.parametrize(("scorer", "budget"), [*product(SCORERS, BUDGETS)])
def test_any_scorer_under_any_law_ends_at_its_budget(scorer: Any, budget: Any) -> None:
    regulariser = REGULARISERS[(SCORERS.index(scorer) + BUDGETS.index(budget)) % 3]
    recipe = replace(made("adalora"), rules=(Shrink(scorer, Law(1.5, 0.2, 0.3, 2, budget), regulariser),))
    check_combination(recipe)
    torch.manual_seed(0)
    model: Any = adapt(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)), recipe)
    opt = optimizer(model, recipe, 3e-2)
    driver = drive(model, recipe, opt, 12)
    course = []
    for _ in range(12):
        x = torch.randn(8, 6)
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
        course.append(sum(driver.ranks().values()))
    assert course[0] == 6 and course[-4:] == [4, 4, 4, 4], course


GATE_STANDS = "a trained gate stands between A and B"
TWO = "two rules would decide about the same slots"
PLACES = "its slots are places in W"
NO_PAIR = "its form trains neither A nor B"
NO_GATE = "its rule switches slots by a trained gate, which this form does not have"
NO_SHARES = "its rule weighs slots by a gate that shares the rank out among them, which this form does not have"
JUMPS = "change W before the first step"
STUCK = "start where no gradient reaches any of the trained tensors"
GATED = ("adalora", "dynamic-rank-lora", "sora", "beamlora")
FREE = ("allocating-lora", "prilora")
RANK = (*GATED, *FREE)
FORMS = tuple(m.id for m in METHODS.values() if m.form is not None)
TRANSFORMS = tuple(m.id for m in METHODS.values() if m.transform is not None and not m.renamed)
PER_NUMBER = ("lora-plus", "spectral")
"""Transforms beside a gate: what they do to a factor does not ask for the other one."""


def said(recipe: Recipe) -> str:
    try:
        check_combination(recipe)
    except LoralignError as error:
        return str(error)
    return ""


def test_every_rank_rule_is_here() -> None:
    assert {m.id for m in METHODS.values() if any(rule().facts.allocates for rule in m.rules)} == set(RANK)


@pytest.mark.parametrize(("rule", "transform"), [*product(RANK, TRANSFORMS)])
def test_a_gate_and_what_steps_around_it(rule: str, transform: str) -> None:
    reason = said(replace(made(rule), transform=made(transform).transform))
    assert (GATE_STANDS in reason) if rule in GATED and transform not in PER_NUMBER else reason == ""


@pytest.mark.parametrize(("one", "other"), [*product(RANK, RANK)])
def test_two_rank_rules_are_refused(one: str, other: str) -> None:
    assert TWO in said(replace(made(one), rules=made(one).rules + made(other).rules))


def _reason(rule: str, form: str) -> str:
    if form.startswith("sbora"):
        return PLACES
    if form == "prolora":
        return NO_PAIR
    if rule == "beamlora":
        return "" if form == "beamlora" else NO_SHARES
    if rule in ("adalora", "dynamic-rank-lora", "sora") and form not in ("adalora", "dynamic-rank-lora", "sora"):
        return NO_GATE
    if rule in ("adalora", "dynamic-rank-lora") and form == "sora":
        return JUMPS  # their inits start both factors
    if rule not in ("adalora", "dynamic-rank-lora") and form in ("adalora", "dynamic-rank-lora"):
        return STUCK  # B and the gate are zero
    return ""


@pytest.mark.parametrize(("rule", "form"), [*product(RANK, FORMS)])
def test_a_rule_on_another_form(rule: str, form: str) -> None:
    recipe = replace(made(rule), form=made(form).form)
    if form.startswith("sbora"):
        recipe = replace(recipe, init=made(form).init)
    reason, want = said(recipe), _reason(rule, form)
    assert want in reason and bool(want) == bool(reason), reason


EVENTS: dict[str, dict[str, Any]] = {
    "adalora": {"interval": 2, "first": 0.0},
    "dynamic-rank-lora": {"interval": 2, "first": 0.0},
    "sora": {"threshold": 0.3},
    "beamlora": {"interval": 2, "keep": 0.4, "until": 2.0},
    "allocating-lora": {"rounds": 2, "moved": 1, "first": 0.1, "every": 0.2},
    "prilora": {"interval": 3},
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("name", EVENTS)
def test_slots_change_without_a_recompilation(name: str) -> None:
    """Masks and moves act on values; shapes, Parameters and code stay, so a compiled model goes on."""
    recipe = build(name, EVENTS[name], r=2, alpha=4.0, targets=("0", "2"))
    assert isinstance(recipe, Recipe)
    plain, _ = _run(recipe, False)
    counters.clear()
    torch.compiler.reset()
    compiled, ranks = _run(recipe, True)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert len(set(ranks)) > 1 or name in ("beamlora", "prilora")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, compiled, strict=True))


def _run(recipe: Recipe, compiled: bool) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    torch.manual_seed(0)
    model: Any = adapt(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)), recipe)
    opt = optimizer(model, recipe, 3e-2)
    draw = iter(range(10**6))
    judged = {"losses": lambda masks: [float(next(draw) * 7 % 11) for _ in masks]}
    wants = any(isinstance(rule.needs, Validation) for rule in recipe.rules)
    driver = drive(model, recipe, opt, 10, observe=lambda: judged if wants else {})
    run: Any = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(8, 6)
    ranks = []
    for step in range(10):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            (run(x) - x.flip(1)).square().mean().backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
        ranks.append(tuple(driver.ranks().values()))
    driver.close()
    assert len(driver.changes) > 1
    return [p.detach().clone() for p in model.parameters() if p.requires_grad], ranks


LINKS: dict[str, dict[str, Any]] = {
    "chain-of-lora + adalora": {"links": 3, "first": 0.0, "last": 0.3},
    "chain-of-lora + sora": {"links": 3, "target_rank": 1},
    "rac-lora + allocating-lora": {"links": 3, "rounds": 1, "moved": 2},
    "xgblora + dynamic-rank-lora": {"link_steps": 6, "first": 0.0, "last": 0.3},
}


@pytest.mark.parametrize("name", LINKS)
def test_a_rule_acts_in_every_link_and_what_it_left_is_exported_exactly(name: str, tmp_path: Path) -> None:
    """The schedule runs over each link, among the modules that train in it; slots that are off are not committed."""
    recipe = build(name, LINKS[name], r=2, alpha=4.0)
    assert isinstance(recipe, Recipe)
    check_combination(recipe)
    model: Any = adapt(llama(), recipe)
    opt = optimizer(model, recipe, 1e-2)
    losses = {"losses": lambda masks: [float(k) for k, _ in enumerate(masks)]}
    driver = drive(model, recipe, opt, 18, observe=(lambda: losses) if "allocating" in name else None)
    left, began = dict.fromkeys(opt.sites, 0), driver.ranks()
    for step in range(1, 19):
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        if step in (6, 12):
            driver.after_optimizer_step()
            ends, budget = driver.ranks(), sum(began.values())
            assert sum(ends.values()) == budget if "allocating" in name else sum(ends.values()) < budget
            assert ends != began and all(ends[site] == 0 for site in opt.asleep)
            left = {site: left[site] + ends[site] for site in left}
            driver.end_step(step)
            began = driver.ranks()
            for site in sites(model):
                assert live_of(site.layer, site.adapter).A0.shape[0] == left[site.name], site.name
        else:
            driver.after_step()
        opt.zero_grad()
    assert {max(step - 1, 0) // 6 for step, _ in driver.changes} == {0, 1, 2}  # allocating-lora has one before step 1
    with torch.no_grad():
        before = model.eval()(**batch_for(model)).logits
    export(model, tmp_path / "out", base_id="toy", probes=batch_for(model))
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(stock(**batch_for(stock)).logits, before, rtol=1e-5, atol=1e-5)


def test_a_link_without_room_for_the_schedule_is_refused_beforehand() -> None:
    recipe = build("chain-of-lora + adalora", {"links": 6}, r=2)
    assert isinstance(recipe, Recipe)
    check_length(recipe, 18)
    with pytest.raises(LoralignError, match="in a link of 1 steps, its budget shrinks"):
        check_length(recipe, 6)
