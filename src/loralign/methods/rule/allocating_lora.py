"""Move slots, a few in each round, from where the validation loss does not miss them to modules that lost none.

    IS(j) = S(M) − S(M∖j) + S(M_j),  S = −loss on fixed validation rows      M∖j: without slot j, M_j: slot j alone
    a round: the n lowest die for good; n new ones (A drawn anew, B = 0) go to modules that lost none, evenly, what
    remains by the highest mean IS                                                     S(M) is constant, so left out

Shapes:  A (r + spare, d_in) · B (d_out, r + spare), r live ones in each module at the start
Source:  Liu et al., "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models", arXiv 2403.16187,
         algorithm 1. Official code: none.
Differs: what the paper leaves open: B of new slots is 0, so they do not move the function; their moments are those of
         any new slot; the loss is measured in evaluation mode. Rounds are shares of the run instead of epochs. Where
         only some slots are scored, modules of which none was come last; modules that lost slots get some only where no
         other one has room.
Unverified: n_A is taken as one slot per module of a block, which follows from the paper's numbers of parameters, not
         from its text; two passages are ambiguous.
Cost:    2 forwards of the validation rows for every live slot in every round, shared among the processes; nothing
         between the rounds.
Export:  exact; ranks differ by module, their sum is that of plain LoRA.
Args:    rounds: N_A, 8. first: K1 as a share of the run, 0.1 (1 of 10 epochs). every: K2, 0.025. moved: n_A, slots that
         move in a round; None: one per kind of module. rows: validation rows, 32. scored: slots that a round looks at,
         drawn anew each time, where all of them cost too much; None: all, as in the paper.
Example:
    >>> from loralign.methods.rule.allocating_lora import spread
    >>> spread(8, {"a": 0.1, "b": 0.3, "c": 0.2}, {"a": 4, "b": 4, "c": 4})
    {'a': 2, 'b': 3, 'c': 3}
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Share, bounded
from loralign.maths.budget import by_site
from loralign.types import (
    Facts,
    LoralignError,
    Moment,
    Off,
    On,
    Plan,
    RuleBase,
    RuleNeed,
    RuleState,
    Unborn,
    Validation,
    Verb,
)

Slot = tuple[str, int]


def spread(count: int, means: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """`count` over the names, as even as possible within their room, the remainder to the highest means."""
    order = sorted(means, key=lambda name: (-means[name], name))
    found = dict.fromkeys(means, 0)
    while count and (open_ := [name for name in order if found[name] < room[name]]):
        for name in open_[:count]:
            found[name] += 1
        count -= min(count, len(open_))
    return found


def switched(masks: dict[str, Tensor], slot: Slot) -> Mapping[str, Tensor]:
    """With this slot the other way round."""
    name, j = slot
    mine = masks[name].clone()
    mine[j] = ~mine[j]
    return ChainMap({name: mine}, masks)


@dataclass(frozen=True)
class Allocate(RuleBase):
    rounds: int
    first: float
    every: float
    moved: int | None
    scored: int | None
    needs: RuleNeed

    @property
    def facts(self) -> Facts:
        schedule: dict[str, Any] = {"too_short": self.too_short, "acts_by": lambda total: self.steps(total)[-1]}
        return Facts(events=True, allocates=True, slots=self.slots, forwards=self.forwards, **schedule)

    def slots(self, ranks: Mapping[str, int]) -> Mapping[str, int]:
        return {name: r + self.rounds for name, r in ranks.items()}

    def forwards(self, slots: int) -> int:
        """The number of live slots stays."""
        return 2 * self.rounds * min(slots, self.scored or slots)

    def steps(self, total_steps: int) -> list[int]:
        """After which optimizer steps a round is held."""
        start, every = max(1, round(self.first * total_steps)), max(1, round(self.every * total_steps))
        return [start + k * every for k in range(self.rounds)]

    def too_short(self, total_steps: int) -> str:
        last = self.steps(total_steps)[-1]
        if last < total_steps:
            return ""
        return (
            f"its last of {self.rounds} rounds comes after step {last}, and the run has {total_steps} optimizer steps: "
            "train longer, or lower `options.rounds`"
        )

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 0:
            return state, tuple(Unborn(s.name, tuple(range(s.r - self.rounds, s.r))) for s in moment.sites)
        if moment.step not in self.steps(moment.total_steps):
            return state, None
        scores = self._scores(moment)
        count = min(self.moved or len({re.sub(r"\d+", "", s.name) for s in moment.sites}), len(scores))
        lost = by_site(sorted(scores, key=lambda slot: (scores[slot], slot))[:count])
        verbs: list[Verb] = [Off(name, at) for name, at in lost.items()]
        return state, (*verbs, *self._born(moment, scores, lost, count))

    def _born(
        self, moment: Moment, scores: Mapping[Slot, float], lost: Mapping[str, Sequence[int]], count: int
    ) -> list[Verb]:
        found: dict[str, list[float]] = {site.name: [] for site in moment.sites}
        for (name, _), value in scores.items():
            found[name].append(value)
        means = {name: sum(own) / len(own) if own else -math.inf for name, own in found.items()}
        free = {name: sorted(moment.dead.get(name, ())) for name in means}
        room = {name: len(at) for name, at in free.items()}
        made = spread(count, {name: mean for name, mean in means.items() if name not in lost}, room)
        made |= spread(count - sum(made.values()), {name: means[name] for name in lost}, room)
        return [On(name, tuple(free[name][:n])) for name, n in made.items() if n]

    def _scores(self, moment: Moment) -> dict[Slot, float]:
        """−S(M∖j) + S(M_j) of the live slots, or of those drawn."""
        if moment.losses is None:
            raise LoralignError("allocating-lora decides by a loss on validation rows, and none were given")
        live = {s.name: torch.ones(s.r, dtype=torch.bool) for s in moment.sites}
        for name, dead in moment.dead.items():
            live[name][list(dead)] = False
        slots = [(name, j) for name, on in sorted(live.items()) for j in on.nonzero().flatten().tolist()]
        if self.scored is not None and self.scored < len(slots):
            drawn = torch.randperm(len(slots), generator=moment.draw("allocate", "")).tolist()
            slots = sorted(slots[k] for k in drawn[: self.scored])
        none = {name: torch.zeros_like(on) for name, on in live.items()}
        without = moment.losses([switched(live, slot) for slot in slots])
        alone = moment.losses([switched(none, slot) for slot in slots])
        return {slot: a - b for slot, a, b in zip(slots, without, alone, strict=True)}


@bounded
def allocate(
    rounds: Count = 8,
    first: Share = 0.1,
    every: Share = 0.025,
    moved: Count | None = None,
    rows: Count = 32,
    scored: Count | None = None,
) -> Allocate:
    """ALoRA's moves of slots at a constant budget."""
    return Allocate(rounds, first, every, moved, scored, Validation(rows))
