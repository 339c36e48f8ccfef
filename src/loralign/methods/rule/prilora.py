"""Ranks grow linearly with depth; every few steps the least important entries of A become zero, and train on.

    r_l = r_s + (r_f − r_s)(l − 1)/(L − 1), l = 1…L from the input         r_s, r_f: shares of the recipe's rank, mean r
    n̄_k ← 0.9·n̄_k + 0.1·‖X_k‖₂ (over the tokens of a step)     importance of A_jk: |A_jk|·n̄_k
    every `interval` steps: the ρ·d_in lowest entries of each row of A ← 0

Shapes:  A (r_l, d_in) · X (tokens, d_in), the input of the module · n̄ (d_in,)
Source:  Benedek & Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", arXiv 2401.11316. Official code: an
         archive at the ACL Anthology that could not be read.
Differs: s is that of the recipe's rank at every depth (alpha/r_l would make early layers stronger). Ranks are rounded
         half up. Tokens that the model's attention
         mask leaves out (padding) are not counted; where it is given none, all are. Inputs before dropout.
Unverified: the paper's body could not be read. 0.9 and 0.1, 40 steps, ρ = 0.5 and the comparison within a row are
         provisional.
Cost:    one pass over each input that modules share, three where there is a mask; a sort of A at every event.
Export:  exact; ranks differ by layer, known at the start.
Args:    first_share, last_share: r_s/r and r_f/r, 0.5 and 1.5. interval: optimizer steps, 40. pruned: ρ, 0.5.
Example:
    >>> from loralign.methods.rule.prilora import ranks_by_depth
    >>> ranks_by_depth(12, 4.0, 12.0)
    [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Positive, Share, bounded
from loralign.maths.draws import hashed
from loralign.maths.lists import joined
from loralign.methods.rule.combine import FOREIGN, average
from loralign.types import (
    Elements,
    Facts,
    Inputs,
    InputSquares,
    LoralignError,
    Moment,
    Plan,
    RuleBase,
    RuleNeed,
    RuleState,
    Stack,
)

DECAY = 0.9
NORM, SITES = "norm|", "sites|"
"""Heads of the state's keys: averages, and whose they are."""
INPUTS = Inputs()
AT_ONCE = 1 << 24
"""Entries that are sorted at once: about half a gigabyte."""
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def ranks_by_depth(layers: int, first: float, last: float) -> list[int]:
    """r_l of l = 1…L, at least 1, rounded half up."""
    if layers == 1:
        return [max(1, math.floor((first + last) / 2 + 0.5))]
    step = (last - first) / (layers - 1)
    return [max(1, math.floor(first + step * k + 0.5 + 1e-9)) for k in range(layers)]


def least(A: Tensor, norms: Tensor, share: float) -> Tensor:
    """True at the round(share·d_in) entries of each row whose |A|·n̄ is lowest."""
    count = round(share * A.shape[-1])
    order = (A.abs() * norms).argsort(dim=-1, stable=True)
    return torch.zeros_like(A, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _check(state: RuleState, averaged: Mapping[str, InputSquares]) -> None:
    """Raise where the state has averages of other sites than these; it keeps a hash of their names, in order."""
    known = {key: value.shape for key, value in state.items() if key.startswith(NORM)}
    fits = not known or known == {key: seen.squares.shape for key, seen in averaged.items()}
    for key, seen in averaged.items():
        name, order = SITES + key.removeprefix(NORM), hashed(seen.sites)
        if name not in state:  # in older checkpoints, too
            state[name] = torch.tensor(order)
        fits = fits and int(state[name]) == order
    if not fits:
        raise LoralignError(f"the checkpoint's average of the inputs {FOREIGN}")


@dataclass(frozen=True)
class DepthAndPruning(RuleBase):
    first_share: float
    last_share: float
    interval: int
    pruned: float
    needs: RuleNeed = INPUTS

    @property
    def facts(self) -> Facts:
        return Facts(
            events=True, allocates=True, slots=self.slots, too_short=self.too_short, acts_by=lambda _: self.interval
        )

    def slots(self, ranks: Mapping[str, int]) -> Mapping[str, int]:
        """By the number in the module's name, per stack; a module without one keeps the recipe's rank."""
        places = {name: found for name in ranks if (found := _LAYER.search(name))}
        stacks: dict[str, set[int]] = {}
        for name, found in places.items():
            stacks.setdefault(name[: found.start()], set()).add(int(found.group(1)))
        made = dict(ranks)
        for name, found in places.items():
            layers = sorted(stacks[name[: found.start()]])
            course = ranks_by_depth(len(layers), self.first_share * ranks[name], self.last_share * ranks[name])
            made[name] = course[layers.index(int(found.group(1)))]
        return made

    def too_short(self, total_steps: int) -> str:
        if total_steps > self.interval:
            return ""
        return (
            f"it prunes after every {self.interval} steps, and the run has {total_steps} optimizer steps: train longer "
            "or lower `options.interval`"
        )

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 0:
            return state, None
        if moment.inputs is None:
            raise LoralignError("prilora weighs entries by the modules' inputs, and nobody collects them")
        averaged = {f"{NORM}{k}|{seen.squares.shape[1]}": seen for k, seen in enumerate(moment.inputs)}
        _check(state, averaged)
        for key, seen in averaged.items():
            now = seen.squares.sqrt()
            average(state, key, now).lerp_(now, 1 - DECAY)
        if moment.step % self.interval:
            return state, None
        norms = {site: row for key, seen in averaged.items() for site, row in zip(seen.sites, state[key], strict=True)}
        masks = self._masks(moment.stacks, norms)
        state |= {f"mask|{site}": mask for site, mask in masks.items()}
        return state, tuple(Elements(site, "A", f"mask|{site}") for site in masks)

    def _masks(self, stacks: Sequence[Stack], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all ranks of a width are sorted together, a bounded number at a time."""
        kinds: dict[object, list[Stack]] = {}
        for stack in stacks:
            A = stack.tensors["A"]
            kinds.setdefault((A.shape[2], A.dtype, A.device), []).append(stack)
        found: dict[str, Tensor] = {}
        for alike in kinds.values():
            rows = joined([stack.tensors["A"].flatten(0, 1) for stack in alike])
            ranks = {site: stack.r for stack in alike for site in stack.sites}
            by_row = torch.tensor([k for k, r in enumerate(ranks.values()) for _ in range(r)], device=rows.device)
            weights = torch.stack([norms[site] for site in ranks]).to(rows)
            parts = zip(rows.split(n := max(1, AT_ONCE // rows.shape[1])), by_row.split(n), strict=True)
            masks = torch.cat([least(part, weights[at], self.pruned) for part, at in parts])
            found.update(zip(ranks, masks.split(list(ranks.values())), strict=True))
        return found


@bounded
def depth_and_pruning(
    first_share: Positive = 0.5, last_share: Positive = 1.5, interval: Count = 40, pruned: Share = 0.5
) -> DepthAndPruning:
    """PRILoRA's ranks and pruning."""
    return DepthAndPruning(first_share, last_share, interval, pruned)
