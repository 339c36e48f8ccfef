"""`recommended`: what our studies support for a run, by a rule that was frozen before it was judged.

    rows that are gone through at most once   spectral, s = √r, rank 64; rank 32 where there is no memory for 64
    rows that repeat                          nothing: that half of the rule (AdamW on the same factors) fell, so the
                                              name refuses
    learning rate                             the prior of `spectral`, lr = 0.54/(s·√width)

Source: made on validation rows of German reviews and answers (records/2026-11-29-h200-prize), judged once on test rows
of reviews in Portuguese, which nothing here had seen (records/2026-11-29-h200-judge): rank 64 ended below `lora` of
rank 8 by 0.176 and below tuned AdamW full fine-tuning by 0.055. Rank 32 was not part of that judgement. Rows that are
gone through three times were judged in Italian and English (records/2026-11-29-h200-judge-repeats): AdamW on factors of
rank 64 ended below all others in English, in Italian one of three seeds broke away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loralign.plan.fitting import first_fitting
from loralign.types import LoralignError

NAME, METHOD, RANKS = "recommended", "spectral", (64, 32)
RECORD = "records/2026-11-29-h200-judge"
FELL = "records/2026-11-29-h200-judge-repeats"
LESS = {64: "", 32: "; rank 64 does not fit there, and 32 was not part of the judgement"}

REPEATS = (
    f"`method: {NAME}` is for rows that are gone through at most once, and these are gone through {{passes:.3g}} "
    f"times, for which no rule stood ({FELL}): name `{METHOD}`, or `rslora` with rank 64 and alpha 64; "
    "`loralign compare` on your rows tells which"
)


def wide_enough(width: int, rank: int) -> bool:
    """A rank above half of a model's width is left out."""
    return 2 * rank <= width


def ranks(width: int) -> tuple[int, ...]:
    """What to try in order, on a model of this width.

    Raises:
        LoralignError: the model is too narrow for any.
    """
    found = tuple(r for r in RANKS if wide_enough(width, r))
    if not found:
        raise LoralignError(
            f"`method: {NAME}` begins at a model width of {2 * min(RANKS)}, this one has {width}: name another method"
        )
    return found


def check_passes(passes: float) -> None:
    """Raise where rows repeat."""
    if passes > 1:
        raise LoralignError(REPEATS.format(passes=passes))


def check_mix(mix: str) -> None:
    """Raise where a mix of several sources repeats rows."""
    if mix == "all":
        raise LoralignError(
            f"`method: {NAME}` is for rows that are gone through at most once, and `data.mix: all` repeats those of "
            "small sources: leave it out, or name a method"
        )


def check_alone(content: Mapping[str, Any], chosen: Sequence[str]) -> None:
    """Raise where a file that asks for the name sets what the name chooses."""
    for key in chosen:
        if content.get(key) not in (None, {}):
            raise LoralignError(f"`{key}` is chosen by `method: {NAME}`: leave it out, or name the method")


def first_that_fits(candidates: Sequence[int], peak: Callable[[int], int], memory: float) -> tuple[int, int]:
    """The first rank whose peak bytes fit into `memory` bytes, and these.

    Raises:
        LoralignError: none does.
    """

    def refusal(least: int) -> str:
        return (
            f"`method: {NAME}` takes {least / 2**30:.1f} GiB at rank {candidates[-1]} of {memory / 2**30:.1f}: set "
            "`train.gradient_checkpointing`, lower `train.micro_batch_size` or `data.max_length`, or ask "
            "`loralign suggest`"
        )

    return first_fitting(candidates, peak, memory, refusal)


def said(rank: int, needed: int, memory: float) -> str:
    """The choice and its ground, for the run's record."""
    return (
        f"{NAME}: {METHOD}, rank {rank}, s = √r, {needed / 2**30:.2f} GiB of {memory / 2**30:.1f}; rows gone through "
        f"at most once, judged in {RECORD}{LESS[rank]}"
    )
