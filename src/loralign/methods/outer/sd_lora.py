"""A link for each task: its direction is kept, later ones may have fewer slots, one that says nothing new is dropped.

    rank of task t = r, from task 5 on r_2, from task 9 on r_3            (rank reduction)
    min_c ‖D_t − Σ_{k<t} c_k·D_k‖² ≤ τ·‖D_t‖²  →  α_k ← α_k + c_k·α_t, D_t is not kept     (distillation)

Shapes:  none.
Source:  Wu et al., "SD-LoRA", arXiv 2501.13198, algorithm 1 and its variants RR and KD. Official code:
         WuYichen-97/SD-Lora-CL (models/sdlora.py), where RR is commented out and KD is missing.
Differs: one solve over all modules, since α is one for all of them, and the residual as a share of ‖D_t‖²: how the
         paper normalises it is not known, and at its τ = 9e-4 only a link that combines the others is dropped.
Unverified: the paper's body could not be read: rules and numbers from a third party's summary.
Cost:    distillation: one Gram matrix of the links at every switch.
Export:  exact; fewer slots.
Args:    tasks: equal parts of the run; under `loralign tasks` its tasks. later_ranks: ranks that follow the recipe's,
         in the paper 8, 6 after 10. tasks_per_rank: tasks before the next of these ranks. absorb: τ; None: all links
         stay. warm_up_steps: of the learning rate in every link but the first.
Example:
    >>> from loralign.methods.outer.sd_lora import task_links
    >>> outer = task_links(tasks=10, later_ranks=(8, 6))
    >>> [outer.episode(k, 100, (), None).slots for k in (0, 3, 4, 7, 8)]
    [None, None, 8, 8, 6]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from loralign.maths.bounds import Count, Steps, bounded
from loralign.types import Draw, Episode, Facts

Tolerance = Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True)
class TaskLinks:
    tasks: int
    later_ranks: tuple[int, ...]
    tasks_per_rank: int
    absorb: float | None
    warm_up_steps: int

    @property
    def facts(self) -> Facts:
        return Facts(narrows=bool(self.later_ranks))

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        tasks = min(self.tasks, total_steps)
        if index >= tasks:
            return None
        steps = (index + 1) * total_steps // tasks - index * total_steps // tasks
        return Episode(index, steps, warm_up_steps=self.warm_up_steps, slots=self.slots(index), absorb=self.absorb)

    def slots(self, index: int) -> int | None:
        """The rank of task `index`, 0-based; None: the recipe's."""
        later = min(index // self.tasks_per_rank, len(self.later_ranks))
        return self.later_ranks[later - 1] if later else None


@bounded
def task_links(
    tasks: Count = 10,
    later_ranks: tuple[Count, ...] = (),
    tasks_per_rank: Count = 4,
    absorb: Tolerance | None = None,
    warm_up_steps: Steps = 0,
) -> TaskLinks:
    """SD-LoRA's tasks, with its variants RR (later_ranks) and KD (absorb)."""
    return TaskLinks(tasks, tuple(later_ranks), tasks_per_rank, absorb, warm_up_steps)
