"""The combination table, line by line, and what `plan` says a run costs beside hand counts and measured steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import toy
from loralign import METHODS, Full, LoralignError, Recipe, adapt, build, learning_rate, optimizer, peft_config, sites
from loralign.evidence import model_loss
from loralign.maths.operators import Dense
from loralign.methods.outer.chain import chain_of_links
from loralign.methods.outer.sd_lora import task_links
from loralign.methods.rule.rm_lora import masked_orthogonal
from loralign.plan.combinations import (
    CLASHES,
    Clash,
    Surroundings,
    around,
    check_combination,
    check_ranks,
    draw,
    facts,
)
from loralign.plan.course import commits, idle, links
from loralign.plan.memory import Estimate, estimate
from loralign.plan.start import evidence_bytes
from loralign.plan.trace import LiveBytes, Step, example_batch, trace, usual_loss
from loralign.train.attach import attach
from loralign.types import (
    NOTHING,
    Batch,
    CommonSubspace,
    Directions,
    Draw,
    Episode,
    Facts,
    Grad,
    Group,
    Live,
    LrPrior,
    Operator,
    Pair,
    Preheated,
    Prepared,
    RuleNeed,
    Site,
    Sketch,
    SlotChange,
    Start,
    State,
    TopGradient,
    Weight,
)
from trainers import toy_trainer

DEEPSPEED = Surroundings(engine="deepspeed")


def recipe(name: str, **fields: Any) -> Recipe:
    made = build(name, **fields)
    assert isinstance(made, Recipe)
    return made


@dataclass(frozen=True)
class Links:
    """A chain of episodes of 5 steps."""

    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        return Episode(index, 5) if index * 5 < total_steps else None


@dataclass(frozen=True)
class BothFactors:
    """A transform that is defined for pairs of which both factors train, and that accepts nothing else."""

    facts: ClassVar[Facts] = Facts(accepts=frozenset({"bf16"}))
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {"A": {}, "B": {}}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, torch.Tensor], carry: Any) -> Sequence[Grad]:
        return group.grads

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        return None


@dataclass(frozen=True)
class Allocates:
    """The part of a rank rule that the table reads."""

    needs: RuleNeed = NOTHING
    facts: ClassVar[Facts] = Facts(allocates=True)


@dataclass(frozen=True)
class Declared:
    """A form that computes what the plain one does and declares something of itself."""

    facts: Facts

    def trained(self, W: Weight, r: int, draw: Any) -> Mapping[str, torch.Tensor]:
        return {}

    constants = trained

    def shared(self) -> Mapping[str, torch.Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        return Dense(own.A), Dense(own.B)


@dataclass(frozen=True)
class NotZero:
    """An init whose product is not zero and that keeps no twin."""

    needs: Any = NOTHING
    facts: ClassVar[Facts] = Facts()

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Any, draw: Any) -> Start:
        return Start(torch.ones(r, W.shape[1]), torch.ones(W.shape[0], r))


def formed(**facts: Any) -> Declared:
    return Declared(Facts(**facts))


CLASHING: dict[str, tuple[Recipe, Surroundings]] = {
    "reason: a trained gate stands": (
        replace(
            recipe("lora-fa"),
            form=formed(gated=True, identity=True, switches=frozenset({"gate"})),
            init=recipe("lora").init,
        ),
        Surroundings(),
    ),
    "reason: hides the pair (A, B)": (recipe("delta-lora + lora-pro"), Surroundings()),
    "reason: only one factor trains, and this optimizer": (
        replace(recipe("cora"), transform=BothFactors()),
        Surroundings(),
    ),
    "reason: which this form does not read": (recipe("lora-ga + delta-lora"), Surroundings()),
    "reason: the model would jump": (replace(recipe("delta-lora"), outer=Links()), Surroundings()),
    "reason: weighs each link": (
        replace(recipe("sd-lora"), outer=chain_of_links(links=2, keep_slots=2)),
        Surroundings(),
    ),
    "reason: later links train fewer": (
        replace(recipe("cora"), init=recipe("lora").init, transform=BothFactors(), outer=task_links(later_ranks=(1,))),
        Surroundings(),
    ),
    "reason: its factors share numbers, and": (
        replace(recipe("lora-pro"), form=formed(tied=True, identity=True)),
        Surroundings(),
    ),
    "reason: directions of a gradient": (replace(recipe("hrp"), form=formed(tied=True, identity=True)), Surroundings()),
    "reason: a rule switches slots": (
        replace(recipe("lora"), transform=BothFactors(), rules=(Allocates(),)),
        Surroundings(),  # type: ignore[arg-type]
    ),
    "reason: what the init puts there": (replace(recipe("prolora"), init=recipe("cora").init), Surroundings()),
    "reason: the optimizer's options are for": (recipe("prolora + lora-plus"), Surroundings()),
    "reason: the rule is about their slots": (recipe("prolora + rm-lora"), Surroundings()),
    "reason: places in W": (replace(recipe("sbora-fa"), rules=(Allocates(),)), Surroundings()),  # type: ignore[arg-type]
    "reason: the learning rates of B and A says nothing": (recipe("sbora-fa + lora-plus"), Surroundings()),
    "reason: two rules would decide": (replace(recipe("lora"), rules=(Allocates(), Allocates())), Surroundings()),  # type: ignore[arg-type]
    "reason: switches slots by a trained gate": (
        replace(recipe("lora"), rules=recipe("adalora").rules),
        Surroundings(),
    ),
    "reason: a gate that shares the rank out": (
        replace(recipe("lora"), rules=recipe("beamlora").rules),
        Surroundings(),
    ),
    "reason: change W before": (replace(recipe("lora"), init=NotZero()), Surroundings()),
    "reason: no gradient reaches any": (replace(recipe("lora"), form=recipe("adalora").form), Surroundings()),
    "reason: more slots than the rank has": (recipe("rm-lora", r=4, options={"keep": 5}), Surroundings()),
    "reason: wrong under dropout": (recipe("delta-lora", dropout=0.1), Surroundings()),
    "reason: DeepSpeed replaces": (recipe("lora-rite"), DEEPSPEED),
    "reason: adds A·x of one layer": (recipe("reslora + prilora", options={"shortcut": "ms"}), Surroundings()),
    "reason: reads other layers": (replace(recipe("lora"), form=formed(cross_layer=True)), Surroundings(engine="fsdp")),
    "reason: keeps a tensor for the whole model": (recipe("sd-lora"), Surroundings(engine="fsdp")),
    "reason: half precision rounds away": (recipe("lora-pro"), Surroundings(factors=torch.bfloat16)),
}


def clash_of(what: str) -> Clash:
    (found,) = [c for c in CLASHES if what.removeprefix("reason: ") in c.reason]
    return found


@pytest.mark.parametrize("what", CLASHING)
def test_a_clash_says_why_and_what_instead(what: str) -> None:
    made, surroundings = CLASHING[what]
    with pytest.raises(LoralignError) as caught:
        check_combination(made, surroundings)
    clash = clash_of(what)
    assert str(caught.value) == f"{made.name}: {clash.reason}; {clash.instead}"


def test_every_line_of_the_table_is_shown_by_an_example() -> None:
    assert [clash_of(what) for what in CLASHING] == list(CLASHES)


@pytest.mark.parametrize("clash", CLASHES, ids=lambda c: " + ".join(sorted(c.facts)))
def test_no_clash_without_each_of_its_facts(clash: Clash) -> None:
    """Every fact of a line is one that some recipe or place has and another has not: no line is dead or always true."""
    commits = replace(recipe("lora"), form=formed(commits=True), outer=Links())
    check_combination(commits)
    sound = recipe("lora"), recipe("beamlora"), commits
    seen = [facts(r) | around(s) for r, s in CLASHING.values()] + [facts(r) for r in sound]
    for fact in clash.facts:
        assert any(fact in found for found in seen)
        assert any(fact not in found for found in seen)


@pytest.mark.parametrize("name", [m for m, line in METHODS.items() if not line.reference])
def test_every_method_alone_is_allowed(name: str) -> None:
    check_combination(recipe(name))
    if not recipe(name).form.facts.cross_layer and not recipe(name).form.shared():
        check_combination(recipe(name), Surroundings(engine="fsdp"))


@pytest.mark.parametrize("mix", ["lora-ga + lora-rite", "lora-ga + lora-pro", "hrp + lora-plus", "cora + lora-pro"])
def test_mixes_of_init_and_transform_are_allowed(mix: str) -> None:
    check_combination(recipe(mix))


def test_facts_are_read_off_the_parts() -> None:
    assert {"twin", "reads weights"} <= facts(recipe("pissa"))
    assert not {"twin", "reads weights", "chain", "dropout", "one side trains"} & facts(recipe("lora"))
    assert "one side trains" in facts(recipe("cora")) & facts(recipe("lora-fa")) & facts(recipe("sbora-fa"))
    assert "starts from data" in facts(recipe("lora-ga")) and "starts from data" not in facts(recipe("pissa"))
    assert "chain" in facts(replace(recipe("lora"), outer=Links()))
    assert links(replace(recipe("lora"), outer=Links()), 12, ["q"]) == 3


# ---------------------------------------------------------------------------------------------------------------- ranks

STARTS = [m for m, line in METHODS.items() if line.init and recipe(m).init.fits(16, 32, 33)]


def untouched() -> Iterator[Batch]:
    """Batches that nobody may ask for."""
    raise AssertionError("a batch was taken")
    yield


@pytest.mark.parametrize("name", STARTS)
def test_a_start_has_its_largest_rank_and_a_larger_one_is_refused_before_a_batch_is_taken(name: str) -> None:
    """At k_proj (16 × 32), the smallest site: W and evidence of that shape have a start of the rank that is claimed."""
    init = recipe(name).init
    most = max(r for r in range(1, 33) if not init.fits(16, 32, r))
    U, V = (torch.linalg.qr(torch.randn(d, 16))[0] for d in (16, 32))
    evidence = Directions(U, torch.arange(16.0, 0.0, -1.0), V)
    made = init(Weight("w", (16, 32), lambda: torch.randn(16, 32)), most, 2.0, evidence, draw)
    assert torch.linalg.matrix_rank(torch.cat([made.A, made.B.T], dim=1)) == most
    said = re.escape(f"rank {most + 1} is too large for {name} at model.layers.0.self_attn.k_proj (16 × 32), where")
    with pytest.raises(LoralignError, match=rf"{said} it can start {most} slots at most: lower `rank`.* more sites"):
        adapt(toy.llama(), recipe(name, r=most + 1), untouched())


@pytest.mark.parametrize("name", ["lora-ga", "pissa", "hrp + lora-rite"])
def test_a_trainer_is_refused_before_its_rows_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(name, r=4, ranks={"1.mlp.up_proj": 33})
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1)
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: pytest.fail("the rows were read"))
    monkeypatch.setattr("loralign.train.adapt.collect", lambda *_, **__: pytest.fail("evidence was collected"))
    with pytest.raises(LoralignError, match=r"rank 33 is too large for .* at .*layers\.1\.mlp\.up_proj \(48 × 32\)"):
        attach(trainer, made)


REFUSED = {  # a recipe that does not fit the toy model: what is said of it
    "a rank": (
        recipe("lora-ga", r=9),
        r"k_proj \(16 × 32\), where it can start 8 slots at most: .* \(and at 3 more sites: v_proj, k_proj\)$",
    ),
    "one module's rank": (
        recipe("pissa", ranks={"0.mlp.up_proj": 33}),
        r"up_proj \(48 × 32\), .* give the module its own in `ranks`, or name it in `exclude`$",
    ),
    "no rank": (
        recipe("lora-ga", targets=("narrow",)),
        r"narrow \(1 × 32\), where it can start 0 slots at most: name it in `exclude`$",
    ),
    "a preheat": (
        recipe("hrp", options={"rank": 3}, r=4),
        r"preheat's rank 3 is below the adapter's 4 at .*k_proj \(16 × 32\): raise `options\.rank`",
    ),
    "a rule": (
        recipe("rm-lora", r=4, options={"keep": 3}, ranks={"q_proj": 2}),
        r"rank 2 is too small for rm-lora at .*q_proj \(32 × 32\), which trains 3 .*: lower its `keep`, or raise",
    ),
    "a budget": (
        recipe("sora", r=4, options={"target_rank": 3}, ranks={"q_proj": 2}),
        r"rank 2 is too small for sora at .*q_proj \(32 × 32\), which trains 3 .*: lower its `target_rank`, or raise",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_a_site_is_said_by_the_plan_too(what: str) -> None:
    made, said = REFUSED[what]
    model, skeleton = toy.llama(), meta_llama()
    for m in (model, skeleton) if "narrow" in made.targets else ():
        m.narrow = nn.Linear(32, 1)
    with pytest.raises(LoralignError, match=said):
        adapt(model, made, untouched())
    with pytest.raises(LoralignError, match=said):
        estimate(skeleton, made, Step(rows=2, length=8))


def test_ranks_that_fit_are_allowed_and_plain_lora_has_no_largest() -> None:
    check_ranks(recipe("lora-ga", r=8), sites(adapt(toy.llama(), recipe("lora", r=8))))
    adapt(toy.llama(), recipe("lora", r=40))
    for name, option in (("rm-lora", "keep"), ("sora", "target_rank"), ("hrp", "rank")):  # no more than they ask for
        check_ranks(recipe(name, r=4, options={option: 4}), sites(adapt(toy.llama(), recipe("lora", r=4))))


# ---------------------------------------------------------------------------------------------------------------- costs


LINEAR = {  # (d_out, d_in) of the tiny Llama's seven kinds, two layers each
    "q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48),
}  # fmt: skip


def meta_llama(**changes: Any) -> nn.Module:
    with torch.device("meta"):
        return type(toy.llama())(toy.llama(**changes).config)


def planned(made: Recipe | Full, step: Step | None = None, **changes: Any) -> Estimate:
    return estimate(meta_llama(**changes), made, step or Step(rows=2, length=8))


@cache
def plain_lora() -> Estimate:
    return planned(recipe("lora", r=4))


def test_counts_equal_hand_counts() -> None:
    r = 4
    numbers = 2 * r * sum(a + b for a, b in LINEAR.values())
    weights = sum(p.numel() for p in toy.llama().parameters())
    found = planned(recipe("lora", r=r))
    assert (found.trainable, found.sites, found.export_rank) == (numbers, 14, r)
    assert found.adapter_bytes == 4 * numbers
    assert found.optimizer_bytes == pytest.approx(8 * numbers, abs=8 * 28)  # two fp32 moments, and step counters
    assert found.weights_bytes == pytest.approx(4 * weights, abs=4 * 64)  # and the buffer of the rotary frequencies
    assert (found.evidence_bytes, found.init_seconds) == (0, 0.0)


@pytest.mark.parametrize("family", ["bert", "gated"])
def test_heads_and_gates_have_moments_too(family: str) -> None:
    """A classifier's fresh head and a form's own tensors: planned state = that of a real optimizer after a step."""
    from test_protocols import stub

    made, whole = (recipe("lora", r=4), toy.bert) if family == "bert" else (stub("gated"), toy.llama)
    with torch.device("meta"):
        skeleton = type(whole())(whole().config)
    expected = estimate(skeleton, made, Step(rows=2, length=8), batch=toy.batch_for(whole()), loss=model_loss)
    model = adapt(whole(), made)
    stepper = optimizer(model, made, 1e-3)
    model.train()
    model(**toy.batch_for(model)).loss.backward()
    stepper.step()
    kept = [t for state in stepper.state.values() for key, t in state.items() if key != "step"]
    assert len(kept) == 2 * len([p for p in model.parameters() if p.requires_grad])
    rest = sum(4 * t.numel() for t in kept) - 8 * sum(s.r * (s.d_in + s.d_out) for s in sites(model))
    counters = expected.optimizer_bytes - sum(4 * t.numel() for t in kept)  # of the pairs, 4 bytes a factor
    assert rest >= 8 * 14 * 3 > counters >= 0


def test_a_twin_costs_its_frozen_slots_and_exports_at_rank_2r() -> None:
    plain, twin = plain_lora(), planned(recipe("lora-ga", r=4))
    assert twin.trainable == plain.trainable
    assert twin.adapter_bytes == 2 * plain.adapter_bytes
    assert twin.optimizer_bytes == plain.optimizer_bytes
    assert twin.export_rank == 8
    assert twin.evidence_bytes > 0
    assert (twin.init_seconds or 0) > 0


def test_a_chain_grows_by_a_link() -> None:
    chain = replace(recipe("lora", r=4), outer=Links())
    found, plain = planned(chain, Step(2, 8, total_steps=15)), plain_lora()
    assert found.export_rank == 12
    assert found.adapter_bytes == 3 * plain.adapter_bytes


def test_a_link_commits_the_slots_that_it_trained() -> None:
    episodes = [Episode(0, 5), Episode(1, 5, slots=1), Episode(2, 5, sites=("a",), slots=9), Episode(3, 5)]
    assert commits(episodes, {"a": 4, "b": 2}) == {"a": 4 + 1 + 4, "b": 2 + 1}


def test_a_chain_that_is_cut_grows_no_further() -> None:
    found = planned(recipe("chain-of-lora", r=4, options={"links": 10, "keep_slots": 6}), Step(2, 8, total_steps=40))
    plain = plain_lora()
    assert found.export_rank == 10 and found.adapter_bytes == plain.adapter_bytes * 10 // 4


def test_boosters_cost_the_state_of_the_layers_that_train_and_the_slots_of_those_that_did() -> None:
    """Two layers, dealt out: three of four boosters are committed by the end, of one site two at most."""
    boosters = recipe("xgblora", r=4, alpha=32.0, options={"fraction": 0.5, "link_steps": 5})
    found, plain = planned(boosters, Step(2, 8, total_steps=20)), plain_lora()
    assert found.optimizer_bytes == plain.optimizer_bytes // 2 and found.trainable == plain.trainable
    assert found.export_rank == 8 and found.adapter_bytes == plain.adapter_bytes * 5 // 2


@pytest.mark.parametrize("frozen", ["smaller", "A", "alternate"])
def test_what_trains_of_a_random_side_is_counted_by_the_shape(frozen: str) -> None:
    made = recipe("rac-lora", r=4, options={"frozen": frozen})
    model = adapt(toy.llama(), made)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned(made).trainable == trained


@pytest.mark.parametrize(("steps", "rank"), [(0, 8), (9, 4), (10, 4), (11, 8)])
def test_a_snapshot_exports_at_rank_2r_where_the_run_reaches_it(steps: int, rank: int) -> None:
    delta, plain = recipe("delta-lora", r=4, options={"wait_steps": 10}), plain_lora()
    found = planned(delta, Step(2, 8, total_steps=steps))
    assert found.export_rank == rank
    assert found.adapter_bytes == (rank // 4) * plain.adapter_bytes


@dataclass(frozen=True)
class Rests:
    """The part of a third party's rule that tells how long it does nothing."""

    wait_steps: int
    needs: RuleNeed = NOTHING

    @property
    def facts(self) -> Facts:
        return Facts(wait_steps=self.wait_steps)


def test_a_run_that_ends_before_a_rule_acts_is_told_so_with_the_mend() -> None:
    """A snapshot after step K + 1 changes the steps after it, so K + 2 steps are the least."""
    delta = recipe("delta-lora", options={"wait_steps": 10})
    assert idle(delta, 11) == (
        "delta-lora: its rule acts after step 11 and the run has 11 steps, so it is trained as if without it: "
        "lower `options.wait_steps` to 9 at most or raise `train.steps` to 12 at least"
    )
    assert idle(delta, 12) == "" and idle(recipe("delta-lora", options={"wait_steps": 9}), 11) == ""
    assert "to 2 at least" in idle(recipe("delta-lora", options={"wait_steps": 0}), 1)
    assert "wait_steps" not in idle(delta, 1)  # no value would do
    assert "after step 11: the run must have more" in idle(delta, None)
    several = replace(recipe("lora"), rules=(Rests(3), Rests(7), masked_orthogonal()))  # type: ignore[arg-type]
    assert "after step 8 and" in idle(several, 8) and idle(several, 9) == ""
    for name in (m for m, line in METHODS.items() if not line.reference and m != "delta-lora"):
        if any(rule.facts.too_short for rule in recipe(name).rules):
            continue
        assert idle(recipe(name), 1) == idle(recipe(name), None) == ""


def test_rm_lora_needs_as_many_slots_as_it_keeps() -> None:
    for keep in (None, 1, 4):
        check_combination(recipe("rm-lora", r=4, options={"keep": keep}))
    with pytest.raises(LoralignError, match="raise the rank"):
        check_combination(recipe("rm-lora", r=4, options={"keep": 5}))


def test_one_sided_recipes_pay_for_one_side() -> None:
    found = planned(recipe("lora-fa", r=4))
    assert found.trainable == 2 * 4 * sum(d_out for d_out, _ in LINEAR.values())
    assert found.adapter_bytes == plain_lora().adapter_bytes


def test_full_pays_for_the_matrices() -> None:
    found = planned(Full())
    numbers = 2 * sum(a * b for a, b in LINEAR.values())
    assert (found.trainable, found.adapter_bytes, found.export_rank) == (numbers, 0, 0)
    assert found.optimizer_bytes == 8 * numbers
    assert found.peak_bytes > found.weights_bytes + 3 * 4 * numbers


def test_ranks_that_differ_are_counted_and_the_largest_is_exported() -> None:
    made = recipe("lora", r=4, ranks={"down_proj": 7})
    found = planned(made)
    assert found.export_rank == 7
    assert found.trainable == 2 * sum((7 if k == "down" else 4) * (a + b) for k, (a, b) in LINEAR.items())


def test_longer_rows_cost_more_and_recomputing_less() -> None:
    short, long = (planned(recipe("lora", r=4), Step(4, n)) for n in (16, 48))
    assert long.activation_bytes > 1.2 * short.activation_bytes
    deep = {"num_hidden_layers": 4}
    kept = planned(recipe("lora", r=4), Step(8, 64), **deep)
    again = planned(recipe("lora", r=4), Step(8, 64, gradient_checkpointing=True), **deep)
    assert again.peak_bytes < kept.peak_bytes


def test_no_site_and_no_plan() -> None:
    with pytest.raises(LoralignError, match="no module matches targets"):
        planned(recipe("lora", targets=("nothing",)))


def test_the_rate_is_stated_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, source = learning_rate("lora-ga + lora-rite", 2.0, 2000)
    assert tuned == pytest.approx(2.2e-4 / 2)
    assert "our sweep" in source
    assert "H100 study" in learning_rate("hrp", 2.0, 2000)[1]
    untuned = replace(METHODS["hrp"], id="newcomer", prior=LrPrior(None, "unknown"))
    monkeypatch.setitem(METHODS, "newcomer", untuned)  # type: ignore[arg-type]
    unknown = learning_rate("newcomer", 2.0, 2000)
    assert unknown[0] == learning_rate("lora", 2.0, 2000)[0]
    assert "unknown for newcomer" in unknown[1]


MEASURED = {
    "lora": ("lora", Step(4, 48), {}),
    "lora-ga, two micro-batches": (
        "lora-ga",
        Step(2, 48, micro_batches=2),
        {"hidden_size": 64, "intermediate_size": 128},
    ),
    "lora-pro, recomputed": ("lora-pro", Step(4, 64, gradient_checkpointing=True), {"num_hidden_layers": 6}),
}
LARGE = {"vocab_size": 512, "max_position_embeddings": 64}


@pytest.mark.parametrize("case", MEASURED)
def test_the_peak_is_that_of_real_steps(case: str) -> None:
    """Live bytes of real tensors in three real optimizer steps, weights included, within 15 %."""
    name, step, changes = MEASURED[case]
    made = recipe(name, r=4)
    expected = estimate(meta_llama(**LARGE, **changes), made, step).peak_bytes
    with LiveBytes() as live:
        model = type(toy.llama())(toy.llama(**LARGE, **changes).config).train()
        loss = usual_loss(model, step)
        batch = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in example_batch(model, step).items()}
        adapted = adapt(model, made, [{k: v[:1, :8] for k, v in batch.items()}] * 12, loss=loss)
        if step.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        taker = optimizer(adapted, made, 1e-6)
        live.peak = live.now  # the init is not part of a step
        for _ in range(3):
            for _ in range(step.micro_batches):
                (loss(adapted, batch) / batch["input_ids"].numel()).backward()
            taker.step()
            taker.zero_grad()
    assert len(sites(adapted)) == 7 * model.config.num_hidden_layers
    assert expected == pytest.approx(live.peak, rel=0.15)


def in_training(made: Recipe, step: Step) -> tuple[Any, Callable[[], None]]:
    """A small Llama that is adapted, and the forward and backward of one batch."""
    model = type(toy.llama())(toy.llama().config).train()
    loss = usual_loss(model, step)
    batch = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in example_batch(model, step).items()}
    adapted = adapt(model, made)
    return adapted, lambda: loss(adapted, batch).backward()


@pytest.mark.filterwarnings("ignore:rank 256 exceeds")
def test_where_the_optimizers_step_is_the_fullest_moment_it_is_what_is_planned() -> None:
    """Far more trained numbers than activations: gradients and updates beside the state."""
    made, step = recipe("lora", r=256), Step(1, 4)
    expected = estimate(meta_llama(), made, step)
    with LiveBytes() as live:
        adapted, backward = in_training(made, step)
        taker = optimizer(adapted, made, 1e-6)
        for _ in range(2):
            backward()
            taker.step()
            taker.zero_grad()
    assert expected.peak_bytes == pytest.approx(live.peak, rel=0.01)


@pytest.mark.filterwarnings("ignore:rank 64 exceeds")
def test_gradients_of_the_micro_batches_before_are_there() -> None:
    """Forward and backward of the last one of a step, without the optimizer."""
    made, step = recipe("lora", r=64), Step(4, 16, micro_batches=2)
    expected = estimate(meta_llama(), made, step)
    with LiveBytes() as live:
        _, backward = in_training(made, step)
        for _ in range(2):
            live.peak = live.now
            backward()
    planned_bytes = expected.weights_bytes + expected.adapter_bytes + expected.activation_bytes
    assert planned_bytes == pytest.approx(live.peak, rel=0.03)


def test_on_a_gpu_what_the_last_step_moved_is_there_until_its_norm_is_read() -> None:
    here, there = (planned(recipe("lora", r=4), Step(2, 8, device=device)) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert there.optimizer_bytes == here.optimizer_bytes + 4 * here.trainable


STARTS_MEASURED = {
    "hrp": ("hrp", {"steps": 2}),
    "hrp-sketch": ("hrp-sketch", {"micro_batches": 2}),
    "lora-ga": ("lora-ga", {"micro_batches": 2}),
}


@pytest.mark.parametrize("case", STARTS_MEASURED)
def test_the_start_takes_what_is_planned(case: str) -> None:
    """Live bytes of real tensors while evidence is collected at the step's own batches, weights included."""
    name, options = STARTS_MEASURED[case]
    made, step, wide = recipe(name, r=4, options=options), Step(4, 64), {"hidden_size": 64, "intermediate_size": 128}
    found = estimate(meta_llama(**LARGE, **wide), made, step)
    with LiveBytes() as live:
        model = type(toy.llama())(toy.llama(**LARGE, **wide).config).train()
        loss = usual_loss(model, step)
        batch = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in example_batch(model, step).items()}
        adapt(model, made, [batch] * 3, loss=loss)
    assert found.start_bytes == pytest.approx(live.peak, rel=0.015)
    assert found.fullest_bytes == max(found.start_bytes, found.peak_bytes)


KEPT = {  # what a need keeps of a site of 100 × 60 at rank 2, in bytes: on the host, beside the model
    "nothing": (NOTHING, (0, 0)),
    "exact": (TopGradient(2, 8, None), (4 * 6000, 0)),
    "sketch": (TopGradient(2, 8, Sketch(8)), (0, 4 * 16 * 160)),
    "a sketch that would be no smaller": (TopGradient(2, 8, Sketch(20)), (4 * 6000, 0)),
    "preheat": (Preheated(lambda r: 8, 5, "AB"), (0, 16 * 8 * 160)),
    "preheat of A": (Preheated(lambda r: 8, 5, "A"), (0, 8 * (16 * 60 + 4 * 100))),
    "preheat of B": (Preheated(lambda r: 8, 5, "B"), (0, 8 * (4 * 60 + 16 * 100))),
    "preheat of more than a side": (Preheated(lambda r: 80, 5, "AB"), (0, 16 * 60 * 160)),
    "preheat without a step": (Preheated(lambda r: 8, 0, "A"), (0, 4 * 8 * 160)),
    "subspace": (CommonSubspace(("a", "b", "c")), (3 * 4 * 6000, 0)),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_a_start_keeps_and_where(what: str) -> None:
    need, wanted = KEPT[what]
    site = Site("q", nn.Identity(), "default", 100, 60, 2, 1.0)
    assert evidence_bytes(need, [site]) == wanted  # type: ignore[arg-type]


def test_a_start_that_reads_no_batch_takes_no_step_of_the_model() -> None:
    assert planned(recipe("cora", r=4)).start_bytes == planned(recipe("pissa", r=4)).start_bytes == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_fused_experts_are_traced_in_either_precision(bf16: bool) -> None:
    """The peak of a mixture is that of one real forward and backward of it, within 15 %."""
    step = Step(4, 48, bf16=bf16)
    with torch.device("meta"):
        skeleton = type(toy.moe())(toy.moe().config).to(torch.bfloat16 if bf16 else torch.float32)
    expected = trace(skeleton, step, example_batch(skeleton, step), model_loss)
    assert expected > sum(p.numel() * p.element_size() for p in skeleton.parameters())
    if bf16:
        return
    with LiveBytes() as live:
        model = type(toy.moe())(toy.moe().config).train()
        batch = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in example_batch(model, step).items()}
        live.peak = live.now
        model_loss(model, batch).backward()
    assert expected == pytest.approx(live.peak, rel=0.15)
