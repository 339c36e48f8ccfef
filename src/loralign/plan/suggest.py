"""Which recipe to begin with: a rule over what the recorded studies found (`findings.json`, by scripts/findings.py).

    rows gone through at most once   `recommended` (plan/recommended.py), whose rule was judged, where it fits
    rows of text      the arms that their study found better than plain LoRA: of the newest record first, and of each
                      record the lowest loss on validation rows first (losses of two records are not compared)
    rows with answers the same, of the studies of such rows
    then              the first whose training step fits into the memory, activations recomputed where that is needed;
                      on a GPU, where none does, the same of the records on the base in nf4
    rate              the best of the record for that very recipe, lr · (its width / this model's)^power as priors move;
                      the prior's where the record trained no language model

Losses on test rows order nothing: they give a record's verdict, and are reported. Source: the records that are named in
every suggestion. Below `recommended` a rule of ours, judged on no task of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from loralign.carrier.quantise import Quantize
from loralign.methods.table import learning_rate, method
from loralign.plan import recommended
from loralign.plan.fitting import first_fitting
from loralign.plan.recommended import wide_enough


@dataclass(frozen=True)
class Finding:
    """One arm of one recorded study. width: of its model. validation: mean loss at its chosen rate on validation rows;
    loss: mean and 95 % interval on test rows. kind: its verdict beside `lora`. repeats: its record's README says that
    AdamW was the better step where rows are few and repeat."""

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
    width: int
    validation: float | None
    loss: tuple[float, float, float] | None
    seeds: int
    kind: str
    sentence: str
    repeats: bool


@dataclass(frozen=True)
class Choice:
    """A recipe as a file has it, and why. finding: of the record that it rests on, with this very recipe."""

    finding: Finding
    reason: str
    checkpointing: bool = False
    quantize: Quantize | None = None
    judged: bool = False
    """By the rule of `recommended`, whose rate is the prior."""

    @property
    def record(self) -> str:
        return recommended.RECORD if self.judged else self.finding.record

    @property
    def method(self) -> str:
        return self.finding.method

    @property
    def rank(self) -> int:
        return self.finding.rank or 0


def findings() -> tuple[Finding, ...]:
    """Every arm of the recorded studies."""
    text = (files("loralign.plan") / "findings.json").read_text(encoding="utf-8")
    return tuple(Finding(**{**row, "loss": row["loss"] and tuple(row["loss"])}) for row in json.loads(text))


def judged(found: Sequence[Finding], width: int) -> list[Choice]:
    """The recipes of `recommended` for a model of this width, on what the newest record says of each."""
    known = {f.rank: f for f in found if f.method == recommended.METHOD and not f.options}
    ground = f"the rule of `recommended`, judged in {recommended.RECORD}"
    return [
        Choice(known[r], f"{ground}{recommended.LESS[r]}", judged=True)
        for r in recommended.RANKS
        if r in known and wide_enough(width, r)
    ]


def ranked(found: Sequence[Finding], answers: bool, width: int) -> list[Choice]:
    """What the records found, in order; plain LoRA is the last and always there.

    answers: the rows have prompts and answers, or labels. width: of the model; a rank above half of it is left out.
    """
    task = "sft" if answers else "text"
    order = {record: i for i, record in enumerate(dict.fromkeys(f.record for f in found))}
    better = [f for f in found if f.task == task and f.kind == "better" and f.rank and f.validation is not None]
    better.sort(key=lambda f: (-order[f.record], f.validation))
    choices = [
        Choice(f, f"{f.arm} on {f.model}, {f.steps} steps, test rows, {f.seeds} seeds: {f.sentence}")
        for f in better
        if wide_enough(width, f.rank or 0)
    ]
    return [*choices, _plain(found, task, _why_plain(better, choices, width, task))]


def _why_plain(better: Sequence[Finding], choices: Sequence[Choice], width: int, task: str) -> str:
    if choices:
        return "needs the least memory; the records have better ones for such rows, which did not fit"
    if better:
        least = min(f.rank or 0 for f in better)
        return f"what the records found better has rank {least} or more, above half of this model's width of {width}"
    rows = "rows with answers" if task == "sft" else "rows of text"
    return f"plain LoRA is as good here: no recorded study of {rows} found another method better"


def _plain(found: Sequence[Finding], task: str, reason: str) -> Choice:
    """Plain LoRA at the rank that the last record of such rows has it at; of labels where none has such rows."""
    if kind := [f for f in found if f.task == task and f.method == "lora"]:
        return Choice(kind[-1], reason)
    others = [f for f in found if f.task != "text"]
    plain = next(f for f in reversed(others) if f.method == "lora")
    none = " and ".join(f.arm for f in others if f.kind != "better" and f.method != "lora")
    return Choice(
        plain,
        f"plain LoRA is as good here as far as the records tell: none trained on answers of text, and on labels "
        f"({plain.model}, {plain.seeds} seeds) {none} could not be told from it",
    )


LANGUAGE = ("text", "sft")
"""Tasks of language models."""
APART = 2.0
"""A rate and a prior further apart than this factor are both told."""


def rate(choice: Choice, width: int, prior: float, source: str) -> tuple[float, str]:
    """The learning rate at a model's width, and where it comes from."""
    f = choice.finding
    if choice.judged:
        return float(f"{prior:.2g}"), f"{prior:.2g}: {source}; the prior is part of the rule"
    if f.task not in LANGUAGE:
        return float(f"{prior:.2g}"), (
            f"{prior:.2g}: the prior ({source}); {f.record} found {f.lr:g} for {f.model} with a fresh head "
            f"(`{f.task}`), which says nothing of a language model"
        )
    moved_by = learning_rate(f.method, 1.0, width)[0] / learning_rate(f.method, 1.0, f.width)[0]
    lr = float(f"{f.lr * moved_by:.2g}")
    moved = "" if width == f.width else f"; {f.lr:g} there, moved from width {f.width} to {width} as priors are"
    said = f"{lr:g}: the best on validation rows in {f.record}, {f.steps} steps{moved}"
    far = max(lr / prior, prior / lr)
    if far > APART:
        side = "lower" if prior < lr else "higher"
        said += (
            f". The prior says {prior:.2g}, {far:.1f} times {side} ({source}): try both, longer runs are not covered"
        )
    return lr, said


def caution(found: Sequence[Finding], choice: Choice, epochs: int) -> str:
    """What speaks against a choice on rows that a run goes through more than once; empty where nothing does.

    Source: the limits in the record's README; one seed of a laboratory, so it orders nothing.
    """
    f = choice.finding
    if epochs == 1:
        return ""
    said = f"{f.record} does not cover rows that repeat, and these are gone through {epochs} times"
    same = [g for g in found if g.record == f.record and g.kind == "better" and g.rank and g.validation is not None]
    adamw = [g for g in same if method(g.method).transform is None]
    if not f.repeats or f.kind != "better" or method(f.method).transform is None or not adamw:
        return f"{said}: `loralign compare` on your rows tells"
    best = min(adamw, key=lambda g: g.validation or 0.0)
    return (
        f"{said}; its README says that a laboratory found AdamW on the same factors to be the better step where rows "
        f"are few and repeat: compare with {best.method}, rank {best.rank}, alpha {best.alpha:g}; of two languages in "
        f"{recommended.FELL} it was so in one, and in the other one of three seeds broke away"
    )


def variants(choices: Sequence[Choice]) -> Iterator[Choice]:
    """Every choice as it is, then with activations recomputed, before the next one."""
    for choice in choices:
        yield choice
        yield replace(choice, checkpointing=True)


def on_nf4(choices: Sequence[Choice]) -> list[Choice]:
    """The same on a base that is quantised while it is loaded, on which no record trained."""
    return [replace(choice, quantize="nf4") for choice in choices]


def first_that_fits(choices: Sequence[Choice], peak: Callable[[Choice], int], memory: float) -> tuple[Choice, int]:
    """The first choice whose peak bytes fit into `memory` bytes, and these.

    Raises:
        LoralignError: none does.
    """

    kind = choices[-1].quantize
    base = f" and the base in {kind}" if kind else ""

    def refusal(least: int) -> str:
        return (
            f"nothing fits into {memory / 2**30:.1f} GiB: the least, plain LoRA with activations recomputed{base}, "
            f"takes {least / 2**30:.1f} GiB at this length; lower `--length`, or take a smaller model"
        )

    return first_fitting(variants(choices), peak, memory, refusal)
