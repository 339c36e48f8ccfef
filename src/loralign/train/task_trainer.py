"""How tasks are trained: a Trainer that runs through them, an outer loop of which each link is a task."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments, get_scheduler

from loralign.carrier.sites import draw_for
from loralign.plan.combinations import facts
from loralign.train.model import dtype_of
from loralign.train.task_rows import Mask
from loralign.types import Batch, Draw, Episode, Facts, LoralignError, Outer, Recipe


@dataclass(frozen=True)
class TaskTraining:
    """The optimisation of every task."""

    learning_rate: float
    lr_source: str = "given"
    """What chose that rate."""
    head_lr: float | None = None
    """Of the fresh head; None: as the adapter."""
    steps: int | None = None
    """Optimizer steps of each task; None: by epochs."""
    epochs: float = 1.0
    batch_size: int = 16
    """Rows per optimizer step and process."""
    micro_batch_size: int | None = None
    """Rows per forward, a divisor of batch_size; None: batch_size."""
    schedule: str = "cosine"
    warmup: float = 0.03
    """Share of a task's steps over which the rate rises."""
    mask: Mask = "task"
    save_every: int | None = None
    """Optimizer steps between checkpoints; None: after every task."""
    eval_batch_size: int = 64
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that have it."""


def settings(recipe: Recipe, t: TaskTraining) -> dict[str, Any]:
    """What the card of an adapter says of its recipe and of the training of a task."""
    length = {"steps per task": t.steps} if t.steps else {"epochs per task": t.epochs}
    alpha = recipe.r if recipe.alpha is None else recipe.alpha
    adapter = {"rank": recipe.r, "alpha": alpha, "scale": recipe.s(), "dropout": recipe.dropout}
    optimiser = {"weight decay": recipe.weight_decay, "learning rate of the head": t.head_lr or t.learning_rate}
    steps = {"batch size": t.batch_size, "schedule": t.schedule, "warm-up": t.warmup, "seed": recipe.seed}
    return {**adapter, "targets": recipe.targets, **optimiser, **length, **steps}


def steps_of(rows: int, training: TaskTraining) -> int:
    """Optimizer steps of a task."""
    return training.steps or max(1, math.ceil(training.epochs * rows / training.batch_size))


def arguments(t: TaskTraining, folder: Path, steps: int, seed: int) -> TrainingArguments:
    """In the Trainer's terms."""
    micro = t.micro_batch_size or t.batch_size
    if t.batch_size % micro:
        raise LoralignError(f"batch_size {t.batch_size} is no multiple of micro_batch_size {micro}")
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=t.learning_rate, per_device_train_batch_size=micro,
        gradient_accumulation_steps=t.batch_size // micro, per_device_eval_batch_size=t.eval_batch_size,
        train_sampling_strategy="sequential", save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500, save_total_limit=2, logging_steps=10, logging_nan_inf_filter=False,
        report_to=[], disable_tqdm=True, bf16=dtype_of(t.precision) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(), remove_unused_columns=False, seed=seed,
        accelerator_config={"non_blocking": torch.cuda.is_available()},
    )  # fmt: skip


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
        k, each = episode.index if episode else 0, len(kept) // self.ends[-1]
        begin, end = each * (self.ends[k] - self.lengths[k]), each * self.ends[k]
        self.train_dataset = Subset(kept, range(begin, end))
        try:
            loader: DataLoader[Any] = self.get_train_dataloader()
        finally:
            self.train_dataset = kept
        return loader
