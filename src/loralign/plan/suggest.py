"""Which recipe to begin with: a rule over what the recorded studies found (`findings.json`, by scripts/findings.py).

    rows of text      the arms that their study found better than plain LoRA, the lowest loss first
    rows with answers plain LoRA: no recorded study found a method better on such rows
    then              the first whose training step fits into the memory, activations recomputed where that is needed

Source: the records that are named in every suggestion. A rule of ours, judged on no task of its own yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from loralign.methods.table import method
from loralign.types import LoralignError

PLAIN_RANK = 16
"""Of plain LoRA where no record speaks for another."""
ROOM = 0.9
"""The share of the memory that a plan may take; the allocator needs the rest."""


@dataclass(frozen=True)
class Finding:
    """One arm of one recorded study. loss: mean and 95 % interval on test rows. kind: its verdict beside `lora`."""

    record: str
    model: str
    task: str
    steps: int
    arm: str
    method: str
    rank: int | None
    alpha: float | None
    options: dict[str, Any]
    lr: float
    loss: tuple[float, float, float] | None
    seeds: int
    kind: str
    sentence: str


@dataclass(frozen=True)
class Choice:
    """A recipe as a file has it, and why."""

    method: str
    rank: int
    reason: str
    record: str
    alpha: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False


def findings() -> tuple[Finding, ...]:
    """Every arm of the recorded studies."""
    text = (files("loralign.plan") / "findings.json").read_text(encoding="utf-8")
    return tuple(Finding(**{**row, "loss": row["loss"] and tuple(row["loss"])}) for row in json.loads(text))


def ranked(found: Sequence[Finding], answers: bool, width: int) -> list[Choice]:
    """What to try, in order; plain LoRA is the last and always there.

    answers: the rows have prompts and answers, or labels. width: of the model; a rank above half of it is left out.
    """
    better = [f for f in found if f.task == "text" and f.kind == "better" and f.rank and f.loss]
    better = [] if answers else sorted(better, key=lambda f: f.loss or ())
    choices = [
        Choice(f.method, f.rank, f"{f.arm} on {f.model}, {f.steps} steps: {f.sentence}", f.record, f.alpha, f.options)
        for f in better
        if f.rank and 2 * f.rank <= width
    ]
    return [*choices, _plain(found, answers, _why_plain(better, choices, width))]


def _why_plain(better: Sequence[Finding], choices: Sequence[Choice], width: int) -> str:
    if choices:
        return "needs the least memory; the records have better ones for rows of text, which did not fit"
    if better:
        least = min(f.rank or 0 for f in better)
        return f"what the records found better has rank {least} or more, above half of this model's width of {width}"
    return "plain LoRA is as good here: no recorded study found another method better on rows of text"


def _plain(found: Sequence[Finding], answers: bool, reason: str) -> Choice:
    record = next(f.record for f in reversed(found) if f.task == "text" and f.method == "lora")
    if answers:
        kind = [f for f in found if f.task != "text"]
        none = " and ".join(f.arm for f in kind if f.kind != "better" and f.method != "lora")
        reason = (
            f"plain LoRA is as good here as far as the records tell: none trained on answers of text, and on labels "
            f"({kind[0].model}, {kind[0].seeds} seeds) {none} could not be told from it"
        )
        record = kind[0].record
    return Choice("lora", PLAIN_RANK, reason, record, alpha=2.0 * PLAIN_RANK)


def caution(found: Sequence[Finding], choice: Choice, epochs: int) -> str:
    """What speaks against a choice on rows that a run goes through more than once; empty where nothing does.

    Source: the limits in the record's README; one seed of a laboratory, so it orders nothing.
    """
    if epochs == 1 or method(choice.method).transform is None:
        return ""
    same = [f for f in found if f.record == choice.record and f.kind == "better" and f.rank and f.loss]
    adamw = [f for f in same if method(f.method).transform is None]
    if not adamw:
        return ""
    best = min(adamw, key=lambda f: f.loss or ())
    return (
        f"these rows are gone through {epochs} times, and AdamW may be the better step where rows are few and repeat "
        f"(README of {choice.record}, its limits): compare with {best.method}, rank {best.rank}, alpha {best.alpha:g}"
    )


def variants(choices: Sequence[Choice]) -> Iterator[Choice]:
    """Every choice as it is, then with activations recomputed, before the next one."""
    for choice in choices:
        yield choice
        yield Choice(**{**vars(choice), "checkpointing": True})


def first_that_fits(choices: Sequence[Choice], peak: Callable[[Choice], int], memory: float) -> tuple[Choice, int]:
    """The first choice whose peak bytes fit into `memory` bytes, and these.

    Raises:
        LoralignError: none does.
    """
    least = None
    for choice in variants(choices):
        needed = peak(choice)
        if needed <= ROOM * memory:
            return choice, needed
        least = min(needed, least or needed)
    assert least is not None
    raise LoralignError(
        f"nothing fits into {memory / 2**30:.1f} GiB: the least, plain LoRA with activations recomputed, takes "
        f"{least / 2**30:.1f} GiB at this length; lower `--length`, or take a smaller or a quantised model"
    )
