"""A link of a chain warms up again: every number that a step moves a factor by follows the episode's factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from loralign import Recipe, build, peft_config, sites
from loralign.methods.transform.combine import descend
from loralign.train.attach import attach
from loralign.types import Draw, Episode, Facts
from toy import llama
from trainers import toy_trainer

LENGTH, RATE = 4, 1e-2


@dataclass(frozen=True)
class Links:
    """Every LENGTH steps a link begins."""

    warm_up_steps: int = 0
    restart: bool = False
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        more = {"warm_up_steps": self.warm_up_steps, "restart": self.restart}
        return Episode(index, LENGTH, **more) if index * LENGTH < total_steps else None  # type: ignore[arg-type]


class Rates(TrainerCallback):
    """The rate at which each step moved each factor, under plain descent with decay: −Δ = rate·(gradient + decay·p)."""

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay, self.found = model, decay, []

    def _factors(self) -> list[Any]:
        sides = [(s.layer.lora_A, s.layer.lora_B) for s in sites(self.model)]
        return [side[s.adapter]._parameters["weight"] for s, both in zip(sites(self.model), sides) for side in both]  # noqa: B905

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = [p.detach().clone() for p in self._factors()]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ps = self._factors()
        wanted: Tensor = torch.cat([(p.grad + self.decay * b).flatten() for p, b in zip(ps, self.before, strict=True)])
        moved = torch.cat([(b - p.detach()).flatten() for p, b in zip(ps, self.before, strict=True)])
        rate = float(moved @ wanted / (wanted @ wanted))
        assert (moved - rate * wanted).norm() < 1e-3 * moved.norm()  # one rate for both factors of all sites
        self.found.append(rate)


def rates_of(outer: Links, folder: Path, *, decay: float = 0.0, **args: Any) -> list[float]:
    """Of every step of two links."""
    base = build("lora", r=3, alpha=6.0, seed=5, weight_decay=decay, max_grad_norm=0.0)
    assert isinstance(base, Recipe)
    made = replace(base, outer=outer, transform=descend())
    trainer = toy_trainer(folder, peft_config(made, llama()), steps=2 * LENGTH, learning_rate=RATE, **args)
    rates = Rates(trainer.model, decay)
    trainer.add_callback(rates)  # before attach, so that it sees a step before rules and knots do
    attach(trainer, made)
    trainer.train()
    return rates.found


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_a_link_warms_up_again_and_its_decay_too(decay: float, tmp_path: Path) -> None:
    """Linear from 1/3 to 1 at the start of the second link; the first link has the schedule's own warm-up, none."""
    first, second = [RATE] * LENGTH, [RATE / 3, 2 * RATE / 3, RATE, RATE]
    assert rates_of(Links(warm_up_steps=3), tmp_path, decay=decay) == pytest.approx([*first, *second], rel=1e-3)


def test_a_schedule_runs_its_whole_course_in_every_link(tmp_path: Path) -> None:
    """Linear decay over the run, which is two links of four steps: 1, ¾, ½, ¼ in each of them."""
    found = rates_of(Links(restart=True), tmp_path, lr_scheduler_type="linear")
    assert found == pytest.approx([RATE * share for share in (1, 0.75, 0.5, 0.25)] * 2, rel=1e-3)
