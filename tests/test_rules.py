"""Rules with a form of their own or with masks: RM-LoRA and Delta-LoRA against their oracles."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from loralign import Recipe, build, peft_config
from loralign.carrier.sites import factors, sites
from loralign.carrier.slot import Own, install, write
from loralign.maths.draws import keyed_generator
from loralign.maths.lists import joined
from loralign.methods.form.delta_lora import boosted
from loralign.methods.form.plain import plain
from loralign.methods.rule.delta_lora import snapshot
from loralign.methods.rule.rm_lora import masked_orthogonal, regulariser, slopes
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import descend
from loralign.optim.pairs import PairOptimizer
from loralign.optim.values import named
from loralign.plan.course import idle
from loralign.train.attach import attach
from loralign.train.driver import Driver
from loralign.types import (
    Ctx,
    Form,
    Freeze,
    Live,
    LoralignError,
    Moment,
    Pair,
    Rule,
    SiteShape,
    Start,
    Train,
    Transform,
)
from oracles import delta_lora, rm_lora
from stacking import by_name, stacks_of
from toy import llama
from trainers import toy_trainer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(x: Tensor, y: Tensor, tol: float = 1e-10) -> None:
    assert (x - y).norm() <= tol * max(float(y.norm()), 1e-30), float((x - y).norm() / y.norm())


def pair(seed: int = 0, r: int = 4, d_out: int = 12, d_in: int = 10, train: Train = "AB") -> Pair:
    return Pair(f"w{seed}", normal(r, d_in, seed=2 * seed), normal(d_out, r, seed=2 * seed + 1), 2.0, train)


def ctx(step: int = 2, seed: int = 0) -> Ctx:
    return Ctx(0.1, 0.1, step, lambda purpose, name: keyed_generator(seed, purpose, step, name))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(10, 10, bias=False), nn.Linear(10, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.tanh(self.one(x))))


def toy(form: Form | None = None, start: float = 0.3, r: int = 4) -> Any:
    """Float64, two adapted sites of two shapes, B not zero where start is not; the head trains as well."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LoraConfig(r=r, target_modules=["one", "two"], lora_alpha=2 * r)
    model = get_peft_model(Toy(), config).double()
    torch.set_rng_state(state)
    for k, site in enumerate(sites(model)):
        begin = Start(normal(r, site.d_in, seed=60 + k) / 4, start * normal(site.d_out, r, seed=k))
        install(site.layer, site.adapter, begin, form or plain(), Own(), chain=False)
    for p in model.base_model.model.head.parameters():
        p.requires_grad_(True)
    return model


def optimizer_for(model: Any, rules: list[Rule], transform: Transform | None = None, **kwargs: Any) -> PairOptimizer:
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    given = {"lr": 1e-2, "max_grad_norm": 0.0, **kwargs}
    return PairOptimizer(sites(model), rest, transform or adamw(), rules=rules, **given)


def backward(model: Any, t: int = 0) -> float:
    x, y = normal(16, 10, seed=100 + t), normal(16, 3, seed=500)
    for p in model.parameters():
        p.grad = None
    loss = (model(x) - y).square().mean()
    loss.backward()
    return float(loss.detach())


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------------- RM-LoRA


def test_regulariser_and_its_gradient_equal_the_oracle() -> None:
    pairs = [pair(0), pair(1), pair(2, d_out=5, d_in=30), pair(3, train="B")]
    As, Bs = [p.A for p in pairs if "A" in p.train], [p.B for p in pairs]
    close(regulariser([*(A.mT for A in As), *Bs], 0.1), rm_lora.regulariser(As, Bs, 0.1), 1e-14)
    stacks = stacks_of(named(pairs, {}))
    made = by_name(stacks, masked_orthogonal(c=0.1).penalty({}, stacks, ctx()))
    want_A, want_B = rm_lora.gradients(As, Bs, 0.1)
    assert ("w3", "A") not in made
    for p, B in zip(pairs, want_B, strict=True):
        assert made[p.name, "B"].shape == p.B.shape
        close(made[p.name, "B"], B, 1e-12)
    for p, A in zip(pairs, want_A, strict=False):
        close(made[p.name, "A"], A, 1e-12)


def test_stacks_that_follow_one_another_are_joined_without_a_copy() -> None:
    whole = torch.arange(48.0).view(8, 2, 3)
    one, two, three = whole.split([3, 4, 1])
    assert joined([one, two, three]).data_ptr() == whole.data_ptr() and torch.equal(joined([one, two, three]), whole)
    assert torch.equal(joined([two, three]), whole[3:])
    for apart in ([two, one], [one, three], [one.clone(), two], [one, two.clone()], [one.mT, two.mT]):
        copy = joined(apart)
        assert torch.equal(copy, torch.cat(apart)) and copy.data_ptr() not in (one.data_ptr(), two.data_ptr())


def test_regulariser_at_its_special_points() -> None:
    r = 4
    A, B = torch.linalg.qr(normal(10, r))[0], torch.linalg.qr(normal(12, r))[0]
    assert float(regulariser([A, B], 1.0)) < 1e-12
    assert float(regulariser([A, torch.zeros(12, r).double()], 1.0)) == pytest.approx(r**0.5 / 2, abs=1e-12)
    for minimum in (torch.zeros(12, r), torch.eye(12, r)):
        stacks = stacks_of({("w", "B"): minimum})
        found = by_name(stacks, slopes(stacks, 1.0))["w", "B"]
        assert torch.isfinite(found).all() and not found.any()


@pytest.mark.parametrize("mask_target", ["grad", "update"])
def test_off_is_plain_lora(mask_target: Any) -> None:
    runs = []
    for rules in ([], [masked_orthogonal(c=0.0, keep=4, mask_target=mask_target)]):
        model = toy()
        optimizer = optimizer_for(model, rules)
        for t in range(4):
            backward(model, t)
            optimizer.step()
        runs.append(trained(model))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], site: str) -> tuple[list[int], list[int]]:
    """Rows of A and columns of B that moved."""
    A, B = (f"base_model.model.{site}.lora_{x}.default.weight" for x in "AB")
    rows = (before[A] != after[A]).any(dim=1).nonzero().flatten().tolist()
    return rows, (before[B] != after[B]).any(dim=0).nonzero().flatten().tolist()


@pytest.mark.parametrize("draw", ["shared", "separate"])
def test_masked_descent_moves_exactly_q_slots(draw: Any) -> None:
    model = toy()
    optimizer = optimizer_for(model, [masked_orthogonal(c=0.1, keep=2, draw=draw)], descend())
    seen = []
    for t in range(6):
        before = trained(model)
        backward(model, t)
        optimizer.step()
        after = trained(model)
        for site in ("one", "two"):
            rows, columns = changed(before, after, site)
            assert len(rows) == len(columns) == (4 if t == 0 else 2)
            seen.append((rows, columns))
        head = "base_model.model.head.weight"
        assert not torch.equal(before[head], after[head])
    assert all(rows == columns for rows, columns in seen) == (draw == "shared")
    assert len({str(x) for x in seen}) > 3


@pytest.mark.parametrize("mask_target", ["grad", "update"])
def test_what_adam_does_to_masked_slots(mask_target: Any) -> None:
    model = toy()
    rule = masked_orthogonal(c=0.1, keep=2, mask_target=mask_target)
    optimizer = optimizer_for(model, [rule], weight_decay=0.1)
    moved = []
    for t in range(5):
        before = trained(model)
        backward(model, t)
        optimizer.step()
        moved.append(changed(before, trained(model), "one"))
    assert moved[0] == ([0, 1, 2, 3], [0, 1, 2, 3])
    expected = (
        4 if mask_target == "grad" else 2
    )  # momentum and decay move masked slots; restored they are bit-unchanged
    assert all(len(rows) == len(columns) == expected for rows, columns in moved[1:])


def test_masks_are_the_same_on_every_rank_and_differ_by_step_and_module() -> None:
    pairs, rule = [pair(k) for k in range(8)], masked_orthogonal(draw="separate", mask_target="update")
    tensors = named(pairs, {})
    stacks, other = stacks_of(tensors), stacks_of(named(pairs[::-1], {}))
    first = by_name(stacks, rule.grad_mask({}, stacks, ctx()))
    again = by_name(other, rule.update_mask({}, other, ctx()))
    assert first.keys() == again.keys() == tensors.keys()
    for key, mask in first.items():
        assert torch.equal(mask, again[key])
        assert mask.shape == ((4, 1) if key[1] == "A" else (1, 4)) and int(mask.sum()) == 2
    assert len({str(first[p.name, "A"].tolist()) for p in pairs}) > 1
    later = by_name(stacks, rule.grad_mask({}, stacks, ctx(step=3)))
    assert any(not torch.equal(mask, later[key]) for key, mask in first.items())
    assert rule.grad_mask({}, stacks, ctx(step=1)) is None
    assert masked_orthogonal().update_mask({}, stacks, ctx()) is None


def test_expected_share_of_updates() -> None:
    rule, p, n = masked_orthogonal(keep=1), pair(), 1000
    stacks = stacks_of(named([p], {}))
    hits = torch.zeros(4)
    for t in range(2, n + 2):
        mask = by_name(stacks, rule.grad_mask({}, stacks, ctx(step=t)))[p.name, "A"]
        hits += mask.flatten().float()
    assert float(hits.sum()) == n
    assert ((hits / n - 0.25).abs() < 3 * (0.25 * 0.75 / n) ** 0.5 * 1.2).all()


def test_ragged_ranks_and_bad_settings() -> None:
    stacks = stacks_of(named([pair(0, r=1), pair(1, r=3), pair(2, r=4)], {}))
    made = by_name(stacks, masked_orthogonal().grad_mask({}, stacks, ctx()))
    assert [int(made[f"w{k}", "A"].sum()) for k in range(3)] == [1, 2, 2]
    with pytest.raises(LoralignError, match="w0 has 1"):
        masked_orthogonal(keep=2).grad_mask({}, stacks_of(named([pair(0, r=1)], {})), ctx())
    with pytest.raises(LoralignError, match="keep must be at least 1"):
        masked_orthogonal(keep=0)


def test_rm_lora_twice_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        model = toy()
        optimizer = optimizer_for(model, [masked_orthogonal()], seed=3, max_grad_norm=1.0)
        for t in range(4):
            backward(model, t)
            optimizer.step()
        runs.append(trained(model))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


# -------------------------------------------------------------------------------------------------------- Delta-LoRA


def slope_of(x: Tensor, y: Tensor) -> Any:
    """W -> dL/dW of the mean squared error of one linear map."""
    return lambda W: 2 * (x @ W.T - y).T @ x / y.numel()


def drive(model: Any, optimizer: PairOptimizer) -> Driver:
    """The driver of a bare loop over these rules."""
    made = build("lora")
    assert isinstance(made, Recipe)
    driver = Driver(replace(made, rules=optimizer.rules), model, optimizer)
    driver.begin(100)
    return driver


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("wait", [0, 7])
def test_virtual_equals_literal(wait: int, decay: float) -> None:
    boost, steps, lr, r = 2.0, 40, 1e-2, 3
    base = nn.Linear(10, 6, bias=False).double()
    base.weight.data.copy_(normal(6, 10, seed=1))
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=r, target_modules=["0"], lora_alpha=2 * r)).double()
    (site,) = sites(model)
    begin = Start(normal(r, 10, seed=2), torch.zeros(6, r))
    install(site.layer, site.adapter, begin, boosted(boost), Own(), chain=False)
    optimizer = optimizer_for(model, [snapshot(boost, wait)], lr=lr, weight_decay=decay)
    x, y = normal(16, 10, seed=3), normal(16, 6, seed=4)
    want = delta_lora.literal(
        normal(6, 10, seed=1), begin.A, begin.B.double(), site.s, slope_of(x, y),
        steps=steps, boost=boost, wait=wait, lr=lr, weight_decay=decay,
    )  # fmt: skip
    driver = drive(model, optimizer)
    for t, (W_eff, A, B, W) in enumerate(want):
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        (model(inputs) - y).square().mean().backward()
        before = want[t - 1][0] if t else normal(6, 10, seed=1)
        close(inputs.grad, 2 * (x @ before.T - y) @ before / y.numel())
        optimizer.step()
        driver.after_step()
        assert driver.changes == [(wait + 1, 1)] * (t >= wait)
        live = {n.split(".")[-3]: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        close(live["lora_A"], A)
        close(live["lora_B"], B)
        folded = factors(site)
        made = normal(6, 10, seed=1) + folded[1].double() @ folded[0].double()
        close(made, W_eff, 1e-6)  # factors() are fp32
        close(model(x).detach(), x @ W_eff.T)
        if t > wait:
            close(W, normal(6, 10, seed=1) + boost * site.s * (B @ A - want[wait][2] @ want[wait][1]))
    assert folded[0].shape == (2 * r, 10) and torch.linalg.matrix_rank(want[-1][0] - normal(6, 10, seed=1)) <= 2 * r
    assert torch.equal(base.weight, normal(6, 10, seed=1))


def test_before_the_snapshot_it_is_lora_bit_for_bit() -> None:
    runs = []
    for form, rules in ((plain(), []), (boosted(), [snapshot(wait_steps=6)])):
        model = toy(form, start=0.0)
        optimizer = optimizer_for(model, rules)
        driver = drive(model, optimizer)
        for t in range(6):
            backward(model, t)
            optimizer.step()
            driver.after_step()
        assert not driver.changes
        runs.append(trained(model))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_without_boost_it_is_lora() -> None:
    runs = []
    for form, rules in ((plain(), []), (boosted(0.0), [snapshot(0.0, 1)])):
        model = toy(form, start=0.0)
        optimizer = optimizer_for(model, rules)
        driver = drive(model, optimizer)
        for t in range(6):
            backward(model, t)
            optimizer.step()
            driver.after_step()
        runs.append(trained(model))
    for k in runs[0]:
        close(runs[1][k], runs[0][k], 1e-12)


def test_the_snapshot_does_not_move_the_function_and_export_is_exact() -> None:
    model = toy(boosted(2.0))
    optimizer = optimizer_for(model, [snapshot(2.0, 1)])
    driver = drive(model, optimizer)
    for t in range(2):
        backward(model, t)
        optimizer.step()
        x = normal(5, 10, seed=9)
        before = model(x).detach()
        driver.after_step()
    assert driver.changes == [(2, 2)]
    close(model(x).detach(), before, 1e-12)
    for t in range(3):
        backward(model, t)
        optimizer.step()
        driver.after_step()
    before = model(x).detach()
    model.merge_adapter()
    close(model(x).detach(), before, 1e-10)
    model.unmerge_adapter()
    close(model(x).detach(), before, 1e-10)


def test_resume_needs_the_frozen_slots_and_nothing_else() -> None:
    def run(model: Any, optimizer: PairOptimizer, steps: range) -> None:
        driver = drive(model, optimizer)
        for t in steps:
            backward(model, t)
            optimizer.step()
            driver.after_step()

    model = toy(boosted())
    optimizer = optimizer_for(model, [snapshot(wait_steps=1)])
    run(model, optimizer, range(4))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    frozen = [
        (s.layer.lora_A["default"].frozen.clone(), s.layer.lora_B["default"].frozen.clone()) for s in sites(model)
    ]
    state = copy.deepcopy(optimizer.state_dict())
    other = toy(boosted())
    for n, p in other.named_parameters():
        write(p, kept[n])
    for s, (A0, B0) in zip(sites(other), frozen, strict=True):
        s.layer.lora_A["default"].frozen, s.layer.lora_B["default"].frozen = A0, B0
    again = optimizer_for(other, [snapshot(wait_steps=1)])
    again.load_state_dict(state)
    run(model, optimizer, range(4, 7))
    run(other, again, range(4, 7))
    for n, p in other.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[n]), n


def test_gradients_are_those_of_the_plain_pair() -> None:
    A, B = normal(3, 10, seed=1).requires_grad_(), normal(6, 3, seed=2).requires_grad_()
    G, boost = normal(6, 10, seed=3), 2.0
    made = [f.dense() for f in boosted(boost).factors(Live(A, B, A.detach() + 1, -boost * B.detach(), {}), ())]
    assert torch.equal(made[0][:3], A) and made[1].shape == (6, 6)
    gA, gB = torch.autograd.grad((made[1] @ made[0] * G).sum(), (A, B))
    close(gA, B.detach().T @ G, 1e-14)
    close(gB, G @ A.detach().T, 1e-14)


def test_event_comes_once_after_the_waiting_steps() -> None:
    p = pair()
    site = SiteShape(p.name, 4, 12, 10, 2.0)
    moments = [Moment(t, 10, [site], {}, {}, (), {}, ctx().draw) for t in range(8)]
    plans = [snapshot(2.0, 3).step({}, m)[1] for m in moments]
    assert [plan is not None for plan in plans] == [t == 4 for t in range(8)]
    assert plans[4] == (Freeze(p.name, -2.0),)
    with pytest.raises(LoralignError, match="wait_steps"):
        snapshot(wait_steps=-1)
    with pytest.raises(LoralignError, match="boost"):
        boosted(-1.0)


def test_types() -> None:
    assert isinstance(masked_orthogonal(), Rule) and isinstance(snapshot(), Rule) and isinstance(boosted(), Form)


@pytest.mark.parametrize(("wait", "warned"), [(1, False), (2, True), (500, True)])
def test_a_run_that_is_too_short_is_warned_of(
    wait: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three steps: a snapshot after step 2 changes the third one; later it changes nothing, and the log says so."""
    made = build("delta-lora", {"wait_steps": wait}, r=2, alpha=4.0)
    assert isinstance(made, Recipe)
    trainer = toy_trainer(tmp_path, peft_config(made, llama()), steps=3)
    attach(trainer, made)
    assert caplog.messages == [idle(made, 3)] * warned  # before the first step
    with caplog.at_level("INFO", "loralign"):
        trainer.train()
    assert caplog.text.count("its rule act") == warned
    assert ("slots changed at 14 sites after step 2" in caplog.text) is not warned
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert LoraConfig.from_pretrained(tmp_path / "adapter").r == (2 if wait > 2 else 4)


def test_a_run_by_epochs_or_one_that_is_stopped_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An epoch of 16 rows is 4 steps, known when training begins; after step 2 of 4 nothing has acted yet."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    expected = {
        (3, False): "and the run has 4 steps",
        (2, False): "",
        (2, True): "stopped after step 2, before its rule",
    }
    for (wait, stopped), part in expected.items():
        made = build("delta-lora", {"wait_steps": wait}, r=2, alpha=4.0)
        assert isinstance(made, Recipe)
        trainer = toy_trainer(tmp_path, peft_config(made, llama()), steps=-1, num_train_epochs=1)
        attach(trainer, made)
        trainer.add_callback(Stop() if stopped else TrainerCallback())
        caplog.clear()
        with caplog.at_level("INFO", "loralign"):
            trainer.train()
        said = [message for message in caplog.messages if "its rule act" in message]
        assert len(said) == bool(part) and all(part in message for message in said)
