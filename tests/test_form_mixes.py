"""Forms with other methods' starts, optimizers and rules: every mix that the table allows trains and exports."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import toy
from loralign import METHODS, LoralignError, Recipe, adapt, build, factors, sites
from loralign.io.export import export
from loralign.plan.combinations import check_combination
from loralign.types import CommonSubspace
from short_runs import gap, output, train
from toy import batch_for
from toy_sources import adapters

STEPS = 3
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sbora-fa": ("sbora-fa", {}),
    "sbora-fb": ("sbora-fb", {}),
    "prolora": ("prolora", {"share_A": 2, "share_B": 3}),
    "reslora-bs": ("reslora", {"shortcut": "bs"}),
    "reslora-is": ("reslora", {"shortcut": "is"}),
    "reslora-ms": ("reslora", {"shortcut": "ms"}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "hrp": {"rank": 6, "steps": 2},
    "allocating-lora": {"rounds": 1},
    "prilora": {"interval": 2},
}
"""So that they act within three steps."""
QUICK = {
    ("sbora-fa", "spectral"),
    ("sbora-fb", "rm-lora"),
    ("prolora", "rslora"),
    ("reslora-bs", "hrp-sketch"),
    ("reslora-bs", "prilora"),
    ("reslora-is", "lora-plus"),
    ("reslora-ms", "cora"),
}


def recipe(form: str, other: str, sources: tuple[str, ...] = ("folder",)) -> Recipe | None:
    """None where the table refuses the mix."""
    name, options = FORMS[form]
    shared = {"sources": sources} if other in FROM_SOURCES else {}
    try:
        made = build(f"{name} + {other}", {**options, **OPTIONS.get(other, {}), **shared}, r=3, alpha=6.0, seed=11)
        check_combination(made)
    except LoralignError:
        return None
    assert isinstance(made, Recipe)
    return made


OTHERS = [m.id for m in METHODS.values() if not m.reference and not m.renamed and m.id != "lora"]
FROM_SOURCES = {n for n in OTHERS if isinstance(build(n).init.needs, CommonSubspace)}  # type: ignore[union-attr]
ALLOWED = [pair for pair in product(FORMS, OTHERS) if recipe(*pair) is not None]


def mixes() -> Iterator[Any]:
    for form, other in ALLOWED:
        marks = [] if (form, other) in QUICK else [pytest.mark.slow]
        yield pytest.param(form, other, marks=marks, id=f"{form} + {other}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return adapters(toy.llama, tmp_path_factory.mktemp("sources"))


def test_the_quick_mixes_are_allowed() -> None:
    assert set(ALLOWED) >= QUICK and {form for form, _ in QUICK} == FORMS.keys()
    assert ("reslora-is", "prilora") in ALLOWED and ("reslora-ms", "prilora") not in ALLOWED  # ranks that have no sum


@pytest.mark.parametrize(("form", "other"), list(mixes()))
def test_a_mix_starts_at_the_base_trains_and_reloads(
    form: str, other: str, sources: tuple[str, ...], tmp_path: Path
) -> None:
    base = toy.llama()
    before = output(base)
    made = recipe(form, other, sources)
    assert made is not None
    model = adapt(base, made, [batch_for(base)] * 3)
    model.train()
    assert gap(output(model), before) < 1e-6
    train(model, made, STEPS, lr=0.01)
    after = output(model)
    assert gap(after, before) > 1e-3
    assert all(bool(factors(site)[1].any()) for site in sites(model) if other != "allocating-lora")
    report = export(model, tmp_path / "out", base_id="toy", probes=batch_for(base))
    stock = PeftModel.from_pretrained(toy.llama(), tmp_path / "out").eval()
    assert report.method_exact == (form not in ("reslora-is", "reslora-ms"))
    lost = gap(output(stock), after)
    if report.method_exact:
        assert lost < 1e-6
    else:
        assert report.difference is not None and 1e-6 < lost < gap(before, after)
