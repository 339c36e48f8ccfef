"""SD-LoRA's form, its links and their variants against the oracle (methods/structure.md §6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from loralign import LoralignError, Recipe, adapt, build, drive, factors, optimizer, sites
from loralign.carrier.absorb import combination, gram_of
from loralign.carrier.slot import live_of, shared_of
from loralign.config.recipe import parse, to_recipe
from loralign.maths.linalg import product_norm
from loralign.methods.form.sd_lora import directions
from loralign.methods.outer.chain import chain_of_links
from loralign.methods.outer.sd_lora import task_links
from loralign.methods.transform.adamw import AdamW
from loralign.plan.combinations import check_combination
from loralign.types import Episode, Facts, Live
from oracles import sd_lora as oracle
from toy import batch_for, llama


def made(options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    recipe = build("sd-lora", {"tasks": 3, **(options or {})}, **{"r": 3, "seed": 5, **fields})
    assert isinstance(recipe, Recipe)
    return recipe


class NoSlots(AdamW):
    """An optimizer that says nothing of slots that do not train."""

    facts = Facts(accepts=frozenset({"one_sided", "gated", "elementwise"}))


class Run:
    """A bare loop of six steps, three links."""

    def __init__(self, recipe: Recipe, steps: int = 6) -> None:
        self.model = adapt(llama(), recipe)
        self.opt = optimizer(self.model, recipe, 1e-2)
        self.driver = drive(self.model, recipe, self.opt, steps)
        self.site: Any = sites(self.model)[0]

    def step(self, seed: int) -> tuple[Tensor, Tensor]:
        """Logits before and after what happens between two steps."""
        self.model.train()
        self.model(**batch_for(self.model, seed=seed)).loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        self.model.eval()
        before = self.logits()
        self.driver.after_step()
        return before, self.logits()

    @torch.no_grad()
    def logits(self) -> Tensor:
        out: Tensor = self.model(**batch_for(self.model)).logits
        return out

    @property
    def alpha(self) -> Tensor:
        return shared_of(self.model.base_model)["alpha"].detach()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ the form


@pytest.mark.parametrize("current", ["unit", "raw"])
@pytest.mark.parametrize("norm", ["product", "factors"])
@pytest.mark.parametrize("links", [(), (2, 3)])
def test_factors_are_the_sum_of_weighted_directions(current: Any, norm: Any, links: tuple[int, ...]) -> None:
    form = directions(tasks=4, current=current, norm=norm, epsilon=0.1)
    A, B = drawn(3, 10), drawn(8, 3, seed=1)
    kept = [(drawn(r, 10, seed=2 + r), drawn(8, r, seed=9 + r)) for r in links]
    A0, B0 = torch.cat([drawn(0, 10), *(a for a, _ in kept)]), torch.cat([drawn(8, 0), *(b for _, b in kept)], dim=1)
    alpha = drawn(4, seed=7)
    live = Live(A, B, A0, B0, {}, {"alpha": alpha}, links)
    found = [f.dense() for f in form.factors(live, ())]
    last = oracle.direction(B, A, 0.1, norm) if current == "unit" else B @ A
    want = oracle.effective(torch.zeros(8, 10, dtype=torch.float64), [*(b @ a for a, b in kept), last], alpha)
    torch.testing.assert_close(found[1] @ found[0], want, atol=1e-12, rtol=0)


def test_the_codes_norm_is_larger_and_equal_at_rank_one() -> None:
    """‖B·A‖ / (‖B‖·‖A‖): near 1/√r of random factors, 1 at r = 1, so weights under the two are not comparable."""
    ratios = [float(product_norm(drawn(400, 10, seed=k), A) / (drawn(400, 10, seed=k).norm() * A.norm()))
              for k in range(5) for A in [drawn(10, 400, seed=50 + k)]]  # fmt: skip
    assert sum(ratios) / 5 == pytest.approx(10**-0.5, rel=0.03)
    one = Live(drawn(1, 9), drawn(7, 1), drawn(0, 9), drawn(7, 0), {}, {"alpha": torch.ones(1).double()})
    both = [directions(tasks=1, norm=n).link(one)[1] for n in ("product", "factors")]  # type: ignore[arg-type]
    torch.testing.assert_close(*both, atol=1e-12, rtol=0)


def test_one_task_with_the_weight_of_its_length_is_lora_of_scale_one() -> None:
    A, B = drawn(3, 10), drawn(8, 3, seed=1)
    length = (B @ A).norm()
    live = Live(A, B, drawn(0, 10), drawn(8, 0), {}, {"alpha": length.reshape(1)})
    found = [f.dense() for f in directions(tasks=1, epsilon=1e-9).factors(live, ())]
    torch.testing.assert_close(found[1] @ found[0], B @ A, atol=1e-12, rtol=0)


def test_numbers_that_train_in_the_papers_setting() -> None:
    """ViT-B/16, q and v, r = 10: 368,640 and one weight per task."""
    config = ViTConfig()
    with torch.device("meta"):
        base = ViTModel(config, add_pooling_layer=False)
    from loralign.carrier.sites import put_in

    model = put_in(base, made({"tasks": 20}, r=10, targets=("q_proj", "v_proj")))
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == 368_640
    assert directions(tasks=20).shared()["alpha"].numel() == 20


# ----------------------------------------------------------------------------------------------------------- the links


@pytest.mark.parametrize("current", ["unit", "raw"])
def test_a_switch_keeps_the_function_and_the_directions(current: str) -> None:
    """The end of a task is the start of the next; kept directions stay bit for bit while their weights move."""
    run = Run(made({"current": current}))
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(6):
        before, after = run.step(step)
        assert (after - before).norm() <= 1e-6 * before.norm(), step
        live = live_of(run.site.layer, "default")
        if step % 2 == 0 and kept:
            A, B = kept[-1]
            assert torch.equal(live.A0, A) and torch.equal(live.B0, B)
        kept.append((live.A0.clone(), live.B0.clone()))
    live = live_of(run.site.layer, "default")
    assert live.links == (3, 3) and (run.alpha != 1).all()
    assert factors(run.site)[0].shape[0] == 9
    assert torch.linalg.matrix_rank(torch.mm(*factors(run.site)[::-1]), atol=1e-5) <= 9
    if current == "unit":
        for A, B in zip(live.A0.split(3), live.B0.split(3, dim=1), strict=True):
            assert 0.5 < float((B @ A).norm()) < 1  # a length of 1, but for ε


def test_one_weight_serves_all_modules_and_starts_again_with_every_link() -> None:
    run = Run(made({"magnitude": 0.8}, weight_decay=0.5))
    assert torch.equal(run.alpha, torch.full((3,), 0.8))
    run.step(0)
    assert torch.equal(run.alpha, torch.full((3,), 0.8))  # no gradient while B = 0, and no decay of weights
    run.step(1)
    assert run.alpha[0] != 0.8 and torch.equal(run.alpha[1:], torch.full((2,), 0.8))
    shared = run.model.base_model.lora_shared["alpha"]
    assert not run.opt.state[shared]  # a fresh optimizer for the new link, of the weights too
    assert {id(s.layer.lora_variant["default"].shared["alpha"]) for s in sites(run.model)} == {id(shared)}  # type: ignore[index, union-attr]


def test_more_links_than_weights_is_one_sentence() -> None:
    recipe = replace(made({"tasks": 2}), outer=chain_of_links(links=3))
    run = Run(recipe)
    with pytest.raises(LoralignError, match="weights for 2 tasks, and another one begins: raise `tasks`"):
        for step in range(6):
            run.step(step)


def test_cut_links_and_pairwise_steps_are_refused() -> None:
    with pytest.raises(LoralignError, match=r"weighs each link, and cut links .* leave `keep_slots` out"):
        check_combination(replace(made(), outer=chain_of_links(links=2, keep_slots=2)))
    with pytest.raises(LoralignError, match="later links train fewer slots"):
        narrow = task_links(tasks=4, later_ranks=(1,), tasks_per_rank=1)
        check_combination(replace(made(), outer=narrow, transform=NoSlots((0.9, 0.999), 1e-8)))
    with pytest.raises(LoralignError, match="computes the factors"):
        check_combination(build("sd-lora + lora-pro"))  # type: ignore[arg-type]


class Net(nn.Module):
    """8-10-6 with a tanh between, and a head of six classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return out


def batches(task: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(drawn(12, 8, seed=100 * task + k), torch.arange(12) % 2 + 2 * task) for k in range(count)]


@pytest.mark.parametrize("current", ["unit", "raw"])
@pytest.mark.parametrize("norm", ["product", "factors"])
def test_training_is_that_of_an_independent_loop(current: Any, norm: Any) -> None:
    """Three tasks of five Adam steps, loss among the classes of the task: every weight as the oracle's own loop over
    dense matrices leaves it, in float64."""
    torch.manual_seed(3)
    base = Net().double()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    options = {"current": current, "norm": norm, "epsilon": 0.125, "magnitude": 0.75}
    recipe = made(options, r=2, targets=("up", "down"), max_grad_norm=0.0)
    model = adapt(base, recipe).double()
    for p in base.head.parameters():
        p.requires_grad_(True)
    opt = optimizer(model, recipe, 2e-2)
    driver = drive(model, recipe, opt, 15)
    starts: list[dict[str, Tensor]] = []
    for task in range(3):
        starts.append({s.name: live_of(s.layer, s.adapter).A.detach().clone() for s in sites(model)})
        opt.state.clear()  # as `loralign tasks`: a fresh optimizer for the head too
        for x, y in batches(task, 5):
            logits = model(x)[:, 2 * task : 2 * task + 2]
            torch.nn.functional.cross_entropy(logits, y - 2 * task).backward()
            opt.step()
            opt.zero_grad()
            driver.after_step()
    tasks = [batches(task, 5) for task in range(3)]
    want = oracle.trained(weights, starts, tasks, lr=2e-2, magnitude=0.75, epsilon=0.125, norm=norm, current=current)
    torch.testing.assert_close(shared_of(model.base_model)["alpha"].detach(), want.alpha, atol=1e-9, rtol=0)
    for site in sites(model):
        A, B = factors(site)
        gap = want.weights[f"{site.name}.weight"] - weights[f"{site.name}.weight"]
        torch.testing.assert_close((B @ A).double(), gap, atol=1e-6, rtol=0)
    torch.testing.assert_close(base.head.weight.detach(), want.weights["head.weight"], atol=1e-9, rtol=0)


def test_a_length_is_not_rounded_by_autocast() -> None:
    """bf16 has three digits: under autocast the length of a direction stays that of the factors."""
    run = Run(made())
    for step in range(3):
        run.step(step)
    variant: Any = run.site.layer.lora_variant["default"]
    want = [f.dense() for f in variant.operators(run.site.layer, "default")]
    with torch.autocast("cpu", torch.bfloat16):
        found = [f.dense() for f in variant.operators(run.site.layer, "default")]
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True)) and want[1].any()


# ------------------------------------------------------------------------------------------------------------ variants


def test_ranks_fall_as_the_paper_says() -> None:
    outer = task_links(tasks=10, later_ranks=(8, 6))
    episodes = [outer.episode(k, 100, (), lambda *_: torch.Generator()) for k in range(10)]  # type: ignore[arg-type]
    found = [10 if e is None or e.slots is None else e.slots for e in episodes]
    assert found == [oracle.rank_of_task(t, (10, 8, 6), 4, 8) for t in range(1, 11)]
    assert sum(found) == 84


def test_a_link_of_lower_rank_trains_and_keeps_so_many_slots() -> None:
    run = Run(made({"later_ranks": (2, 1), "tasks_per_rank": 1}))
    for step in range(6):
        before, after = run.step(step)
        assert (after - before).norm() <= 1e-6 * before.norm()
    live = live_of(run.site.layer, "default")
    assert live.links == (3, 2) and live.B0.any(dim=0).all()
    assert live.B.any(dim=0).tolist() == live.A.any(dim=1).tolist() == [True, False, False]


def planted(r: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    """Per site D_1, D_2 and D_3 = the normalised 0.3·D_1 − 0.7·D_2, of rank 2r, as (A, B)."""
    found = []
    for k in range(3):
        pairs = [
            (drawn(r, 10, seed=k), drawn(8, r, seed=10 + k)),
            (drawn(r, 10, seed=20 + k), drawn(8, r, seed=30 + k)),
        ]
        pairs = [(A, B / (B @ A).norm()) for A, B in pairs]
        (A1, B1), (A2, B2) = pairs
        A, B = torch.cat([A1, A2]), torch.cat([0.3 * B1, -0.7 * B2], dim=1)
        found.append([*pairs, (A, B)])
    return found


def test_distillation_is_the_dense_least_squares() -> None:
    sets = planted()
    c, left = combination(gram_of(sets))
    torch.testing.assert_close(c, torch.tensor([0.3, -0.7], dtype=torch.float64), atol=1e-9, rtol=0)
    assert left < 1e-12
    for links in sets:
        links[-1] = (drawn(2, 10, seed=77), links[-1][1][:, :2])
    c, left = combination(gram_of(sets))
    want, share = oracle.distilled([[B @ A for A, B in links] for links in sets])
    torch.testing.assert_close(c, want, atol=1e-9, rtol=0)
    assert left == pytest.approx(share, rel=1e-9) and left > 0.1


def test_a_link_that_repeats_the_others_is_dropped_and_nothing_moves() -> None:
    """The third link is −0.7 times the first one at every site: absorbed, and the function stays."""
    run = Run(made({"tasks": 4, "absorb": 9e-4, "current": "raw"}, max_grad_norm=0.0), steps=8)
    for step in range(4):
        run.step(step)
    for group in run.opt.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        for site in sites(run.model):
            live = live_of(site.layer, "default")
            live.A.copy_(live.A0[:3])
            live.B.copy_(-0.7 * live.B0[:, :3])
        shared_of(run.model.base_model)["alpha"][2] = 0.6
    alpha = run.alpha.clone()
    for step in range(4, 6):
        before, after = run.step(step)
        assert (after - before).norm() <= 2e-6 * before.norm()
    assert live_of(run.site.layer, "default").links == (3, 3)
    want = alpha + torch.tensor([-0.7, 0.0, 0.0, 0.0]) * alpha[2]
    want[2] = 1.0  # the next link's weight starts again
    torch.testing.assert_close(run.alpha, want, atol=1e-5, rtol=0)


def test_links_that_say_something_new_are_kept() -> None:
    run = Run(made({"absorb": 9e-4}))
    for step in range(6):
        run.step(step)
    assert live_of(run.site.layer, "default").links == (3, 3)


def test_presets_and_options_of_a_file(tmp_path: Path) -> None:
    content = {"model": "m", "data": {"train": "x"}, "output": "o", "method": "sd-lora"}
    recipe = to_recipe(parse({**content, "preset": "paper-rr", "options": {"tasks": 20}}))
    assert isinstance(recipe, Recipe) and recipe.s() == 1.0 and recipe.r == 10
    assert recipe.outer == task_links(tasks=20, later_ranks=(8, 6))
    code = to_recipe(parse({**content, "preset": "code"}))
    assert isinstance(code, Recipe) and code.form == directions(current="raw", norm="factors", magnitude=0.8)
    with pytest.raises(LoralignError, match=r"options\.later_ranks"):
        parse({**content, "options": {"later_ranks": [0]}})
    assert isinstance(recipe.outer.episode(5, 100, (), lambda *_: torch.Generator()), Episode)  # type: ignore[arg-type]
