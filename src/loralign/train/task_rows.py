"""A sequence of tasks as rows: which classes belong to which, in which order rows come, which logits a loss sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loralign.maths.draws import keyed_generator
from loralign.types import LoralignError

Rows = Sequence[Mapping[str, Any]]
"""Of a classifier: what the model takes, one row each, and "labels", the position of its class in the head."""
Mask = Literal["task", "seen"]
"""Logits that the loss of a row sees: of the classes of its own task, or also of those before it."""


@dataclass(frozen=True)
class Task:
    """One task. test: rows that nobody trains on, on which every later moment is measured."""

    name: str
    train: Rows
    test: Rows

    @cached_property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted({int(row["labels"]) for row in self.train}))


def check_tasks(tasks: Sequence[Task], labels: int) -> None:
    """Raise LoralignError where tasks share classes, lack rows, or do not fit the head."""
    if not tasks:
        raise LoralignError("there are no tasks: name at least one")
    seen: dict[int, str] = {}
    for task in tasks:
        if not len(task.train) or not len(task.test):
            raise LoralignError(f"task {task.name} has no {'training' if not len(task.train) else 'test'} rows")
        for label in task.classes:
            if label in seen:
                raise LoralignError(
                    f"class {label} is in task {seen[label]} and in task {task.name}: each belongs to one task"
                )
            seen[label] = task.name
        if strange := {int(row["labels"]) for row in task.test} - set(task.classes):
            raise LoralignError(f"the test rows of task {task.name} have class {min(strange)}, its training rows not")
    if max(seen) >= labels or min(seen) < 0:
        raise LoralignError(f"class {max(seen)} does not fit a head of {labels}: load the model with num_labels=…")


def check_choices(tasks: Sequence[Task], allowed: Tensor) -> None:
    """Raise LoralignError where the loss of a task sees one class alone: it is zero, and nothing would train."""
    for task in tasks:
        if int(allowed[list(task.classes)].sum(dim=1).max()) < 2:
            raise LoralignError(
                f"the loss of task {task.name} sees one class alone, so it is zero and nothing is learnt: give the "
                "task two classes, or, after the first one, set `mask: seen`"
            )


def joined(tasks: Sequence[Task]) -> Task:
    """All of them as one: joint training, the upper bound."""
    return Task("all", [row for task in tasks for row in task.train], [row for task in tasks for row in task.test])


def fingerprint(rows: Rows) -> str:
    """Of the values of all rows, in order."""
    found = blake2b(digest_size=12)
    for row in rows:
        for key, value in sorted(row.items()):
            found.update(key.encode())
            found.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


class Ordered(Dataset[Mapping[str, Any]]):
    """Rows of the tasks one after the other, each drawn anew in every pass over it; exactly what a run reads."""

    def __init__(self, tasks: Sequence[Rows], counts: Sequence[int], seed: int) -> None:
        self.tasks = tasks
        self.places = [
            (k, i) for k, (rows, n) in enumerate(zip(tasks, counts, strict=True)) for i in drawn(len(rows), n, seed, k)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        k, i = self.places[place]
        return self.tasks[k][i]


def drawn(size: int, count: int, seed: int, task: int) -> list[int]:
    """`count` positions below `size`: whole passes, each in an order of its own."""
    passes = -(-count // size)
    orders = [
        torch.randperm(size, generator=keyed_generator(seed, "rows of a task", e, str(task))) for e in range(passes)
    ]
    return torch.cat(orders)[:count].tolist() if passes else []


def visible(tasks: Sequence[Task], labels: int, mask: Mask) -> Tensor:
    """bool (labels, labels): row y tells which logits the loss of a row of class y sees."""
    seen, found = torch.zeros(labels, dtype=torch.bool), torch.zeros(labels, labels, dtype=torch.bool)
    for task in tasks:
        now = torch.zeros(labels, dtype=torch.bool)
        now[list(task.classes)] = True
        seen = seen | now
        found[list(task.classes)] = now if mask == "task" else seen
    return found


def masked_loss(allowed: Tensor) -> Callable[..., Tensor]:
    """Cross-entropy among the classes that a row may see, as a Trainer calls it."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits.float().masked_fill(~allowed.to(labels.device)[labels], float("-inf"))
        if num_items_in_batch is None:
            return torch.nn.functional.cross_entropy(logits, labels)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    return loss
