"""What class-incremental learning is measured by: the accuracy on every task seen, after every task.

    a[t][i]             share of the rows of task i that are right after task t, among the classes seen so far
    average accuracy    A_t = mean_{i ≤ t} a[t][i], every task counts alike; the last one is "the" average accuracy
    anytime accuracy    mean_t A_t
    forgetting          mean_{i < T} (max_{i ≤ t < T} a[t][i] − a[T][i]); may be negative; 0 of a single moment

Source:  Chaudhry et al., "Riemannian Walk", arXiv 1801.10112 (forgetting); SD-LoRA, arXiv 2501.13198 (Acc, AAA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralign.train.task_rows import Task

Matrix = Sequence[Sequence[float]]
"""One row per moment; row t has the tasks seen by then. Joint training has one row, of all tasks."""


@dataclass(frozen=True)
class Scores:
    average: float
    anytime: float
    forgetting: float


@torch.no_grad()
def accuracies(tasks: Sequence[Task], logits: Callable[[Sequence[Any]], Tensor], size: int) -> list[float]:
    """A row of the matrix: of each of these tasks the share of its test rows, `size` at a time, that are right."""
    classes = torch.tensor(sorted(c for task in tasks for c in task.classes))
    found = []
    for task in tasks:
        right = 0
        for i in range(0, len(task.test), size):
            rows = [task.test[k] for k in range(i, min(i + size, len(task.test)))]
            chosen = classes[logits(rows).float().cpu()[:, classes].argmax(dim=1)]
            right += int((chosen == torch.tensor([int(row["labels"]) for row in rows])).sum())
        found.append(right / len(task.test))
    return found


def scores(matrix: Matrix) -> Scores:
    """Of a matrix with at least one row."""
    averages = [sum(row) / len(row) for row in matrix]
    last = matrix[-1]
    before = {i: [row[i] for row in matrix[:-1] if len(row) > i] for i in range(len(last))}
    lost = [max(values) - last[i] for i, values in before.items() if values]
    forgotten = sum(lost) / len(lost) if lost else 0.0
    return Scores(averages[-1], sum(averages) / len(averages), forgotten)
