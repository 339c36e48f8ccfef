"""`momentum_dtype: bfloat16`: first moments in half the bytes, where a method keeps any; said by `plan`, resumed bit by
bit, and refused where there is nothing to keep."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from loralign import Recipe, adapt, build, optimizer
from loralign.plan.combinations import check_combination
from loralign.plan.memory import estimate
from loralign.plan.trace import Step
from loralign.types import LoralignError
from toy import batch_for, llama
from trainers import attached_run

HALF = {"momentum_dtype": "bfloat16"}
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "lora": ("lora", {}, {"exp_avg"}),
    "lora-plus": ("lora-plus", {}, {"exp_avg"}),
    "lora-fa": ("lora-fa", {}, {"exp_avg"}),
    "riemannian": ("riemannian", {}, {"exp_avg"}),
    "lora-pro": ("lora-pro", {}, {"exp_avg"}),
    "lora-pro full": ("lora-pro", {"moments": "full"}, {"exp_avg"}),
    "lora-rite": ("lora-rite", {}, {"first"}),
    "spectral": ("spectral", {}, {"momentum"}),
    "lora + rm-lora": ("rm-lora", {}, {"exp_avg"}),
}


def recipe(case: str, **more: Any) -> Recipe:
    name, options, _ = CASES[case]
    made = build(name, {**options, **more}, r=4)
    assert isinstance(made, Recipe)
    return made


def begun(made: Recipe) -> tuple[Any, Any]:
    model = adapt(llama(), made, [])
    stepper = optimizer(model, made, 1e-3)
    stepper.between = False
    return model, stepper


def steps(model: Any, stepper: Any, count: int) -> None:
    for _ in range(count):
        model(**batch_for(model)).loss.backward()
        stepper.step()
        stepper.zero_grad()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_half_the_bytes_of_what_is_said_and_the_same_course(case: str) -> None:
    kept = CASES[case][2]
    (model, stepper), (exact, theirs) = begun(recipe(case, **HALF)), begun(recipe(case))
    start = trained(model)
    steps(model, stepper, 4)
    steps(exact, theirs, 4)
    for state in stepper.state.values():
        assert {k for k, t in state.items() if t.dtype == torch.bfloat16} <= kept
        assert all(state[k].dtype == torch.bfloat16 for k in kept & state.keys())
    ours, wanted = trained(model), trained(exact)
    moved = sum(float((wanted[k] - start[k]).norm() ** 2) for k in wanted) ** 0.5
    off = sum(float((wanted[k] - ours[k]).norm() ** 2) for k in wanted) ** 0.5
    assert 0 < off < 0.03 * moved
    with torch.device("meta"):
        base = llama().to("meta")
    planned = estimate(base, recipe(case, **HALF), Step(rows=1, length=8))
    there = sum(t.nbytes for state in stepper.state.values() for t in state.values())
    fewer = sum(2 * state[k].numel() for state in stepper.state.values() for k in kept & state.keys())
    assert planned.optimizer_bytes == there
    assert there == sum(t.nbytes for state in theirs.state.values() for t in state.values()) - fewer


@pytest.mark.parametrize("case", CASES)
def test_state_comes_back_bit_by_bit(case: str) -> None:
    whole, stepper = begun(recipe(case, **HALF))
    steps(whole, stepper, 3)
    file = io.BytesIO()
    torch.save((trained(whole), stepper.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    again, other = begun(recipe(case, **HALF))
    for name, p in again.named_parameters():
        if p.requires_grad:
            p.data.copy_(values[name])
    other.load_state_dict(state)
    if case == "lora + rm-lora":
        other.rule_states = stepper.rule_states
    steps(whole, stepper, 2)
    steps(again, other, 2)
    assert all(torch.equal(p, trained(again)[n]) for n, p in trained(whole).items())


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    made = recipe("lora", **HALF)
    whole = attached_run(tmp_path / "whole", made)
    again = attached_run(tmp_path / "again", made, tmp_path / "whole" / "checkpoint-2")
    assert all(torch.equal(p, trained(again)[n]) for n, p in trained(whole).items())


def test_refused_where_no_moment_is_kept() -> None:
    with pytest.raises(LoralignError, match="moments: none keeps no momentum"):
        build("lora-pro", {"moments": "none", **HALF})
    with pytest.raises(LoralignError, match="rac-lora-exact has no option 'momentum_dtype'"):
        build("rac-lora-exact", HALF)
    with pytest.raises(LoralignError, match="momentum_dtype must be one of float32, bfloat16"):
        build("lora", {"momentum_dtype": "float16"})
    made = build("prolora", HALF)
    assert isinstance(made, Recipe)
    with pytest.raises(LoralignError, match="leave the transform and its options out"):
        check_combination(made)
