"""PairOptimizer beside the pairs: other tensors, schedulers, state, guards, clipping. Formulas: test_transforms.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import lr_scheduler
from transformers import get_scheduler

import toy
from loralign import METHODS, LoralignError, Recipe, adapt, build, optimizer, sites
from loralign.carrier.sites import draw_for
from loralign.carrier.slot import trained_of
from loralign.optim.masks import DeadSlots
from loralign.optim.pairs import PairOptimizer
from loralign.optim.stacks import Place
from loralign.optim.transformed import filled
from loralign.plan.combinations import Surroundings, check_combination
from loralign.train.driver import Driver
from loralign.types import Pair, Weight, WorkFailed
from toy import batch_for

ADAPTERS = [m.id for m in METHODS.values() if not m.reference]
TRANSFORMS = [m.id for m in METHODS.values() if m.transform is not None]
ELEMENTWISE = [n for n in ADAPTERS if "elementwise" in build(n).transform.facts.accepts]  # type: ignore[union-attr]
PAIRWISE = [n for n in ADAPTERS if n not in ELEMENTWISE]
OPTIONS: dict[str, dict[str, Any]] = {
    "xgblora": {"fraction": 1.0},
    "delta-lora": {"wait_steps": 1},
    "hrp": {"rank": 6, "steps": 2},
}


def recipe(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    given = {**OPTIONS.get(name, {}), **(options or {})}
    made = build(name, given, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


def adapted(made: Recipe, base: Any = None, also: tuple[str, ...] = ()) -> PeftModel:
    """A tiny Llama under the recipe; base parameters whose names hold one of `also` train as well."""
    base = toy.llama() if base is None else base
    model = adapt(base, made, [batch_for(base, seed=s) for s in range(made.init.needs.draws)])
    for name, p in model.named_parameters():
        if "lora_" not in name and any(part in name for part in also):
            p.requires_grad_(True)
    return model


def backward(model: Any, step: int = 0) -> None:
    model.train()
    model(**batch_for(model, seed=step)).loss.backward()


def advance(model: Any, made: Recipe, stepper: PairOptimizer, step: int) -> None:
    """One step, slot events included."""
    backward(model, step)
    stepper.step()
    driver = Driver(made, model, stepper)  # one for each step: what the rules of the table remember is in the model
    driver.begin(100, step=step)
    driver.after_step()
    stepper.zero_grad()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def group(stepper: PairOptimizer, role: str) -> dict[str, Any]:
    return next(g for g in stepper.param_groups if g["role"] == role)


# -------------------------------------------------------------------------------------------------------- outside pairs

OUTSIDE = ("embed_tokens", "lm_head", "norm")


@pytest.mark.parametrize("name", ADAPTERS)
def test_tensors_outside_pairs_follow_adamw(name: str) -> None:
    """Head, norms and embeddings: AdamW's numbers from the same gradients; 1-D tensors do not decay."""
    made = recipe(name, weight_decay=0.1, max_grad_norm=0.0)
    model = adapted(made, also=OUTSIDE)
    stepper = optimizer(model, made, 1e-2, rest_lr=3e-3)
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in OUTSIDE)}
    assert {p.dim() for p in rest.values()} == {1, 2} and len(rest) == 7
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in rest.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in twins.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in twins.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
    )
    for step in range(4):
        backward(model, step)
        for key, p in rest.items():
            assert p.grad is not None
            twins[key].grad = p.grad.clone()
        stepper.between = False  # no event of a rule is of interest here
        stepper.step()
        reference.step()
        stepper.zero_grad()
        for key, p in rest.items():
            torch.testing.assert_close(p.detach(), twins[key].detach(), rtol=1e-5, atol=1e-7, msg=key)
    assert stepper.applied == len(stepper.sites) == 14


def test_plain_lora_is_torch_adamw_over_everything() -> None:
    """Pairs, head and norms, clipped together: one `clip_grad_norm_` and one AdamW."""
    made = recipe("lora", max_grad_norm=0.5)
    ours = adapted(made, also=OUTSIDE)
    theirs = copy.deepcopy(ours)
    stepper = optimizer(ours, made, 1e-2)
    params = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    for step in range(4):
        advance(ours, made, stepper, step)
        backward(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        assert stepper.grad_norm == pytest.approx(float(norm), rel=1e-4) and stepper.grad_norm > 0.5
        reference.step()
        reference.zero_grad()
    for key, value in trained(theirs).items():
        torch.testing.assert_close(trained(ours)[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_fresh_head_has_its_own_rate() -> None:
    """A classifier's head, which PEFT copies into `modules_to_save`, is in the optimizer and moves."""
    made = recipe("lora-pro")
    model = adapted(made, toy.bert())
    stepper = optimizer(model, made, 1e-4, rest_lr=5e-2)
    heads = {n for n in trained(model) if "lora_" not in n}
    assert heads and all("classifier" in n for n in heads)
    before = trained(model)
    advance(model, made, stepper, 0)
    moved = {n: float((p - before[n]).abs().max()) for n, p in trained(model).items()}
    assert all(moved[n] == pytest.approx(5e-2, rel=1e-3) for n in heads)
    still = optimizer(model, made, 1e-4, rest_lr=0.0)
    assert [g["lr"] for g in still.param_groups if g["role"] == "rest"] == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ lora-plus


def test_lora_plus_only_B_gets_the_ratio() -> None:
    """Not norms, not the head, and embeddings keep the plain rate (PEFT: 1e-6)."""
    made = recipe("lora-plus", {"ratio": 8.0}, weight_decay=0.1)
    model = adapted(made, also=OUTSIDE)
    stepper = optimizer(model, made, 1e-2)
    assert [(g["role"], g["lr"]) for g in stepper.param_groups] == [
        ("A", 1e-2),
        ("B", 8e-2),
        ("rest", 1e-2),
        ("rest", 1e-2),
    ]
    held = {id(p): g["role"] for g in stepper.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert held.pop(id(p)) == ("A" if "lora_A" in name else "B" if "lora_B" in name else "rest"), name
    assert not held


def test_lora_plus_weight_decay_reaches_both_factors() -> None:
    """With gradients of zero, a step is the decay alone: A by lr·decay, B by ratio·lr·decay."""
    made = recipe("lora-plus", {"ratio": 8.0}, weight_decay=0.1)
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    for p in model.parameters():
        if p.requires_grad:
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
    stepper.step()
    for name, value in trained(model).items():
        rate = 8e-2 if "lora_B" in name else 1e-2
        torch.testing.assert_close(value, torch.full_like(value, 1.0 - rate * 0.1), rtol=1e-6, atol=0.0)


DECAYS = {
    **dict.fromkeys(("adalora", "dynamic-rank-lora", "beamlora"), True),  # gates, in their codes' one group of AdamW
    "sora": False,  # gates have an optimizer of their own, without decay
    "sd-lora": False,  # α is how far to go along a direction, 1 at the start
    "prolora": True,  # chunks of A and B
}


@pytest.mark.parametrize("name", DECAYS)
def test_a_forms_own_tensors_decay_where_the_method_says(name: str) -> None:
    """With gradients of zero, a step is the decay alone, at the rate of the form."""
    made = recipe(name, weight_decay=0.1)
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    own = [g for g in stepper.param_groups if g["role"] == "form"]
    assert own
    for g in own:
        for p in g["params"]:
            p.data.fill_(1.0)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    stepper.step()
    for g in own:
        for p in g["params"]:
            wanted = 1.0 - g["lr"] * 0.1 * DECAYS[name]
            torch.testing.assert_close(p.detach(), torch.full_like(p, wanted), rtol=1e-6, atol=0.0)


def test_every_form_with_tensors_of_its_own_is_here() -> None:
    def owns(made: Any) -> bool:
        W = Weight("w", (4, 4), lambda: torch.ones(4, 4))
        return bool(made.form.shared() or made.form.trained(W, 2, draw_for(0, "w")))

    assert {name for name in ADAPTERS if owns(build(name))} == {*DECAYS}


# ----------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[PairOptimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[g["lr"] for g in o.param_groups], total_steps=20, cycle_momentum=False
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "transformers cosine": lambda o: get_scheduler("cosine", o, num_warmup_steps=2, num_training_steps=9),
    "transformers inverse sqrt": lambda o: get_scheduler("inverse_sqrt", o, num_warmup_steps=2, num_training_steps=9),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_any_scheduler_turns_the_rates(kind: str) -> None:
    """B keeps its ratio, and the sizes of the steps follow the present rate (Adam's first step: exactly the rate)."""
    made = recipe("lora-plus", {"ratio": 4.0})
    model = adapted(made, also=("norm",))
    stepper = optimizer(model, made, 1e-2)
    scheduler, rates = SCHEDULERS[kind](stepper), []
    for step in range(8):
        a, b, rest = (group(stepper, role)["lr"] for role in ("A", "B", "rest"))
        assert b == pytest.approx(4 * a, rel=1e-9) and rest == pytest.approx(a, rel=1e-9)
        rates.append(a)
        stepper.forget(stepper.sites)
        before = trained(model)
        advance(model, made, stepper, step)
        after = trained(model)
        still = sum(rates[:-1]) == 0  # B is zero, so A has no gradient yet
        for side, rate in (("lora_A", 0.0 if still else a), ("lora_B", b)):
            moved = max(float((after[n] - before[n]).abs().max()) for n in after if side in n)
            assert moved == pytest.approx(rate, rel=2e-3, abs=1e-9)
        scheduler.step(1.0) if kind == "plateau" else scheduler.step()
    assert len({round(r, 12) for r in rates}) > 2


# ---------------------------------------------------------------------------------------------------- tensors and state


@pytest.mark.parametrize("name", ADAPTERS)
def test_tensors_are_looked_up_at_each_step(name: str) -> None:
    """Parameters replaced in model and groups, as `fully_shard` does: the new ones move, with a state of their own."""
    made = recipe(name)
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    old = [p for g in stepper.param_groups for p in g["params"]]
    shared: Any = getattr(model.base_model, "lora_shared", nn.ParameterDict())
    homes = [(shared._parameters, key) for key in shared]
    for site in sites(model):
        layer: Any = site.layer
        homes += [(side[site.adapter]._parameters, "weight") for side in (layer.lora_A, layer.lora_B)]
        homes += [(getattr(layer, f"lora_{n}")._parameters, site.adapter) for n in trained_of(layer, site.adapter)]
    for home, key in homes:
        gone = home[key]
        home[key] = fresh = nn.Parameter(gone.detach().clone(), requires_grad=gone.requires_grad)
        for g in stepper.param_groups:
            g["params"] = [fresh if p is gone else p for p in g["params"]]
    before = trained(model)
    for step in range(2):
        advance(model, made, stepper, step)
    assert stepper.applied == 14
    assert all(not torch.equal(value, before[key]) for key, value in trained(model).items() if "lora_B" in key)
    assert not any(p is gone for p in stepper.state for gone in old)


@pytest.mark.parametrize("name", [*ADAPTERS, "lora-pro full", "lora-ga + lora-rite"])
def test_save_load_next_step_is_identical(name: str) -> None:
    """Through `torch.load(weights_only=True)`, slot events and tensors outside pairs included."""
    options = {"moments": "full"} if name.endswith(" full") else {}
    made = recipe(name.removesuffix(" full"), options, weight_decay=0.01)
    model = adapted(made, also=("norm",))
    stepper = optimizer(model, made, 1e-2)
    scheduler = lr_scheduler.CosineAnnealingLR(stepper, 10)
    for step in range(3):
        advance(model, made, stepper, step)
        scheduler.step()
    kept = io.BytesIO()
    torch.save({"optimizer": stepper.state_dict(), "scheduler": scheduler.state_dict()}, kept)
    other = copy.deepcopy(model)
    advance(model, made, stepper, 3)

    kept.seek(0)
    saved = torch.load(kept, weights_only=True)
    again = optimizer(other, made, 5e-5)
    lr_scheduler.CosineAnnealingLR(again, 10).load_state_dict(saved["scheduler"])
    again.load_state_dict(saved["optimizer"])
    advance(other, made, again, 3)
    assert again.param_groups[0]["step"] == 4
    want = trained(model)
    for key, value in trained(other).items():
        assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("name", ["lora", "lora-plus"])
def test_moments_of_half_precision_factors_stay_fp32_through_a_file(name: str) -> None:
    made = recipe(name)
    model = adapted(made).to(torch.bfloat16)
    stepper = optimizer(model, made, 1e-2)
    for step in range(2):
        advance(model, made, stepper, step)
    kept = copy.deepcopy(stepper.state_dict())
    other = copy.deepcopy(model)
    again = optimizer(other, made, 1e-2)
    again.load_state_dict(kept)
    assert {t.dtype for st in again.state.values() for t in st.values()} == {torch.float32}
    for own, m in ((stepper, model), (again, other)):
        advance(m, made, own, 2)
    assert all(torch.equal(value, trained(model)[key]) for key, value in trained(other).items())


# --------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("name", ADAPTERS)
def test_acting_on_no_pair_raises_at_the_first_step(name: str) -> None:
    made = recipe(name)
    model = adapted(made, also=("norm",))
    stepper = optimizer(model, made, 1e-2)
    before = trained(model)
    with model.disable_adapter():  # the loss does not see the adapter, other tensors get their gradients
        for key, p in model.named_parameters():
            p.requires_grad_(key in before)
        backward(model)
    with pytest.raises(WorkFailed, match="no pair of the adapter received a gradient"):
        stepper.step()
    assert all(torch.equal(value, before[key]) for key, value in trained(model).items())


def test_a_frozen_adapter_is_refused() -> None:
    made = recipe("lora-rite")
    model = adapted(made).requires_grad_(False)
    with pytest.raises(LoralignError, match="is_trainable=True"):
        optimizer(model, made, 1e-2)


def test_there_are_both_kinds() -> None:
    assert {"lora", "lora-plus", "rm-lora", "delta-lora"} <= set(ELEMENTWISE)
    assert {"lora-pro", "lora-rite", "riemannian", "lora-fa", "muon-factors", "spectral"} <= set(PAIRWISE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_deepspeed_is_refused_with_the_alternative(name: str) -> None:
    """ZeRO replaces the parameter groups by flat partitions, which no optimizer of ours can step."""
    with pytest.raises(LoralignError, match=r"DeepSpeed replaces the parameter groups.*use FSDP2 or DDP"):
        check_combination(recipe(name), Surroundings(engine="deepspeed"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_half_precision_factors(name: str, dtype: torch.dtype) -> None:
    """Refused in a bare loop and by the table where products of factors matter; `adapt` itself never makes them."""
    made = recipe(name)
    model = adapted(made)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    half = copy.deepcopy(model).to(dtype)
    if name in ELEMENTWISE:
        optimizer(half, made, 1e-2)
        return
    with pytest.raises(LoralignError, match=r"half precision rounds away.*fp32.*adamw"):
        optimizer(half, made, 1e-2)
    with pytest.raises(LoralignError, match=r"half precision rounds away.*fp32"):
        check_combination(made, Surroundings(factors=dtype))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_half_precision_base_gets_fp32_factors(name: str) -> None:
    """The usual case: bf16 weights, PEFT's fp32 factors, a loss under autocast."""
    made = recipe(name)
    model = adapted(made, toy.llama().to(torch.bfloat16))
    stepper = optimizer(model, made, 1e-3)
    before = trained(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_for(model)).loss
    loss.backward()
    stepper.step()
    assert stepper.applied == 14
    assert all(
        p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in trained(model).items() if "_B" in n
    )


@pytest.mark.parametrize("name", ["lora-plus", "sora"])
def test_the_factor_of_a_link_is_a_factor_on_every_rate(name: str) -> None:
    """Of A and B, of a form's own tensors and of the rest, decay included."""
    made = recipe(name, weight_decay=0.5)
    models = [adapted(made, also=OUTSIDE) for _ in range(2)]
    steppers = [optimizer(model, made, lr) for model, lr in zip(models, (4e-2, 1e-2), strict=True)]
    steppers[0].lr_factor = 0.25
    before = trained(models[0])
    for step in range(2):
        for model, stepper in zip(models, steppers, strict=True):
            stepper.between = False
            backward(model, step)
            stepper.step()
            stepper.zero_grad()
    for key, value in trained(models[0]).items():
        assert not torch.equal(value, before[key])
        torch.testing.assert_close(value, trained(models[1])[key], msg=key)


def test_what_was_reached_is_remembered_over_steps() -> None:
    made = recipe("lora")
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    for step, left_out in enumerate(("q_proj", "mlp")):
        backward(model, step)
        for name, p in model.named_parameters():
            if left_out in name:
                p.grad = None
        stepper.step()
        assert stepper.applied == len([name for name in stepper.sites if left_out not in name])
        stepper.zero_grad()
    assert stepper.reached == set(stepper.sites)


def test_masks_follow_every_change_of_the_dead_slots() -> None:
    place = Place("2x3x4", ("a", "b"), 2, torch.device("cpu"), {}, None)
    dead, places = DeadSlots(), [place]

    def on() -> list[list[bool]] | None:
        masks = dead.masks(places, lambda site: frozenset({"gate"}))
        if masks is None:
            return None
        (mask,) = masks
        assert torch.equal(mask["A"], mask["gate"][:, :, None]) and torch.equal(mask["B"], mask["gate"][:, None])
        return mask["gate"].tolist()

    assert on() is None
    dead["a"] = torch.tensor([True, False])
    assert on() == [[False, True], [True, True]]
    dead["b"] = torch.tensor([True, True])
    assert on() == [[False, True], [False, False]]
    dead["b"] = torch.tensor([False, True])
    assert on() == [[False, True], [True, False]]
    dead["a"] = torch.tensor([False, False])
    assert on() == [[True, True], [True, False]] and list(dead) == ["b"]
    dead["a"] = torch.tensor([False, True])
    assert on() == [[True, False], [True, False]]
    del dead["a"]
    assert on() == [[True, True], [True, False]]
    del dead["b"]
    assert on() is None


def test_masks_of_rules_act_beside_dead_slots() -> None:
    made = recipe("rm-lora", weight_decay=0.1)
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    no_A = SimpleNamespace(
        facts=made.rules[0].facts,
        penalty=lambda *_: None,
        grad_mask=lambda *_: None,
        update_mask=lambda state, stacks, ctx: [{"A": torch.zeros(len(stack.sites), 1, 1)} for stack in stacks],
    )
    stepper.rules = (no_A,)  # type: ignore[assignment]
    name = next(iter(stepper.sites))
    stepper.dead[name] = torch.tensor([True, False, False])
    before = trained(model)
    backward(model)
    stepper.step()
    for key, value in trained(model).items():
        columns = (value != before[key]).any(0)
        assert not columns.any() if "lora_A" in key else columns.tolist() == [name not in key, True, True], key


def test_rules_see_the_sites_that_are_awake() -> None:
    made = recipe("rm-lora")
    stepper = optimizer(adapted(made), made, 1e-2)
    seen: list[list[str]] = []
    stepper.rules = (SimpleNamespace(init=lambda sites, steps: seen.append([s.name for s in sites]) or {}),)  # type: ignore[assignment]
    stepper.asleep = set(list(stepper.sites)[:3])
    stepper.begin_link(5, 20)
    assert seen == [list(stepper.sites)[3:]] and stepper.link == (5, 20)
    assert {site for place in stepper.layout.all for site in place.sites} == set(seen[0])


def test_only_what_has_no_state_begins_with_one() -> None:
    """As a factor that rested in the link before, beside one that trained."""
    made, kept = recipe("lora"), {"exp_avg": torch.ones(3, 4)}
    pair = Pair("site", torch.ones(3, 4), torch.ones(5, 3), 1.0, "AB")
    state = filled(made.transform, pair, {"A": dict(kept), "B": {}})
    assert torch.equal(state["A"]["exp_avg"], kept["exp_avg"]) and len(state["A"]) == 1
    assert not state["B"]["exp_avg"].any() and state["B"]["exp_avg"].shape == pair.B.shape


def test_loaded_state_is_a_copy() -> None:
    made = recipe("lora")
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    backward(model)
    stepper.step()
    kept = copy.deepcopy(stepper.state_dict())
    before = copy.deepcopy(kept["state"])
    stepper.load_state_dict(kept)
    backward(model, 1)
    stepper.step()
    assert all(torch.equal(v, before[k][key]) for k, s in kept["state"].items() for key, v in s.items())


def test_no_state_is_handed_out_that_a_broken_gradient_has_seen() -> None:
    """late: as on a GPU, where a step is judged when the next one begins."""
    made = recipe("lora")
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    stepper.norms.late = True
    before = trained(model)
    backward(model)
    next(p.grad for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = torch.nan  # type: ignore[index]
    stepper.step()
    with pytest.raises(WorkFailed, match="the gradient is not finite at step 1"):
        stepper.state_dict()
    assert not stepper.state and all(torch.equal(value, before[key]) for key, value in trained(model).items())


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("name", ADAPTERS)
def test_clipping_is_the_recipes(name: str) -> None:
    """The global norm is 1 by default; lora-rite clips by itself, in units that do not depend on the factors, a sign
    has no size, and an exact step is not clipped."""
    assert recipe(name).max_grad_norm == (0.0 if name in ("lora-rite", "spectral", "rac-lora-exact") else 1.0)
    assert recipe(name, max_grad_norm=0.3).max_grad_norm == 0.3
    made = recipe(name, max_grad_norm=0.3)
    assert optimizer(adapted(made), made, 1e-2).max_grad_norm == 0.3


def test_a_mix_keeps_the_clipping_of_its_transform() -> None:
    assert recipe("lora-ga + lora-rite").max_grad_norm == recipe("lora-rite + rm-lora").max_grad_norm == 0.0
    assert recipe("lora-ga + lora-pro").max_grad_norm == 1.0


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
@pytest.mark.parametrize("name", ["lora-pro", "rm-lora"])
def test_the_clip_covers_pairs_and_the_rest_together(name: str, clip: float) -> None:
    """Gradients after the step are those that acted, a penalty's included: their global norm is at most the clip; 0
    leaves them alone."""
    made = recipe(name, max_grad_norm=clip)
    model = adapted(made, also=OUTSIDE)
    stepper = optimizer(model, made, 1e-3)
    backward(model)
    before = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    stepper.step()
    after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    if not made.rules:  # else the penalty's is added
        assert stepper.grad_norm == pytest.approx(float(before), rel=1e-5)
    assert float(after) == pytest.approx(min(clip or torch.inf, stepper.grad_norm), rel=2e-3)


def test_a_gradient_that_is_not_finite_stops_before_anything_moves() -> None:
    made = recipe("lora-rite")
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    backward(model)
    broken = next(p for n, p in model.named_parameters() if "lora_B" in n)
    assert broken.grad is not None
    broken.grad[0, 0] = torch.nan
    before = trained(model)
    with pytest.raises(WorkFailed, match="the gradient is not finite at step 1"):
        stepper.step()
    assert all(torch.equal(value, before[key]) for key, value in trained(model).items())


def test_a_closure_is_called_with_gradients() -> None:
    made = replace(recipe("lora"), max_grad_norm=0.0)
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)

    def closure() -> float:
        stepper.zero_grad()
        loss = model(**batch_for(model)).loss
        loss.backward()
        return float(loss.detach())

    assert stepper.step(closure) > 0  # type: ignore[arg-type, operator]
    assert stepper.applied == 14


def test_a_moment_is_made_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules are asked after every step; what they do not read costs nothing."""
    made = recipe("rm-lora")
    model = adapted(made)
    stepper = optimizer(model, made, 1e-2)
    backward(model)
    stepper.step()
    seen: list[int] = []
    pairs = stepper.values.pairs
    monkeypatch.setattr(stepper.values, "pairs", lambda *given: seen.append(1) or pairs(*given))
    moment = stepper.moment()
    assert made.rules[0].step({}, moment) == ({}, None) and not seen
    assert len(moment.tensors) == len(moment.grads) == 2 * len(stepper.sites)
    assert list(moment.tensors) == list(moment.grads)
    assert len(seen) == 1
