"""The contract of DESIGN §2 for every adapter recipe of the table; a method added later is covered without an edit.

Default: all recipes on a Llama, three recipes on every family. `make test-all`: the full product.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import toy
import warm
from cached_assets import asset, needs
from loralign import METHODS, Recipe, adapt, build, factors, peft_config, sites
from loralign.io.export import export
from loralign.io.verify import VerifyJob, verify_many
from loralign.plan.combinations import facts
from loralign.train.attach import attach
from loralign.types import CommonSubspace, TopGradient
from short_runs import gap, output, train
from toy import batch_for
from toy_sources import SHARED, adapters, planted
from trainers import toy_trainer

ADAPTERS = [m.id for m in METHODS.values() if not m.reference]
REAL = "smollm2-2layer"
FAMILIES: dict[str, Callable[[], Any]] = {
    **toy.FAMILIES,
    REAL: lambda: AutoModelForCausalLM.from_pretrained(asset(REAL), dtype=torch.float32).eval(),
}
EVERYWHERE = ("lora", "lora-ga", "pissa")
PROFILES: tuple[Literal["peft"], Literal["portable"]] = ("peft", "portable")
OPTIONS: dict[str, dict[str, Any]] = {
    "xgblora": {"fraction": 1.0, "link_steps": 2},
    "delta-lora": {"wait_steps": 0},
    "hrp": {"rank": 6, "steps": 3},
    "allocating-lora": {"rounds": 1},
    "prilora": {"interval": 2},
}
"""So that they act within three steps, and start within a second."""


def product() -> Iterator[Any]:
    for family in FAMILIES:
        for name in ADAPTERS:
            quick = family == "llama" or name in EVERYWHERE
            marks = [] if quick else [pytest.mark.slow]
            marks += [pytest.mark.assets, needs(REAL)] if family == REAL else []
            yield pytest.param(family, name, marks=marks, id=f"{name}-{family}")


def recipe(name: str, sources: Sequence[str] = (), **fields: Any) -> Recipe:
    """sources: of the methods that start from what several adapters share."""
    shared = {"sources": tuple(sources)} if sources else {}
    made = build(name, {**OPTIONS.get(name, {}), **shared}, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


Sources = Callable[[str, str], tuple[str, ...]]
FROM_SOURCES = frozenset(n for n in ADAPTERS if isinstance(recipe(n).init.needs, CommonSubspace))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """(method, family) -> folders of toy adapters that share two left directions; () where the method takes none."""

    @functools.cache
    def saved(family: str) -> tuple[str, ...]:
        return adapters(FAMILIES[family], tmp_path_factory.mktemp(f"sources-{family}"))

    return lambda name, family: saved(family) if name in FROM_SOURCES else ()


def _dropout(name: str, share: float) -> float:
    """0 for methods that the combination table keeps apart from dropout."""
    return 0.0 if "needs dropout 0" in facts(recipe(name)) else share


@pytest.mark.parametrize(("family", "name"), list(product()))
def test_contract(family: str, name: str, tmp_path: Path, sources: Sources) -> None:
    """1 identity at step 0, 2 forward = factors = merge = file, 3 stock PEFT loads it, 6 every pair was updated."""
    base = FAMILIES[family]()
    before, weights = output(base), copy.deepcopy(base.state_dict())
    made = recipe(name, sources(name, family), dropout=_dropout(name, 0.2))
    model = adapt(base, made, [batch_for(base)] * 3)

    assert gap(output(model), before) < 1e-6
    model.train()
    assert gap(output(model), before) < 1e-6  # with dropout too
    opt = train(model, made, 3)
    assert opt.applied == len(opt.sites) > 0

    after = output(model)
    assert gap(after, before) > 1e-4  # it moved
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    trained = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(trained[n], w) for n, w in weights.items() if n in trained)

    for site in sites(model):
        A, B = factors(site)
        delta = site.layer.get_delta_weight("default").detach()
        delta = delta.T if site.layer.fan_in_fan_out else delta
        assert torch.allclose(B @ A, delta, rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(FAMILIES[family](), tmp_path).eval()
    assert gap(output(stock), after) < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # live and frozen slots stand apart in the state
        model.save_pretrained(tmp_path / "gathered")
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        assert torch.equal(output(model), after), "as accelerate loads what it splits"
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "gathered"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    model.merge_adapter(safe_merge=True)
    assert gap(output(model), after) < 2e-6
    model.unmerge_adapter()
    assert gap(output(model), after) < 2e-6


def test_every_export_reloads_in_a_clean_process(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3: both profiles of every recipe, in one process with transformers and peft alone; in bf16 below 1 % is lost."""
    toy.llama().save_pretrained(tmp_path / "base")
    jobs = []
    for name in ADAPTERS:
        base = toy.llama()
        made = recipe(name, sources(name, "llama"))
        model = adapt(base, made, [batch_for(base)] * 3)
        train(model, made, 3, lr=1e-2)  # a gate that starts at zero moves far enough to be told from nothing
        for profile in PROFILES:
            out = tmp_path / f"{name}-{profile}"
            export(model, out, profile=profile, base_id="toy", probes=batch_for(base))
            jobs.append(VerifyJob(out, tmp_path / "base"))
        half = export(model, tmp_path / f"{name}-half", dtype=torch.bfloat16, base_id="toy", probes=batch_for(base))
        assert half.rounding is not None and half.rounding.total < 0.01, name
    warm.verification(monkeypatch)
    reports = verify_many(jobs)
    assert [r.line() for r in reports if not r.passed] == []
    for report in reports:
        assert report.relative < 1e-5 < 1e-3 < report.effect, report.folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_stop_and_resume_is_bit_exact(name: str, tmp_path: Path, sources: Sources) -> None:
    """4: six steps = three, a new process state, three more; dropout on. Another seed draws another start, which must
    not show; rules draw at every step and chains at every knot, so theirs is the same.
    """
    states = []
    other = 11 if recipe(name).rules or "chain" in facts(recipe(name)) else 99
    for folder, seed, resume in (("whole", 11, None), ("resumed", other, tmp_path / "whole" / "checkpoint-3")):
        made = recipe(name, sources(name, "llama"), dropout=_dropout(name, 0.1), seed=seed)
        trainer = toy_trainer(tmp_path / folder, peft_config(made, toy.llama()), steps=6, save_steps=3)
        attach(trainer, made, resume_from=resume, validation=[batch_for(toy.llama(), seed=9)])
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        states.append({n: p.detach().clone() for n, p in trainer.model.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_seed_one_result(name: str, sources: Sources) -> None:
    """5: draws are keyed, so the global generator's state does not matter; another seed gives another start, where the
    start is no function of weights, gradients or sources alone.
    """
    starts = []
    for noise, seed in ((0, 11), (1, 11), (0, 12)):
        torch.manual_seed(noise)
        made = recipe(name, sources(name, "llama"), seed=seed)
        model = adapt(toy.llama(), made, [batch_for(toy.llama())] * 2)
        starts.append(torch.cat([p.detach().flatten() for n, p in model.state_dict().items() if "lora_" in n]))
    assert torch.equal(starts[0], starts[1])
    drawn = "reads weights" not in facts(made) and not isinstance(made.init.needs, TopGradient | CommonSubspace)
    assert not (drawn and torch.equal(starts[0], starts[2]))


def test_sources_are_covered(sources: Sources) -> None:
    """The recipes of this contract that take sources start from them: the planted directions come first."""
    assert {"cora", "cora-init"} <= FROM_SOURCES
    for name in sorted(FROM_SOURCES):
        model = adapt(toy.llama(), recipe(name, sources(name, "llama")), [batch_for(toy.llama())] * 2)
        for site in sites(model):
            B: Any = site.layer.lora_B["default"].weight.detach()  # type: ignore[index]
            held = (B[:, :SHARED].T @ planted(site.d_out, site.name)).square().sum()
            assert abs(float(held) - SHARED) < 1e-4, (name, site.name)


def test_the_log_says_it_acted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe("lora")
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1)
    attach(trainer, made)
    with caplog.at_level(logging.INFO, "loralign"):
        trainer.train()
    assert "lora: applied to 14/14 pairs" in caplog.text
