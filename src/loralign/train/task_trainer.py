"""A Trainer that runs through tasks one after the other, and an outer loop of which each link is a task."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, get_scheduler

from loralign.carrier.sites import draw_for
from loralign.plan.combinations import facts
from loralign.types import Batch, Draw, Episode, Facts, LoralignError, Outer, Recipe


@dataclass(frozen=True)
class OnePerTask:
    """An outer loop of which each link is a task."""

    outer: Outer
    lengths: tuple[int, ...]

    @property
    def facts(self) -> Facts:
        return self.outer.facts

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        if index >= len(self.lengths):
            return None
        made = self.outer.episode(index, 2**31, sites, draw)
        if made is None:
            raise LoralignError(
                f"the outer loop has {index} links and there are {len(self.lengths)} tasks: raise `links` or `tasks` "
                "in `options`"
            )
        return replace(made, steps=self.lengths[index], warm_up_steps=0, restart=False)


def by_task(recipe: Recipe, lengths: Sequence[int]) -> Recipe:
    """The recipe with a link per task, where its outer loop has links at all."""
    if "chain" not in facts(recipe):
        return recipe
    outer = OnePerTask(recipe.outer, tuple(lengths))
    for k in range(len(lengths)):
        outer.episode(k, sum(lengths), ["layers.0.probe"], draw_for(recipe.seed))
    return replace(recipe, outer=outer)


class TasksTrainer(Trainer):
    """Rows in their order; the schedule runs its whole course in every task."""

    lengths: list[int]
    ends: list[int]
    course: tuple[str, float]
    lr_scheduler: Any
    train_dataset: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            name, warmup = self.course
            aside = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            made = [get_scheduler(name, aside, math.ceil(warmup * n), n).lr_lambdas[0] for n in self.lengths]

            def factor(step: int) -> float:
                k = min(bisect_right(self.ends, step), len(self.ends) - 1)
                return float(made[k](step - (self.ends[k] - self.lengths[k])))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def rows_of(self, episode: Episode | None) -> Iterable[Batch]:
        """Batches of the task that begins."""
        kept: Any = self.train_dataset
        begin = (self.ends[episode.index - 1] if episode and episode.index else 0) * len(kept) // self.ends[-1]
        self.train_dataset = Subset(kept, range(begin, len(kept)))
        try:
            loader: DataLoader[Any] = self.get_train_dataloader()
        finally:
            self.train_dataset = kept
        return loader
