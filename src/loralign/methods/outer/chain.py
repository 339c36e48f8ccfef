"""Links: train a small adapter, fix it, start another one; the sum is the result.

    W_k = W_{k−1} + s·B_k·A_k        then a fresh A, B with B·A = 0 and a cleared optimizer state

Shapes:  none.
Source:  Xia, Qin & Hazan, "Chain of LoRA", arXiv 2401.04151, algorithm 1; Malinovsky et al., "Randomized Asymmetric
         Chain of LoRA", arXiv 2410.08305, algorithm 1; Lialin et al., "ReLoRA", arXiv 2307.05695. Official code: none
         of the first; hammoudhasan/RACLora; Guitaricet/relora.
Differs: W is never written: links become frozen slots beside it, in float32. The whole optimizer state goes at a knot,
         step counters too (RACLora keeps it, ReLoRA prunes 80–99.9 % of the moments and keeps the counters). Re-warm-up
         from the first step of a link on, 1/w, 2/w, …, times the schedule (ReLoRA: times the schedule's value at its
         end). The rank stays the same in all links (Chain of LoRA also lowers it).
Unverified: the papers' bodies could not be read; from digests, reviews and code.
Cost:    per step that of the live link, and frozen slots: 2·r·(d_in + d_out) FLOPs per token and link.
Export:  exact, rank r·links, or r + keep_slots at most.
Args:    links: equal parts of the run. link_steps: optimizer steps of a link, instead of links. warm_up_steps: of the
         learning rate in every link but the first; None: 5 % of the link, 1 to 100. reset: clear the optimizer state.
         restart: the schedule runs its whole course in every link. keep_slots: at every knot what was committed is cut
         to the best so many slots per module (lossy: the loss is said); None: all stay.
Example:
    >>> from loralign.methods.outer.chain import chain_of_links
    >>> [chain_of_links(links=3).episode(k, 10, (), None).steps for k in range(3)]
    [3, 3, 4]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from loralign.maths.bounds import Count, Steps, bounded
from loralign.types import Draw, Episode, Facts

LinkSteps = Annotated[int, Interval(ge=1, le=10**9)]


@dataclass(frozen=True)
class Links:
    links: int
    link_steps: int | None
    warm_up_steps: int | None
    reset: bool
    restart: bool
    keep_slots: int | None
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        begin, end = self.bounds(index, total_steps)
        if begin >= end:
            return None
        warm_up = max(1, min(100, (end - begin) // 20)) if self.warm_up_steps is None else self.warm_up_steps
        return Episode(
            index,
            end - begin,
            reset=self.reset,
            warm_up_steps=warm_up,
            restart=self.restart,
            keep_slots=self.keep_slots,
        )

    def bounds(self, index: int, total_steps: int) -> tuple[int, int]:
        """The steps before which link `index` begins and ends; equal after the last one."""
        if self.link_steps is not None:
            return min(index * self.link_steps, total_steps), min((index + 1) * self.link_steps, total_steps)
        links = min(self.links, total_steps)
        return min(index, links) * total_steps // links, min(index + 1, links) * total_steps // links


@bounded
def chain_of_links(
    links: Count = 3,
    link_steps: LinkSteps | None = None,
    warm_up_steps: Steps | None = None,
    reset: bool = True,
    restart: bool = False,
    keep_slots: Count | None = None,
) -> Links:
    """Chain of LoRA."""
    return Links(links, link_steps, warm_up_steps, reset, restart, keep_slots)


@bounded
def restarts(
    link_steps: LinkSteps = 1000,
    warm_up_steps: Steps = 100,
    reset: bool = True,
    restart: bool = False,
    keep_slots: Count | None = None,
) -> Links:
    """ReLoRA: links of many steps, each of which warms up to the schedule again (the jagged schedule)."""
    return Links(1, link_steps, warm_up_steps, reset, restart, keep_slots)


@bounded
def randomized_links(
    links: Count = 10,
    link_steps: LinkSteps | None = None,
    warm_up_steps: Steps | None = None,
    reset: bool = True,
    keep_slots: Count | None = None,
) -> Links:
    """RAC-LoRA's chain: more and shorter links, because each one sees a part of the space."""
    return Links(links, link_steps, warm_up_steps, reset, False, keep_slots)
