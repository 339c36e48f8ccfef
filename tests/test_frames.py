"""Of every method: a deeper model compiles as much code as a shallower one, before and after its events and knots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from loralign import METHODS, Recipe, adapt, build, drive, optimizer
from loralign.compare.compiled import compiled
from loralign.types import CommonSubspace, Validation
from test_rank_mixes import EVENTS
from toy_sources import adapters

pytestmark = [  # dynamo's own, of tensors that it looks at
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]

STEPS = 6
SHALLOW, DEEP = 4, 7
OPTIONS: dict[str, dict[str, Any]] = {
    **EVENTS,
    "hrp": {"rank": 4, "steps": 2},
    "delta-lora": {"wait_steps": 2},
    "reslora": {"span": 2},
    "chain-of-lora": {"links": 3},
    "rac-lora": {"links": 3},
    "relora": {"link_steps": 2},
    "xgblora": {"link_steps": 1, "fraction": 0.5},
}
"""So that they act within these steps, and a shallow model has blocks of every kind."""
MIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "reslora, inputs": ("reslora", {"shortcut": "is"}),
    "reslora, features": ("reslora", {"shortcut": "ms"}),
    "twins of ragged ranks": ("pissa + prilora", {}),
    "links of ragged ranks": ("chain-of-lora + prilora", {"interval": 1}),
    "twins in links": ("olora + chain-of-lora", {}),
}
ADAPTERS = [m.id for m in METHODS.values() if not m.reference]


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Steps(nn.Module):
    """Blocks of two layers, named as Transformers names them."""

    _no_split_modules: ClassVar = ["Step"]

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step() for _ in range(count))

    def forward(self, x: Tensor) -> Any:
        y = x
        for layer in self.layers:
            y = layer(y)
        return SimpleNamespace(loss=(y - x.flip(1)).square().mean())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(count: int) -> Steps:
    torch.manual_seed(0)
    return Steps(count)


def recipe_of(name: str, folder: Path) -> Recipe:
    parts, more = MIXES.get(name, (name, {}))
    options = {k: v for part in parts.split(" + ") for k, v in OPTIONS.get(part, {}).items()}
    fields = {"r": 4, "alpha": 8.0, "targets": ("up", "down")}
    if isinstance(build(parts).init.needs, CommonSubspace):  # type: ignore[union-attr]
        options["sources"] = adapters(lambda: stack(DEEP), folder)
    made = build(parts, {**options, **more}, **fields)
    assert isinstance(made, Recipe)
    return made


def frames(base: Any, made: Recipe, batch: dict[str, Tensor]) -> list[int]:
    """How many were compiled by the first step, by the last one, by an evaluation, by a backward in evaluation mode."""
    model: Any = adapt(base, made, [batch] * 3)
    opt = optimizer(model, made, 1e-2)
    judged = {"losses": lambda masks: [float(k) for k, _ in enumerate(masks)]}
    wants = any(isinstance(rule.needs, Validation) for rule in made.rules)
    driver = drive(model, made, opt, STEPS, observe=lambda: judged if wants else {})
    counters.clear()
    found = []
    with compiled(base, "eager"):
        for step in range(STEPS):
            model.train()
            model(**batch).loss.backward()
            opt.step()
            driver.after_step()
            opt.zero_grad()
            if step in (0, STEPS - 1):
                found.append(counters["stats"]["unique_graphs"])
        model.eval()
        for grads in (False, True):
            with torch.set_grad_enabled(grads):
                model(**batch)
            found.append(counters["stats"]["unique_graphs"])
    assert driver.changes or not any(rule.facts.allocates for rule in made.rules)
    assert driver.episodes.started or not any(METHODS[part].outer for part in made.name.split(" + "))
    assert not counters["graph_break"]
    driver.close()
    return found


QUICK = {"lora", "adalora", "prilora", "pissa", "xgblora", "chain-of-lora", "reslora, features"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*ADAPTERS, *MIXES)]
)
def test_a_deeper_model_compiles_no_more(name: str, tmp_path: Path) -> None:
    made = recipe_of(name, tmp_path)
    batch = {"x": torch.randn(3, 12)}
    shallow = frames(stack(SHALLOW), made, batch)
    torch._dynamo.reset()
    assert frames(stack(DEEP), made, batch) == shallow
    assert shallow[0] > 0
