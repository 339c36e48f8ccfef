"""The study files of scripts/studies: what their head says of the arms holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralign.compare.study import warn_of_idle_arms
from loralign.config.study import to_specs
from loralign.config.study_file import read_study
from loralign.train.adapt import adapt
from loralign.types import Recipe
from toy import llama

ROOT = Path(__file__).parent.parent / "scripts" / "studies"
FILES = sorted(ROOT.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_schedule_has_room(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    for spec in to_specs(read_study(file), 576):
        warn_of_idle_arms(spec)
    assert FILES and not caplog.records


def test_axes_are_at_equal_budgets() -> None:
    """The forms train as many numbers as `lora` within what its matrices' shapes allow, and every arm's scale is 2."""
    (spec,) = to_specs(read_study(ROOT / "axes.yaml"), 576)
    arms = {arm.name: arm for arm in spec.arms}
    sizes = {"hidden_size": 112, "intermediate_size": 280, "num_attention_heads": 4, "num_key_value_heads": 2}
    trained = {}
    for name in ("lora", *(n for n, a in arms.items() if a.family == "form")):
        recipe = arms[name].recipe
        assert isinstance(recipe, Recipe)
        model = adapt(llama(**sizes), recipe)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(abs(n / trained["lora"] - 1) < 0.06 for n in trained.values()), trained
    assert {a.recipe.s() for a in arms.values() if isinstance(a.recipe, Recipe)} == {2.0}
    assert {n for n, a in arms.items() if a.family == "primary"} == {"full", "lora"}


@pytest.mark.parametrize(
    ("file", "rank"), [("starts_wide", 64), ("starts_wide_r32", 32), ("starts-minilm", 64), ("starts-minilm-r32", 32)]
)
def test_wide_starts_are_all_at_the_same_scale(file: str, rank: int) -> None:
    (spec,) = to_specs(read_study(ROOT / f"{file}.yaml"), 576)
    recipes = [arm.recipe for arm in spec.arms if isinstance(arm.recipe, Recipe)]
    assert len(recipes) == 13 and {recipe.r for recipe in recipes} == {rank}
    assert all(recipe.s() == pytest.approx(rank**0.5, rel=1e-6) for recipe in recipes)
    assert {arm.family for arm in spec.arms} == {"primary", "start", "spectral", "transform"}
