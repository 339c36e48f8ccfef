"""Rules that move slots at a constant budget: BeamLoRA's copies, ALoRA's allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from loralign import LoralignError, Recipe, adapt, build, drive, optimizer, sites
from loralign.carrier.slot import live_of, trained_of
from loralign.evidence.inputs import InputTap, norms
from loralign.methods import rule as rules
from loralign.methods.form.gated import beam
from loralign.methods.rule.allocating_lora import spread
from loralign.methods.rule.beamlora import beyond, threshold
from loralign.methods.rule.prilora import depth_and_pruning, least, ranks_by_depth
from loralign.optim.stacks import Scratch
from loralign.plan.combinations import check_combination
from loralign.plan.course import check_length
from loralign.train.driver import Driver
from loralign.train.events import agreed, apply_plan
from loralign.train.stage import Stage
from loralign.types import (
    Copy,
    Elements,
    Freeze,
    InputSquares,
    Live,
    Moment,
    Off,
    On,
    Plan,
    Prox,
    RuleState,
    Set,
    Unborn,
    Verb,
    Zero,
    ZeroWhere,
)
from oracles import allocating_lora, beamlora, prilora
from short_runs import driven
from stacking import stacks_of
from toy import batch_for, llama, t5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return out


def made(name: str, **options: Any) -> Recipe:
    recipe = build(name, options, r=4, alpha=8.0, targets=("one", "two", "three"), max_grad_norm=0.0)
    assert isinstance(recipe, Recipe)
    return recipe


def net(recipe: Recipe) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return adapt(Net(), recipe).double()


def backward(model: Any, t: int = 0) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    for p in model.parameters():
        p.grad = None
    (model(x) - x.flip(1).sin()).square().mean().backward()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ BeamLoRA


def test_the_threshold_and_the_cut_equal_the_oracle() -> None:
    values = [threshold(t, 1.0, 0.95) for t in (0, 0.25, 0.5, 0.75, 1, 2)]
    assert values == pytest.approx([0.95, 0.9573, 0.975, 0.9927, 1, 1], abs=1e-4)
    assert values == pytest.approx([beamlora.p(t, 1.0) for t in (0, 0.25, 0.5, 0.75, 1, 2)])
    for seed in range(20):
        phi = {name: normal(5, seed=seed + k).exp() for k, name in enumerate("xyz")}
        got = {(n, j) for n, at in beyond(phi, 0.9).items() for j in at}
        assert got == beamlora.overwritten({n: v.tolist() for n, v in phi.items()}, 0.9)
    assert sum(map(len, beyond({"a": torch.ones(100)}, 0.95).values())) == 5
    assert beyond({"a": torch.ones(100)}, 1.0) == {}


def test_beams_sum_to_r_and_start_as_plain_lora() -> None:
    own = Live(normal(4, 3), normal(5, 4), normal(0, 3), normal(5, 0), {"gate": normal(4, seed=1) / 20})
    B = beam(0.05).factors(own, ())[1].dense()
    phi = B[0] / own.B[0]
    assert phi.tolist() == pytest.approx(beamlora.shares(own.own["gate"].tolist(), 0.05)) and (phi > 0).all()
    assert float(phi.sum()) == pytest.approx(4)
    shifted = beam(0.05).factors(own._replace(own={"gate": own.own["gate"] + 3}), ())[1].dense()
    assert torch.allclose(B, shifted)
    still = beam(0.05).factors(own._replace(own={"gate": torch.zeros(4, dtype=torch.float64)}), ())[1].dense()
    assert torch.equal(still, own.B)


def test_an_event_copies_what_donors_were_and_touches_nothing_else() -> None:
    recipe = made("beamlora", interval=6, keep=0.5, until=1.0)
    model = net(recipe)
    opt = optimizer(model, recipe, 3e-2)
    driver = drive(model, recipe, opt, 18)
    then: dict[str, tuple[Tensor, Tensor]] = {}
    events = 0
    for t in range(1, 19):
        backward(model, t)
        opt.step()
        before = {s.name: _values(s) for s in sites(model)}
        v_before = {s.name: opt.state[_A(s)]["exp_avg_sq"].clone() for s in sites(model)}
        driver.after_step()
        if t % 6 == 4:
            then = {name: (A, B) for name, (A, B, _) in before.items()}
        for site in sites(model):
            A, B, c = _values(site)
            A0, B0, c0 = before[site.name]
            moved = (A != A0).any(1).nonzero().flatten().tolist()
            if t not in (6, 12):
                assert not moved
                continue
            phi = torch.softmax(c0 / 0.05, 0)
            for low in moved:
                donors = [d for d in range(4) if torch.equal(A[low], then[site.name][0][d])]
                assert len(donors) == 1 and torch.equal(B[:, low], then[site.name][1][:, donors[0]])
                assert phi[donors[0]] >= phi[low] and c[low] == c[donors[0]] and donors[0] not in moved
                assert not opt.state[_A(site)]["exp_avg"][low].any(), "m of a copied slot starts anew"
            rest = [j for j in range(4) if j not in moved]
            assert torch.equal(A[rest], A0[rest]) and torch.equal(B[:, rest], B0[:, rest]) and len(moved) <= 2
            assert torch.equal(opt.state[_A(site)]["exp_avg_sq"][rest], v_before[site.name][rest])
            if moved:
                assert not opt.state[trained_of(site.layer, "default")["gate"]]["exp_avg"].any()
            events += len(moved)
    assert events > 0


def test_an_event_after_step_t_has_the_threshold_of_t_minus_1() -> None:
    """p(1) = 0.75 where p(2) = 1, which would copy nothing."""
    recipe = made("beamlora", interval=2, keep=0.5, until=0.5)
    model = net(recipe)
    _, driver = driven(model, recipe, backward, range(1, 5), 4, 1e-3)
    assert [step for step, _ in driver.changes] == [2]


def _A(site: Any) -> Any:
    return live_of(site.layer, site.adapter).A


def _values(site: Any) -> tuple[Tensor, Tensor, Tensor]:
    live = live_of(site.layer, site.adapter)
    return live.A.detach().clone(), live.B.detach().clone(), live.own["gate"].detach().clone()


def test_a_run_without_an_event_is_refused() -> None:
    check_length(made("beamlora", interval=6), 12)
    with pytest.raises(LoralignError, match="its first event comes after step 6"):
        check_length(made("beamlora", interval=6), 11)
    with pytest.raises(LoralignError, match="8 rounds"):
        check_length(made("allocating-lora"), 8)


# --------------------------------------------------------------------------------------------------------------- ALoRA


def test_new_slots_are_spread_evenly() -> None:
    means, room = {"a": 0.1, "b": 0.3, "c": 0.2}, dict.fromkeys("abc", 4)
    assert spread(8, means, room) == {"a": 2, "b": 3, "c": 3}
    assert spread(2, means, room) == {"a": 0, "b": 1, "c": 1}
    assert spread(8, means, room | {"b": 1}) == {"a": 3, "b": 1, "c": 4}
    assert spread(20, means, room) == room and spread(0, means, room) == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("options", [{"scored": 2, "moved": 2}, {"moved": 12}, {"scored": 1, "moved": 5}])
def test_the_number_of_slots_stays_whatever_was_scored(options: dict[str, int]) -> None:
    """Also where every slot that was looked at dies, and where every module loses some."""
    recipe = made("allocating-lora", rounds=4, first=0.1, every=0.1, **options)
    model = net(recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(
        model, recipe, opt, 10, observe=lambda: {"losses": lambda found: [float(k) for k in range(len(found))]}
    )
    for step in range(6):
        backward(model, step)
        opt.step()
        driver.after_step()
        assert sum(driver.ranks().values()) == 12
    assert len(driver.changes) == 5 and driver.summary().startswith("budget 12 → 12 slots")


def test_the_least_important_slots_die_and_others_are_born_without_moving_the_function() -> None:
    """Three linear maps side by side, whose slots' importance is known by forming every model."""
    recipe = replace(made("allocating-lora", rounds=1, moved=1), targets=("one", "two", "three"))
    (rule,) = recipe.rules
    model = net(recipe)
    opt = optimizer(model, recipe, 1e-2)
    x, y = normal(7, 6), normal(7, 6, seed=1)
    base = model.get_base_model()
    weights = {s.name: base.get_submodule(s.name).base_layer.weight.detach() for s in sites(model)}
    with torch.no_grad():
        for k, site in enumerate(sites(model)):
            live_of(site.layer, "default").B.copy_(normal(6, 5, seed=20 + k) / 4)

    def losses(found: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """The sum over the modules of ½‖y − (W0 + Σ u)x‖²."""
        return [sum(_half(weights[n] + _sum(parts[n], masks, n), x, y) for n in weights) for masks in found]

    driver = drive(model, recipe, opt, 10, observe=lambda: {"losses": losses})
    assert all(mask.tolist() == [False] * 4 + [True] for mask in opt.dead.values()), "one spare slot waits"
    parts = {
        s.name: [
            s.s * torch.outer(live_of(s.layer, "default").B[:, j], live_of(s.layer, "default").A[j]).detach()
            for j in range(4)
        ]
        for s in sites(model)
    }
    held = {n: _half(weights[n] + sum(parts[n]), x, y) - _half(weights[n], x, y) for n in weights}
    want = {
        n: [v + sum(held.values()) - held[n] for v in allocating_lora.importance(weights[n], parts[n], x, y)]
        for n in weights
    }
    state, plan = rule.step({}, replace(opt.moment(losses=losses), step=1, total_steps=10))
    assert not state and plan is not None
    lowest = min((value, n, j) for n, found in want.items() for j, value in enumerate(found))
    off, on = plan
    assert (off.site, off.slots) == (lowest[1], (lowest[2],))  # type: ignore[union-attr]
    means = {n: sum(found) / 4 for n, found in want.items() if n != lowest[1]}
    assert on.site == max(means, key=means.__getitem__) and on.slots == (4,)  # type: ignore[union-attr]
    backward(model)
    opt.step()
    driver.after_step()
    live = driver.ranks()
    assert sum(live.values()) == 12 and sorted(live.values()) == [3, 4, 5]


def _half(W: Tensor, x: Tensor, y: Tensor) -> float:
    return 0.5 * float((y - x @ W.T).square().sum())


def _sum(parts: list[Tensor], masks: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.stack([u for j, u in enumerate(parts) if bool(masks[name][j])] or [0 * parts[0]]).sum(0)


def test_a_subsample_is_drawn_and_the_same_everywhere() -> None:
    recipe = made("allocating-lora", rounds=1, scored=5)
    model = net(recipe)
    opt = optimizer(model, recipe, 1e-2)
    calls: list[int] = []

    def losses(found: Sequence[Mapping[str, Tensor]]) -> list[float]:
        calls.extend(int(sum(m.sum() for m in masks.values())) for masks in found)
        return [float(n) for n in calls[-len(found) :]]

    drive(model, recipe, opt, 10, observe=lambda: {"losses": losses})
    moment: Moment = replace(opt.moment(losses=losses), step=1, total_steps=10)
    (rule,) = recipe.rules
    first, again = rule.step({}, moment)[1], rule.step({}, moment)[1]
    assert first == again and calls == ([11] * 5 + [1] * 5) * 2
    with pytest.raises(LoralignError, match="none were given"):
        rule.step({}, replace(opt.moment(), step=1, total_steps=10))


def test_they_go_with_what_they_may() -> None:
    check_combination(made("allocating-lora + lora-pro"))
    check_combination(made("allocating-lora + lora-rite"))
    with pytest.raises(LoralignError, match="a trained gate stands between"):
        check_combination(made("beamlora + lora-rite"))
    for form in ("lora", "adalora"):
        with pytest.raises(LoralignError, match="a gate that shares the rank out among them, which this form does not"):
            check_combination(replace(made("beamlora"), form=made(form).form))


# ------------------------------------------------------------------------------------------------------------- PRILoRA


def test_ranks_grow_with_depth() -> None:
    assert ranks_by_depth(12, 4, 12) == prilora.ranks(12, 4, 12) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert ranks_by_depth(32, 4, 12) == prilora.ranks(32, 4, 12) and sum(ranks_by_depth(32, 4, 12)) == 256
    recipe = build("prilora", r=4, alpha=8.0)
    assert isinstance(recipe, Recipe)
    found = {s.name: (s.r, s.s) for s in sites(adapt(llama(), recipe))}
    assert all(v == ((2 if ".0." in n else 6), 2.0) for n, v in found.items())


def test_pruning_follows_the_inputs_of_the_tokens() -> None:
    """Inputs of every step, padding left out, against the oracle; evaluation counts nothing; exact counts per row."""
    recipe = build("prilora", {"interval": 3}, r=4, alpha=8.0, targets=("v_proj",))
    assert isinstance(recipe, Recipe)
    model: Any = adapt(llama(), recipe)
    opt = optimizer(model, recipe, 1e-2)
    driver = drive(model, recipe, opt, 9)
    name = sites(model)[0].name
    seen: list[Tensor] = []
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)) if m.training else None)
    for t in range(1, 4):
        model.eval()
        with torch.no_grad():
            model(**batch_for(model, seed=77))
        model.train()
        for half in (0, 1):  # two micro-batches
            model(**batch_for(model, seed=2 * t + half)).loss.backward()
        opt.step()
        A = _A(sites(model)[0]).detach().clone()
        driver.after_step()
        opt.zero_grad()
    there = batch_for(model)["attention_mask"].flatten().bool()
    assert not there.all()
    steps = [torch.cat([X[there] for X in seen[k : k + 2]]) for k in (0, 2, 4)]
    norms = opt.rule_states[0]["norm|0|32"][0]
    assert norms.tolist() == pytest.approx(prilora.norms(steps), rel=1e-4)
    want = prilora.pruned(A, norms.tolist(), 0.5)
    now = _A(sites(model)[0])
    assert [set((row == 0).nonzero().flatten().tolist()) for row in now] == want
    assert torch.equal(now[now != 0], A[now != 0])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_inputs_count_once_whatever_reads_them_again(reentrant: bool | None) -> None:
    """Checkpointing runs forward twice; q, k and v share an input; micro-batches add; no gradient, no count."""
    recipe = build("prilora", r=4, alpha=8.0)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(llama(), recipe).train()
    tap = InputTap(model, sites(model))
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(layer: Any, args: Any) -> None:
            x = args[0].detach().flatten(0, 1) * batch["attention_mask"].reshape(-1, 1)
            seen[name] = seen.get(name, 0.0) + x.square().sum(0)

        return hook

    looks = [site.layer.register_forward_pre_hook(look(site.name)) for site in sites(model)]
    batches = [batch_for(model, seed=k) for k in range(2)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in looks:
        hook.remove()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for batch in batches:
        model(**batch).loss.backward()
    found = {s: row for some in tap.taken() for s, row in zip(some.sites, some.squares, strict=True)}
    assert found.keys() == seen.keys() and all(torch.allclose(found[n], x, rtol=1e-4) for n, x in seen.items())
    assert not any(some.squares.any() for some in tap.taken())
    tap.remove()


@pytest.mark.parametrize("most", [1, 20, 1 << 24])
def test_rows_of_all_ranks_are_pruned_as_by_themselves(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are sorted at once."""
    monkeypatch.setattr(rules.prilora, "AT_ONCE", most)
    A = {
        name: normal(r, d, seed=k)
        for k, (name, r, d) in enumerate([("a", 2, 6), ("b", 3, 6), ("c", 2, 6), ("d", 1, 4)])
    }
    norms = {name: normal(X.shape[1], seed=9 + k).abs() for k, (name, X) in enumerate(A.items())}
    found = depth_and_pruning(pruned=0.5)._masks(stacks_of({(name, "A"): X for name, X in A.items()}), norms)
    assert found.keys() == A.keys()
    assert all(torch.equal(mask, least(A[name], norms[name], 0.5)) for name, mask in found.items())


def test_inputs_of_a_skipped_step_are_forgotten() -> None:
    recipe = made("prilora", interval=2)
    model = net(recipe)
    driver = drive(model, recipe, optimizer(model, recipe, 1e-2), 4)
    assert driver.inputs is not None
    for skipped in (False, True):
        backward(model)
        if skipped:
            driver.skipped_step()
        assert any(seen.squares.any() for seen in driver.inputs.taken()) != skipped


def test_the_sums_lie_where_the_layers_are_when_the_run_begins() -> None:
    """A Trainer moves and casts a model after its driver was made."""
    recipe = build("prilora", {"interval": 2}, r=4, alpha=8.0)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(llama(), recipe).train()
    driver = Driver(recipe, model, optimizer(model, recipe, 1e-2))
    assert driver.inputs is not None and {x.squares.dtype for x in driver.inputs.readings} == {torch.float32}
    model.double()
    driver.begin(4)
    assert {x.squares.dtype for x in driver.inputs.readings} == {torch.float64}
    model(**batch_for(model)).loss.backward()
    assert all(seen.squares.dtype == torch.float64 for seen in driver.inputs.taken())
    driver.close()


def step_with(state: RuleState, *groups: InputSquares) -> None:
    (rule,) = made("prilora", interval=2).rules
    rule.step(state, Moment(1, 4, (), {}, {}, (), {}, None, None, groups))  # type: ignore[arg-type]


GROUP = InputSquares(("one", "two"), torch.ones(2, 6))


@pytest.mark.parametrize(
    "groups",
    [
        (InputSquares(("one",), torch.ones(1, 6)), InputSquares(("two",), torch.ones(1, 6))),
        (InputSquares(("one",), torch.ones(1, 6)),),
        (InputSquares(("one", "two"), torch.ones(2, 5)),),
        (GROUP, InputSquares(("three",), torch.ones(1, 5))),
        (InputSquares(("two", "one"), torch.ones(2, 6)),),
    ],
    ids=["split", "fewer", "width", "more", "order"],
)
def test_averages_of_other_groups_are_refused(groups: tuple[InputSquares, ...]) -> None:
    step_with(state := RuleState(), GROUP)
    with pytest.raises(LoralignError, match="average of the inputs was made for other stacks"):
        step_with(state, *groups)


def test_averages_of_other_versions_are_known_or_refused() -> None:
    step_with(state := RuleState(), GROUP)
    step_with(state, GROUP)
    assert set(state) == {"norm|0|6", "sites|0|6"} and torch.equal(state["norm|0|6"], torch.full((2, 6), 0.19))
    step_with(older := RuleState({"norm|0|6": torch.ones(2, 6)}), GROUP)  # without the order of the sites
    assert torch.equal(older["norm|0|6"], torch.ones(2, 6)) and torch.equal(older["sites|0|6"], state["sites|0|6"])
    with pytest.raises(LoralignError, match="average of the inputs was made for other stacks"):
        step_with(RuleState({"norm|one": torch.ones(6)}), GROUP)


def test_verbs_of_one_tensor_unite() -> None:
    """Neither of two `Zero`, nor of two `Elements`, undoes the other."""
    recipe = made("prilora", interval=2)
    model = net(recipe)
    opt = optimizer(model, recipe, 1e-2)
    name = sites(model)[0].name
    masks = {side: torch.arange(24).reshape(4, 6).eq(k) for k, side in enumerate("ab")}
    stage = Stage(opt, masks, seed=0, step=1)
    before = _A(sites(model)[0]).detach().clone()
    apply_plan(stage, (Zero(name, "A", (0,)), Zero(name, "A", (2,))))
    assert _A(sites(model)[0]).eq(0).all(1).tolist() == [True, False, True, False]
    with torch.no_grad():
        _A(sites(model)[0]).copy_(before)
    apply_plan(stage, (Elements(name, "A", "a"), Elements(name, "A", "b")))
    assert torch.equal(_A(sites(model)[0]), before.masked_fill(masks["a"] | masks["b"], 0.0))


def test_slots_are_copied_one_after_another_with_their_second_moments() -> None:
    """Onto a dead one, which lives again, and from there to a third; a dead slot's gate has no moments either."""
    recipe = made("beamlora")
    model = net(recipe)
    # B is zero before the first, so gates have no gradient there
    opt, _ = driven(model, recipe, backward, range(2), 36)
    site = sites(model)[0]
    name, p, gate = site.name, _A(site), trained_of(site.layer, "default")["gate"]
    A, v = p.detach().clone(), opt.state[p]["exp_avg_sq"].clone()
    stage = Stage(opt, {}, seed=0, step=1)
    apply_plan(stage, (Off(name, (3,)),))
    assert opt.dead[name].tolist() == [False, False, False, True]
    for key in ("exp_avg", "exp_avg_sq"):
        assert (opt.state[gate][key] != 0).tolist() == [True, True, True, False]
    apply_plan(stage, (Copy(name, (3,), (0,)), Copy(name, (1,), (3,))))
    assert name not in opt.dead
    assert torch.equal(p, A[[0, 0, 2, 0]]) and torch.equal(opt.state[p]["exp_avg_sq"], v[[0, 0, 2, 0]])
    assert opt.state[p]["exp_avg"].any(1).tolist() == [True, False, True, False]


def test_every_verb_is_sent_as_text_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes rank 0's: a plan of several kinds of verbs comes back as it was."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_backend": "gloo", "broadcast": None}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    plan: Plan = (
        Off("one", (1,)), Unborn("one", (2,)), On("one", (2,)), Zero("one", "gate", (0,)), ZeroWhere("gate", "off"),
        Copy("one", (1,), (0,), "snapshot"), Set("one", "gate", (0, 1), (0.5, 1.0)), Prox(("one", "two"), "gate", 0.1),
        Freeze("one", 0.5), Elements("one", "A", "mask"),
    )  # fmt: skip
    assert agreed(plan) == plan and {type(verb) for verb in plan} == set(get_args(Verb))


def test_gates_that_never_stepped_do_not_keep_the_others_moments() -> None:
    recipe = made("beamlora")
    model = net(recipe)
    opt, _ = driven(model, recipe, backward, range(2), 36)
    first, second, _ = sites(model)
    gates = [trained_of(site.layer, "default")["gate"] for site in (first, second)]
    opt.state[gates[1]] = {}
    apply_plan(Stage(opt, {}, seed=0, step=1), [Set(site.name, "gate", (0, 2), (5.0, 6.0)) for site in (first, second)])
    assert [gate.detach()[[0, 2]].tolist() for gate in gates] == [[5.0, 6.0]] * 2
    for key in ("exp_avg", "exp_avg_sq"):
        assert (opt.state[gates[0]][key] != 0).tolist() == [False, True, False, True]
    assert not opt.state[gates[1]]


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_small_tensors_of_any_shape_share_memory(shape: tuple[int, ...]) -> None:
    given = [torch.full(shape, float(k)) for k in range(3)]
    scratch = Scratch()
    for some in (given, given[::-1]):
        joint, rows = scratch(some)
        assert torch.equal(joint, torch.stack(some)) and all(map(torch.equal, rows, some))


def sums_of(tap: InputTap) -> dict[str, Tensor]:
    return {s: row for some in tap.taken() for s, row in zip(some.sites, some.squares, strict=True)}


def test_inputs_of_two_forwards_and_of_a_backward_that_fails_are_counted() -> None:
    recipe = build("prilora", r=4, alpha=8.0)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(llama(), recipe).train()
    tap, want = InputTap(model, sites(model)), dict[str, Any]()
    for seed in (0, 1):
        model(**batch_for(model, seed=seed)).loss.backward()
        for name, row in sums_of(tap).items():
            want[name] = want.get(name, 0.0) + row
    sum(model(**batch_for(model, seed=seed)).loss for seed in (0, 1)).backward()
    for name, row in sums_of(tap).items():
        torch.testing.assert_close(row, want[name])

    def fails(grad: Tensor) -> None:
        raise RuntimeError("half way")

    broken = model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda module, args, y: y.register_hook(fails) and None
    )
    with pytest.raises(RuntimeError, match="half way"):
        model(**batch_for(model)).loss.backward()
    broken.remove()
    reached = sums_of(tap)
    model.eval()(**batch_for(model)).loss.backward()  # an evaluation, though with gradients
    model.train()
    assert not any(row.any() for row in sums_of(tap).values())
    assert all(row.any() == (".1." in name) for name, row in reached.items()) and len({*reached}) > 1
    for seed in (0, 1):
        model(**batch_for(model, seed=seed)).loss.backward()
    for name, row in sums_of(tap).items():
        torch.testing.assert_close(row, want[name])


def test_a_mask_of_other_rows_leaves_all_in() -> None:
    """One of an encoder, or before rows were joined: its size tells."""
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(norms(x, mask), x[mask.bool()].norm(dim=0))
    for other in (None, torch.ones(2, 5), torch.ones(3, 3)):
        torch.testing.assert_close(norms(x, other), x.reshape(-1, 4).norm(dim=0))


def test_a_decoder_is_not_masked_by_the_encoders_padding() -> None:
    recipe = build("prilora", r=4, alpha=8.0, targets=("q",))
    assert isinstance(recipe, Recipe)
    model: Any = adapt(t5(), recipe).train()
    tap, batch = InputTap(model, sites(model)), batch_for(t5())
    assert not batch["attention_mask"].all()
    sums = []
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        model(**{**batch, "attention_mask": mask}).loss.backward()
        sums.append({s: row for some in tap.taken() for s, row in zip(some.sites, some.squares, strict=True)})
    name = "decoder.block.0.layer.0.SelfAttention.q"
    assert torch.equal(sums[0][name], sums[1][name])
    name = name.replace("decoder", "encoder")
    assert (sums[0][name] < sums[1][name]).all()


def test_importance_at_its_special_points() -> None:
    A = normal(3, 8)
    assert torch.equal(least(A, torch.ones(8).double(), 0.25), least(A, torch.full((8,), 3.0).double(), 0.25))
    assert least(torch.ones(2, 4), torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5).tolist() == [[False, True, True, False]] * 2
    n = prilora.norms([torch.ones(1, 1)] * 5)[0]
    assert n == pytest.approx(1 - 0.9**5)
