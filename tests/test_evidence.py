"""Collecting evidence: the cache, interruptions, what it costs, what it leaves behind, several processes."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import evidence_ranks
import warm
from evidence_ranks import CALLS
from loralign import LoralignError, Recipe, adapt, build, sites
from loralign.carrier.sites import put_in
from loralign.evidence import collect, model_loss
from loralign.evidence.partial import EVERY_S, FACTS, Partial
from loralign.maths.whole import replacing
from loralign.types import (
    NOTHING,
    Activations,
    Batch,
    CommonSubspace,
    Directions,
    Facts,
    Preheated,
    Sketch,
    Start,
    TopGradient,
    WorkFailed,
)
from oracles.sketch import projector
from toy import batches_for, llama
from toy_sources import adapters

NEED = TopGradient(2, 2, Sketch(6, 1, exact_above=1.0))


def recipe(name: str = "lora", options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options, **{"r": 2, "alpha": 4.0, **fields})
    assert isinstance(made, Recipe)
    return made


def gathered(cache: Path | None, need: Any = NEED, model: Any = None, batches: Any = None, **options: Any) -> Any:
    model = put_in(llama() if model is None else model, recipe())
    return collect(
        need, model, sites(model), batches_for(model, 3) if batches is None else batches, cache=cache, **options
    )


def equal(a: dict[str, Directions], b: dict[str, Directions]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return (x is None and y is None) or torch.equal(x, y)

    facts = ("captured", "exact", "note", "held_out", "quality")
    return list(a) == list(b) and all(
        all(same(getattr(a[n], k), getattr(b[n], k)) for k in "USV")
        and all(getattr(a[n], f) == getattr(b[n], f) for f in facts)
        for n in a
    )


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize(
    "need",
    [NEED, TopGradient(2, 2, None), Preheated(lambda r: 6, 2, "AB", micro_batches=2), CommonSubspace(width=4)],
    ids=["sketch", "exact", "preheated", "common"],
)
def test_cache_hit(need: Any, tmp_path: Path) -> None:
    """The second collection reads the first one's file: equal to the bit, no backward pass."""
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(what)

    first = gathered(tmp_path, need, progress=progress)
    assert seen and not first.spent.cached and len(list(tmp_path.iterdir())) == 1
    seen.clear()
    second = gathered(tmp_path, need, progress=progress)
    assert not seen and second.spent == replace(first.spent, cached=True) and equal(first, second)
    assert equal(first, gathered(None, need))  # and the same as without a cache


def smoothed(model: nn.Module, batch: Batch) -> Tensor:
    return 1.1 * model_loss(model, batch)


def changed(part: str, factor: float = 1.5) -> Any:
    model = llama()
    with torch.no_grad():
        model.get_submodule(part).weight[0] *= factor
    return model


def picked(*which: int) -> list[Batch]:
    batches = batches_for(llama(), 4)
    return [batches[i] for i in which]


def relabelled() -> list[Batch]:
    """One label less in the last micro-batch."""
    batches = picked(0, 1, 2)
    batches[-1]["labels"][0, -1] = -100
    return batches


MISSES: dict[str, Callable[[Path], Any]] = {
    "adapted weight": lambda p: gathered(p, model=changed("model.layers.1.mlp.up_proj")),
    "norm": lambda p: gathered(p, model=changed("model.norm")),
    "a weight by less than the loss shows": lambda p: gathered(p, model=changed("model.norm", 1 + 1e-5)),
    "head": lambda p: gathered(p, model=changed("lm_head")),
    "data": lambda p: gathered(p, batches=picked(0, 1, 3)),  # the first one, whose loss is in the key, is the same
    "order of data": lambda p: gathered(p, batches=picked(0, 2, 1)),
    "a label": lambda p: gathered(p, batches=relabelled()),
    "seed": lambda p: gathered(p, seed=1),
    "loss": lambda p: gathered(p, loss=smoothed),
    "width": lambda p: gathered(p, TopGradient(2, 2, Sketch(5, 1))),
    "passes": lambda p: gathered(p, TopGradient(2, 2, Sketch(6, 2))),
    "micro-batches": lambda p: gathered(p, TopGradient(2, 1, Sketch(6, 1))),
    "kind": lambda p: gathered(p, Preheated(lambda r: 12, 0, "A", micro_batches=3)),
}


@pytest.mark.parametrize("what", list(MISSES))
def test_cache_miss(what: str, tmp_path: Path) -> None:
    gathered(tmp_path)
    assert not MISSES[what](tmp_path).spent.cached
    assert len(list(tmp_path.iterdir())) == 2 and gathered(tmp_path).spent.cached


def test_cache_misses_another_preheat_or_other_sources(tmp_path: Path) -> None:
    """The rank of a preheat is a function; files of sources are told apart by name, size and time."""
    for R in (4, 6):
        assert not gathered(tmp_path / "a", Preheated(lambda r, R=R: R, 1, "AB", micro_batches=1)).spent.cached
    folders = adapters(llama, tmp_path / "s", 3)
    for chosen in (folders, folders[:2]):
        assert not gathered(tmp_path / "b", CommonSubspace(chosen)).spent.cached
    assert gathered(tmp_path / "b", CommonSubspace(folders)).spent.cached
    file = Path(folders[0]) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes())
    assert not gathered(tmp_path / "b", CommonSubspace(folders)).spent.cached


def test_the_cache_does_not_hold_what_is_trained(tmp_path: Path) -> None:
    """The adapter's own draws do not count: another seed of the global generator is a hit."""
    gathered(tmp_path)
    torch.manual_seed(123)
    assert gathered(tmp_path).spent.cached


def test_interrupted_collection_leaves_nothing(tmp_path: Path) -> None:
    """A stop in the middle leaves no file and a model as it was; the next run collects all."""
    model = put_in(llama(), recipe())
    before = {n: p.requires_grad for n, p in model.named_parameters()}

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(NEED, model, sites(model), batches_for(model, 3), cache=tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0
    assert equal(collect(NEED, model, sites(model), batches_for(model, 3), cache=tmp_path), gathered(None))


@pytest.mark.parametrize("train", ["AB", "A", "B"])
def test_a_stopped_preheat_goes_on(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop after the third of five steps: two steps are left, and the result is the uninterrupted one to the bit."""
    monkeypatch.setattr("loralign.evidence.partial.EVERY_S", 0.0)
    need = Preheated(lambda r: 6, 5, train, micro_batches=10, accumulate=2)
    model = put_in(llama(attention_dropout=0.1), recipe(dropout=0.1)).train()
    batches = batches_for(model, 10)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("preheat", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(need, model, sites(model), batches, cache=tmp_path, progress=stop)
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".partial"
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "loralign"):
        found = collect(need, model, sites(model), batches, cache=tmp_path, progress=lambda *of: seen.append(of))
    assert [of for of in seen if of[0] == "preheat"] == [("preheat", 4, 5), ("preheat", 5, 5)]
    assert "goes on after step 3" in caplog.text and [f.suffix for f in tmp_path.iterdir()] == [".safetensors"]
    whole = collect(need, model, sites(model), batches)
    assert equal(found, whole) and (found.spent.tokens, found.spent.micro_batches) == (whole.spent.tokens, 10)


def test_a_part_is_written_every_two_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, started = Partial(tmp_path / "e.partial"), time.monotonic()
    for seconds, due in ((0.0, False), (0.9 * EVERY_S, False), (1.1 * EVERY_S, True)):
        monkeypatch.setattr("loralign.evidence.partial.time.monotonic", lambda s=seconds: started + s)
        assert kept.due() == due and not Partial(None).due()
    kept.keep({"0|factor": torch.ones(2)}, dict.fromkeys(FACTS, 3))
    assert not kept.due() and kept.restore({"0|factor": torch.zeros(2)}) == dict.fromkeys(FACTS, 3)


def test_a_broken_or_foreign_part_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of other settings is not looked at, and one that cannot be read is collected again."""
    monkeypatch.setattr("loralign.evidence.partial.EVERY_S", 0.0)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    need, other = (Preheated(lambda r: 6, 3, "AB", micro_batches=3, lr=lr) for lr in (1e-2, 1e-3))
    with pytest.raises(KeyboardInterrupt):
        gathered(tmp_path, need, progress=stop)
    assert equal(gathered(tmp_path, other), gathered(None, other))
    (kept,) = tmp_path.glob("*.partial")
    kept.write_bytes(kept.read_bytes()[:100])
    assert equal(gathered(tmp_path, need), gathered(None, need)) and not list(tmp_path.glob("*.partial"))


def test_kept_evidence_that_lacks_a_module_is_collected_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = gathered(tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as f:
        facts = json.loads(f.metadata()["facts"])
        spent = f.metadata()["spent"]
    name, *rest = facts
    tensors = {k: t for k, t in load_file(file).items() if not k.startswith(f"{name}|")}
    save_file(tensors, file, metadata={"facts": json.dumps({n: facts[n] for n in rest}), "spent": spent})
    with caplog.at_level(logging.WARNING, "loralign"):
        assert equal(first, gathered(tmp_path))
    assert "it is about other modules): it is collected again" in caplog.text


def test_of_a_file_that_cannot_be_written_whole_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "e").write_text("before")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "e") as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert [p.name for p in tmp_path.iterdir()] == ["e"] and (tmp_path / "e").read_text() == "before"
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "new" / "e") as temporary:
        temporary.write_text("whole")
    assert caught.value.filename == str(tmp_path / "new" / "e"), "not what is beside it"
    Partial(tmp_path / "new" / "e").keep({}, dict.fromkeys(FACTS, 3))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["e"]
    assert Partial(tmp_path / "new" / "e").restore({}) == dict.fromkeys(FACTS, 3)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.int(), lambda t: t * float("nan")])
def test_kept_evidence_of_another_form_is_collected_again(
    change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = gathered(tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as f:
        about = f.metadata()
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("|U"))
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file, metadata=about)
    with caplog.at_level(logging.WARNING, "loralign"):
        assert equal(first, gathered(tmp_path))
    assert "it is collected again" in caplog.text


def test_broken_cache_file_is_collected_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = gathered(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with caplog.at_level(logging.WARNING, "loralign"):
        second = gathered(tmp_path)
    assert "cannot be read" in caplog.text and not second.spent.cached and equal(first, second)
    assert gathered(tmp_path).spent.cached


@pytest.mark.parametrize("name", ["lora-ga", "hrp", "hrp-sketch", "cora"])
def test_adapt_reads_the_cache(name: str, tmp_path: Path) -> None:
    """The whole start from a cache is the start without, and plan-time settings of the method are in the key."""
    options: dict[str, Any] = {"lora-ga": {"micro_batches": 2}, "hrp": {"rank": 6, "steps": 2}}.get(name, {})
    states = []
    for cache in (None, tmp_path, tmp_path):
        base = llama()
        model = adapt(base, recipe(name, options), batches_for(base, 3), cache=cache)
        states.append(model.state_dict())
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(t, s[k]) for s in states[1:] for k, t in states[0].items())


# --------------------------------------------------------------------------------------------------- what is collected


def test_nothing_is_free() -> None:
    model = put_in(llama(), recipe())
    found = collect(NOTHING, model, sites(model), None)
    assert not found and found.spent.micro_batches == 0
    with pytest.raises(LoralignError, match="no evidence collector for Activations"):
        collect(Activations(), model, sites(model), None)
    with pytest.raises(LoralignError, match="it needs data"):
        collect(NEED, model, sites(model), None)


def test_no_more_batches_are_drawn_than_asked_for() -> None:
    drawn: list[int] = []

    def batches() -> Any:
        for i, batch in enumerate(batches_for(llama(), 9)):
            drawn.append(i)
            yield batch

    found = gathered(None, batches=batches())
    assert drawn == [0, 1, 2] and found.spent.micro_batches == 3


def test_spent_counts_tokens_without_padding() -> None:
    batches = batches_for(llama(), 3)
    spent = gathered(None, TopGradient(2, 2, Sketch(4, 2, exact_above=1.0, held_out=1)), batches=batches).spent
    tokens = [int(b["attention_mask"].sum()) for b in batches]
    assert spent.micro_batches == 5 and spent.tokens == 2 * (tokens[0] + tokens[1]) + tokens[2]
    assert spent.seconds > 0 and spent.state_bytes > 0 and "5 micro-batches" in str(spent)


@pytest.mark.parametrize("need", [NEED, Preheated(lambda r: 6, 2, "AB", micro_batches=2)], ids=["sketch", "preheat"])
def test_the_model_is_left_as_it_was(need: Any) -> None:
    """Weights to the bit, flags, modes, generators; a fresh head keeps its gradient flag."""
    model = put_in(llama(attention_dropout=0.1), recipe(dropout=0.1)).train()
    head = model.get_base_model().lm_head.weight
    head.requires_grad_(True)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    collect(need, model, sites(model), batches_for(model, 3))
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), rng)
    flags = {n for n, p in model.named_parameters() if p.requires_grad}
    assert flags == {n for n, _ in model.named_parameters() if "lora_" in n or "lm_head" in n}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("need", [NEED, Preheated(lambda r: 6, 2, "AB", micro_batches=2)], ids=["sketch", "preheat"])
def test_gradients_that_were_there_are_there_again(need: Any) -> None:
    """In the middle of an accumulation, as a loop of one's own may collect."""
    model = put_in(llama(), recipe()).train()
    batch = batches_for(model, 1)[0]
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    collect(need, model, sites(model), batches_for(model, 3))
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before and before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_directions_are_orthonormal_and_on_the_cpu() -> None:
    for need in (NEED, TopGradient(2, 2, None), Preheated(lambda r: 6, 2, "AB", micro_batches=2)):
        for d in gathered(None, need).values():
            for Q in (d.U, d.V):
                assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1]), atol=1e-4) and Q.device.type == "cpu"
            assert bool((d.S[:-1] >= d.S[1:]).all())


class Routed(nn.Module):
    """Two experts, of which one is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


@pytest.mark.parametrize("name", ["lora-ga", "hrp", "hrp-sketch"])
def test_a_module_that_no_token_reached_starts_plainly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"hrp": {"rank": 4, "steps": 2}, "hrp-sketch": {"rank": 4, "micro_batches": 2}}.get(
        name, {}
    )
    torch.manual_seed(0)
    batches = [{"x": torch.randn(8, 16)} for _ in range(3)]
    made = recipe(name, options, targets=("used", "idle"))
    with caplog.at_level(logging.WARNING, "loralign"):
        model = adapt(Routed(), made, batches, loss=lambda m, b: m(b["x"]).square().mean())
    assert "left 1 sites without directions, idle first: plain start" in caplog.text
    plain = adapt(Routed(), recipe("lora", targets=("used", "idle")))
    start = {s.name: s.layer.lora_A["default"].weight.detach() for s in sites(model)}  # type: ignore[index]
    wanted = {s.name: s.layer.lora_A["default"].weight.detach() for s in sites(plain)}  # type: ignore[index]
    assert torch.equal(start["idle"], wanted["idle"])
    assert start["used"].shape != wanted["used"].shape or not torch.equal(start["used"], wanted["used"])


class Spike(torch.autograd.Function):
    """The loss is finite, its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g / 0.0


@pytest.mark.parametrize("need", [NEED, TopGradient(2, 2, None), Preheated(lambda r: 4, 0, "A", micro_batches=2)])
def test_a_gradient_that_is_not_finite_is_refused(need: Any) -> None:
    model = put_in(llama(), recipe())

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return Spike.apply(model_loss(m, batch))  # type: ignore[no-untyped-call, no-any-return]

    with pytest.raises(WorkFailed, match=r"of model\.layers\.0\.self_attn\.q_proj is not finite"):
        collect(need, model, sites(model), batches_for(model, 2), loss=loss)


def test_evidence_of_a_third_party_init() -> None:
    """An init states what it needs and gets it; no method's name is involved."""

    class FirstDirections:
        needs = TopGradient(1, 1, None)

        facts = Facts()

        def fits(self, d_out: int, d_in: int, r: int) -> str:
            return ""

        def __call__(self, W: Any, r: int, s: float, evidence: Directions | None, draw: Any) -> Start:
            assert evidence is not None and evidence.V is not None and evidence.V.shape[0] == W.shape[1]
            return Start(evidence.V[:, :r].T.contiguous(), torch.zeros(W.shape[0], r))

    model = adapt(llama(), replace(recipe(), init=FirstDirections()), batches_for(llama(), 1))
    assert len(sites(model)) == 14


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What two ranks found under DDP and FSDP2, and one process with all data."""
    folder = tmp_path_factory.mktemp("ranks")
    warm.together(evidence_ranks.run, folder, count=len(CALLS))
    return {f"{e}-{r}": load_file(folder / f"{e}-{r}.safetensors") for e, r, _ in CALLS}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks(engine: str, ranks: dict[str, dict[str, Tensor]]) -> None:
    """Bit-equal on both ranks; the values of one process that saw all micro-batches."""
    first, second, whole = ranks[f"{engine}-0"], ranks[f"{engine}-1"], ranks["none-0"]
    assert set(first) == set(second) == set(whole) and all(torch.equal(t, second[k]) for k, t in first.items())
    assert {k.split("|")[0] for k in first} == {"exact", "sketch", "hrp", "hrp-sketch", "cora"}
    for key, t in whole.items():
        kind, name, part = key.split("|")
        if part == "S":
            limit = {"sketch": 0.05, "hrp": 0.02}.get(kind, 1e-3)
            assert torch.allclose(first[key], t, rtol=limit, atol=limit * float(t.max()) if t.numel() else 0), key
        elif kind != "sketch":
            S = whole[f"{kind}|{name}|S"]
            gap = float((S[:-1] - S[1:]).min() / S[0]) if len(S) > 1 else 1.0
            if t.shape[1] and gap > 0.05:  # close values have no directions of their own
                assert torch.allclose(projector(first[key]), projector(t), atol=0.02), key
