"""XGBLoRA's boosters at parts of the layers, their ragged export, and ReLoRA's schedule (methods/chain.md §3, §4)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loralign import drive, export, factors, optimizer, sites
from loralign.carrier.sites import draw_for
from loralign.carrier.slot import live_of
from loralign.methods.outer.xgblora import boosters, layers_of
from oracles import relora, xgblora
from test_chains import begun, deltas, line, logits, made, one_step, trained
from toy import batch_for, llama

NAMES = [f"model.layers.{i}.{kind}" for i in range(6) for kind in ("q_proj", "v_proj")]


def hits(choice: Any, rounds: int, seed: int = 0, fraction: float = 1 / 3) -> Counter[str]:
    outer = boosters(fraction, link_steps=1, choice=choice)
    found: Counter[str] = Counter()
    for k in range(rounds):
        episode = outer.episode(k, rounds, NAMES, draw_for(seed))
        assert episode is not None and episode.sites is not None
        found.update(episode.sites)
    return found


def test_layers_are_what_comes_before_the_first_number() -> None:
    assert [len(v) for v in layers_of(NAMES).values()] == [2] * 6
    assert list(layers_of(["encoder.layer.0.attention.q.1", "encoder.layer.0.x", "encoder.layer.10.x", "head"])) == [
        "encoder.layer.0", "encoder.layer.10", "head",
    ]  # fmt: skip


@pytest.mark.parametrize(("share", "ranks"), [(1.0, (1, 2, 3, 4, 5)), (0.5, (1, 2, 3, 3, 3, 4, 4, 4))])
def test_exact_boosters_are_eckart_young(share: float, ranks: tuple[int, ...]) -> None:
    """X1, through the driver: each link is set to (a share of) the residual's top pair. Shrunken ones use directions
    again: so many boosters are not so much rank."""
    recipe = made("xgblora", {"link_steps": 1, "fraction": 1.0}, r=1, alpha=1.0, targets=("map",), max_grad_norm=0.0)
    model = line(recipe, d_out=6, d_in=5)
    (site,) = sites(model)
    W0, goal = site.layer.get_base_layer().weight.detach(), torch.zeros(6, 5, dtype=torch.float64)
    goal[:5] = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    opt = optimizer(model, recipe, 0.0)
    driver = drive(model, recipe, opt, len(ranks))
    left = [5.0, 4.0, 3.0, 2.0, 1.0]
    for rank in ranks:
        A, B = factors(site)
        gap = goal - B.double() @ A.double()
        U, S, Vh = torch.linalg.svd(gap)
        now = live_of(site.layer, site.adapter)
        now.A.data.copy_(Vh[:1])
        now.B.data.copy_(share * U[:, :1] * S[0])
        loss = 0.5 * (model(torch.eye(5, dtype=torch.float64)).T - W0 - goal).square().sum()
        largest = max(range(5), key=lambda k: left[k])
        left[largest] *= 1 - share
        assert loss.item() == pytest.approx(xgblora.left(left, 0), rel=1e-5, abs=1e-5)
        loss.backward()
        opt.step()
        opt.zero_grad()
        driver.after_step()
        assert torch.linalg.matrix_rank(deltas(model)[0], atol=1e-4) == rank


def test_a_deal_trains_every_layer_once_per_cycle() -> None:
    """X2: with the deal each of 6 layers is hit exactly 3 times in 9 rounds of 2, so that nothing is left of rank 3."""
    assert hits("deal", 9) == dict.fromkeys(NAMES, 3)
    assert sum(xgblora.left((3, 2, 1), hits("deal", 9)[name]) for name in NAMES[::2]) == 0
    assert set(hits("deal", 2, fraction=0.7).values()) == {1}  # hands of 4 and 2
    assert hits("deal", 1, seed=0) != hits("deal", 1, seed=3)


def test_uniform_draws_leave_what_the_binomial_says() -> None:
    """X2: 3.55 of 42, over 300 runs; X5: in sum T·L_s hits of the layers."""
    found = []
    for seed in range(300):
        counts = hits("uniform", 9, seed)
        assert sum(counts.values()) == 9 * 2 * 2
        found.append(sum(xgblora.left((3, 2, 1), counts[name]) for name in NAMES[::2]))
    want = xgblora.expected((3, 2, 1), 6, 2, 9)
    assert want == pytest.approx(3.5507, abs=1e-4)
    assert sum(found) / 300 == pytest.approx(want, abs=0.6)  # four standard errors


def test_sleeping_sites_stay_as_they_are() -> None:
    """X3: bitwise, without gradient, state or decay, and the clip does not see them."""
    model, opt, driver = begun(made("xgblora", {"fraction": 0.5, "link_steps": 2}, r=1, weight_decay=0.3), 4)
    asleep: list[set[str]] = []
    for step in range(4):
        rest = [s for s in sites(model) if s.name in opt.asleep]
        before = [live_of(s.layer, s.adapter) for s in rest]
        kept = [(live.A.detach().clone(), live.B.detach().clone()) for live in before]
        asleep.append(set(opt.asleep))
        model.train()
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        assert opt.applied == len(rest) == 7
        for live, (A, B) in zip(before, kept, strict=True):
            assert torch.equal(live.A, A) and torch.equal(live.B, B)
            assert live.A.grad is None and live.B.grad is None
        if step < 2:
            assert not any(opt.state[p] for live in before for p in (live.A, live.B))
        driver.after_step()
        opt.zero_grad()
    assert asleep[0] == asleep[1] and not asleep[0] & asleep[2]  # two layers, dealt out


@pytest.mark.parametrize("name", ["lora", "chain-of-lora"])
def test_boosters_of_all_layers_are_chains(name: str) -> None:
    """X4: one booster is plain LoRA; several are Chain of LoRA; bit for bit."""
    length = 9 if name == "lora" else 2
    options = {} if name == "lora" else {"link_steps": 2, "warm_up_steps": 0}
    ours = trained(made("xgblora", {"fraction": 1.0, "link_steps": length}, r=1), 4)
    for one, other in zip(deltas(ours), deltas(trained(made(name, options, r=1), 4)), strict=True):
        assert one.any() and torch.equal(one, other)


def test_the_export_has_the_rank_of_the_boosters_and_no_other_modules(tmp_path: Path) -> None:
    """X5: rank of a module = boosters that trained it; a module that none trained is no target; stock PEFT agrees."""
    recipe = made("xgblora", {"fraction": 0.25, "link_steps": 2, "choice": "uniform"}, r=1)
    base = llama(num_hidden_layers=4)
    from loralign import adapt, drive, optimizer

    model = adapt(base, recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, 6)
    wanted: Counter[str] = Counter()
    for step in range(6):
        if step % 2 == 0:
            wanted.update(s.name for s in sites(model) if s.name not in opt.asleep)
        one_step(model, opt, driver, step)
    assert 0 < len(wanted) < len(sites(model)), "choose another seed: every layer was drawn"
    before = logits(model)
    for profile in ("peft", "portable"):
        export(model, tmp_path / profile, profile=profile, base_id="toy/base", probes=batch_for(model))  # type: ignore[arg-type]
        stock = PeftModel.from_pretrained(llama(num_hidden_layers=4), tmp_path / profile)
        assert (logits(stock) - before).norm() <= 1e-6 * before.norm(), profile
    found = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): value.shape[0]
        for key, value in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()
        if "lora_A" in key
    }
    assert found == dict(wanted)
    assert {factors(site)[0].shape[0] for site in sites(model) if site.name not in wanted} == {1}


def test_relora_warms_up_to_its_schedule_again() -> None:
    """The code's values outside of a warm-up; within one ours follows the schedule from the link's first step on."""
    recipe = made("relora", {"link_steps": 5000, "warm_up_steps": 100})
    _, opt, driver = begun(recipe, 20000)

    def course(t: int) -> float:
        return relora.cosine(t, 20000, 500, 0.1)

    def ours(t: int) -> float:
        driver.episodes.begin(20000, opt, t // 5000, t // 5000 * 5000)
        return driver.episodes.lr_factor(t, course) * course(t)

    table = {250: 0.5, 4999: 0.886878, 5100: 0.881979, 9999: 0.568192, 10100: 0.560874, 15100: 0.233086, 19999: 0.1}
    for t, value in table.items():
        assert relora.jagged(t, 20000, 500, 0.1, 5000, 100) == pytest.approx(value, abs=1e-6)
        assert ours(t) == pytest.approx(value, abs=1e-6), t
    assert relora.jagged(5050, 20000, 500, 0.1, 5000, 100) == pytest.approx(0.440989, abs=1e-6)
    assert ours(5000) == pytest.approx(0.01 * course(5000)) and ours(5049) == pytest.approx(0.440989, rel=5e-3)
