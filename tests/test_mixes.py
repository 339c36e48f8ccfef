"""Every transform and gradient rule × {lora, lora-ga, hrp, cora} through `loralign train`, to a verified adapter.

The runs only write; all folders are verified at the end, in one clean process. One mix verifies itself, as for users.
Default: every stepper from lora-ga, every start under Adam, and what is special. `make test-all`: the full product.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_trl
import toy
import warm
from loralign import METHODS, Recipe, adapt, build, sites
from loralign.cli.app import main
from loralign.config.recipe import load, to_job
from loralign.io.verify import VerifyJob, VerifyReport, verify_many
from loralign.methods.transform.lora_fa import projected_gradient
from loralign.train import sft

STARTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-ga": {"micro_batches": 2},
    "hrp": {"rank": 8, "steps": 3, "accumulate": 1},
    "cora": {"sources": ["first", "second"], "side": "right"},
}
STEPPERS: dict[str, dict[str, Any]] = {
    "lora-plus": {"ratio": 4.0},
    "lora-pro": {},
    "lora-rite": {},
    "riemannian": {},
    "muon-factors": {},
    "spectral": {},
    "rm-lora": {},
    "delta-lora": {"wait_steps": 1},
}
"""lora-fa has a start of its own, so it meets the others through the library (below)."""
MIXES = [("", start) for start in STARTS] + [(stepper, start) for stepper in STEPPERS for start in STARTS]
REFUSED = {("delta-lora", "lora-ga")}
"""A twin under a form that computes its factors."""
TWIN = {"lora-ga"}
STEPS = 3
QUICK = {("delta-lora", "lora"), ("lora-pro", "cora"), ("rm-lora", "hrp"), ("lora-fa", "lora-ga")}
"""Beside those from lora-ga and those under Adam: a form with its own factors, one-sided pairs, masks on a preheat."""


def product(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    def marks(stepper: str, start: str) -> list[pytest.MarkDecorator]:
        quick = not stepper or start == "lora-ga" or (stepper, start) in QUICK
        return [] if quick else [pytest.mark.slow]

    return [pytest.param(*pair, marks=marks(*pair)) for pair in pairs]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs happen: a saved tiny Llama, rows, two adapters as sources of common directions."""
    root, before = tmp_path_factory.mktemp("mixes"), dict(os.environ)
    tiny_trl.tokenizer().save_pretrained(root / "base")
    toy.llama(max_position_embeddings=256).save_pretrained(root / "base")
    rows = [{"prompt": tiny_trl.words(4, i), "completion": " " + tiny_trl.words(3, 100 + i % 3)} for i in range(16)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for k, name in enumerate(("first", "second")):
        source(root / "base", root / name, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield root
    os.environ.clear()
    os.environ.update(before)


@torch.no_grad()
def source(base: Path, folder: Path, k: int) -> None:
    """An adapter of rank 6 whose factors share four directions with the other one."""
    made = build("lora", r=6)
    assert isinstance(made, Recipe)
    model = adapt(type(toy.llama()).from_pretrained(base), made)
    for n, site in enumerate(sites(model)):
        for side in (site.layer.lora_A, site.layer.lora_B):
            p = side[site.adapter].weight  # type: ignore[index]
            common = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            own = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * (k + 1) + n))
            slot = torch.arange(6) < 4
            p.copy_(torch.where(slot[:, None] if p.shape[0] == 6 else slot, common, 0.1 * own))
    model.save_pretrained(folder)


def recipe_file(stepper: str, start: str, output: str) -> Path:
    path = Path(f"{output}.json")
    rate = 1e-3 if "lora-plus" in stepper else 3e-3
    settings = {
        "model": "base",
        "data": {"train": "rows.jsonl", "max_length": 32},
        "method": f"{start} + {stepper}" if stepper else start,
        "options": {**STARTS[start], **STEPPERS.get(stepper, {})},
        "rank": 4,
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": rate, "log_every": 1, "schedule": "constant"},
        "output": output,
    }
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def command(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def name_of(stepper: str, start: str) -> str:
    return f"{stepper or 'adamw'}_{start}"


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """The mixes of the tests that were chosen; where no test of one mix was, those that are told apart."""
    items = (item for item in request.session.items if item.path == request.path)
    params = [item.callspec.params for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    found = list(dict.fromkeys((p["stepper"], p["start"]) for p in params))
    return found or [(stepper, "lora-ga") for stepper in ("", *STEPPERS, "lora-fa")]


@pytest.fixture(scope="module")
def runs(world: Path, chosen: list[tuple[str, str]]) -> dict[str, tuple[int, str, str]]:
    """Those of the command line, with their verification put off; lora-fa's by the library."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "verify", lambda folder, base=None: SimpleNamespace(passed=True, proven=True))
        for stepper, start in chosen:
            name = name_of(stepper, start)
            if stepper == "lora-fa":
                job = to_job(load(recipe_file("", start, name)), hidden_size=32)
                assert isinstance(job.recipe, Recipe)
                made = replace(job.recipe, transform=projected_gradient(), name=f"lora-fa, {start}")
                sft.run(replace(job, recipe=made))
            else:
                found[name] = command("train", recipe_file(stepper, start, name))
    return found


@pytest.fixture(scope="module")
def verified(
    world: Path, chosen: list[tuple[str, str]], runs: dict[str, tuple[int, str, str]]
) -> dict[str, VerifyReport]:
    """What one clean process says about all folders."""
    names = [name_of(*mix) for mix in chosen if mix not in REFUSED]
    with pytest.MonkeyPatch.context() as patch:
        warm.verification(patch)
        reports = verify_many([VerifyJob(world / name, world / "base") for name in names])
    return dict(zip(names, reports, strict=True))


def logged(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name, "log.jsonl").read_text(encoding="utf-8").splitlines()]


def sound(name: str, start: str, report: VerifyReport, world: Path) -> None:
    assert report.passed, report.failure
    assert report.relative < 1e-5 and report.effect > 1e-3, (report.relative, report.effect)  # exact, and it moved
    config = json.loads((world / name / "adapter_config.json").read_text(encoding="utf-8"))
    twice = start in TWIN or name.startswith("delta-lora")
    assert config["peft_type"] == "LORA" and config["r"] == (8 if twice else 4)
    steps = [line for line in logged(name) if "loss" in line]
    assert len(steps) == STEPS and all(line["grad_norm"] > 0 for line in steps)


@pytest.mark.parametrize(("stepper", "start"), product(MIXES))
def test_a_mix_ends_as_a_verified_adapter(
    stepper: str, start: str, world: Path, runs: dict[str, tuple[int, str, str]], verified: dict[str, VerifyReport]
) -> None:
    name = name_of(stepper, start)
    code, _, err = runs[name]
    if (stepper, start) in REFUSED:
        assert code == 2 and "twin" in err and not (world / name / "adapter_config.json").exists()
        return
    assert code == 0, err
    assert "applied to 14/14 pairs" in err
    sound(name, start, verified[name], world)


@pytest.mark.parametrize(("stepper", "start"), product(("lora-fa", start) for start in STARTS))
def test_lora_fa_from_every_start(stepper: str, start: str, world: Path, verified: dict[str, VerifyReport]) -> None:
    name = name_of(stepper, start)
    sound(name, start, verified[name], world)


def test_the_mixes_differ(verified: dict[str, VerifyReport]) -> None:
    """No transform is silently another one: all runs of a start end elsewhere.

    Not from cora, where one factor has orthonormal rows and rests: there the Riemannian metric is the plain one, and
    lora-pro's one-sided formula is lora-fa's.
    """
    for start in ("lora", "lora-ga", "hrp"):
        effects = [report.effect for name, report in verified.items() if name.endswith(f"_{start}")]
        assert len({f"{effect:.6e}" for effect in effects}) == len(effects)
    assert sum(name.endswith("_lora-ga") for name in verified) == len(STEPPERS) + 1  # Adam and lora-fa, no delta-lora


def test_a_mix_verifies_itself(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora-ga + lora-rite` as users run it, clean process included."""
    warm.verification(monkeypatch)
    code, out, err = command("train", recipe_file("lora-rite", "lora-ga", "whole"))
    assert code == 0, err
    assert "erified" in out + err
    run = json.loads((world / "whole" / "run.json").read_text(encoding="utf-8"))
    assert run["verified"] is True


def test_every_transform_and_rule_of_the_table_is_here() -> None:
    """But those with a start of their own, which meet no other one (lora-fa does, through the library), and those that
    allocate slots, whose ranks are not the recipe's (test_rank.py)."""
    acting = {m.id for m in METHODS.values() if (m.transform is not None or m.rules) and m.init is None}
    allocating = {m.id for m in METHODS.values() if any(rule().facts.allocates for rule in m.rules)}
    assert acting - allocating == set(STEPPERS)
