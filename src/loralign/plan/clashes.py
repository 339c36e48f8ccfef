"""The combinations that do not go together, why, and what to do instead; `combinations` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clash:
    """Facts that do not go together, why, and what to do instead."""

    facts: frozenset[str]
    reason: str
    instead: str


def _clash(*facts: str, reason: str, instead: str) -> Clash:
    return Clash(frozenset(facts), reason, instead)


CLASHES: tuple[Clash, ...] = (
    _clash(
        "gated", "not gated",
        reason="a trained gate stands between A and B, and this optimizer steps as if there were none",
        instead="use the transform adamw, or a rule without gates (allocating-lora)",
    ),
    _clash(
        "computed form", "not gated",
        reason="its form computes the factors, which hides the pair (A, B) from this optimizer",
        instead="use the transform adamw, or a method that trains A and B themselves",
    ),
    _clash(
        "one side trains", "not one_sided",
        reason="only one factor trains, and this optimizer updates A and B from one another",
        instead="use the transform adamw, or a start that trains both factors",
    ),
    _clash(
        "twin", "computed form",
        reason="the init starts around a product that a frozen twin cancels, which this form does not read",
        instead="take an init whose product is zero (lora's own), or a method of the plain form",
    ),
    _clash(
        "chain", "computed form", "not commits",
        reason="a link commits A and B, and this form makes something else of them, so the model would jump",
        instead="take a method of the plain form",
    ),
    _clash(
        "reads links", "cuts links",
        reason="its form weighs each link, and cut links are none any more",
        instead="leave `keep_slots` out",
    ),
    _clash(
        "narrows", "not slots",
        reason="later links train fewer slots, and this optimizer does not say what the others do to them",
        instead="use the transform adamw, or leave `later_ranks` out",
    ),
    _clash(
        "tied", "pairwise",
        reason="its factors share numbers, and this optimizer updates A and B from one another",
        instead="use the transform adamw",
    ),
    _clash(
        "tied", "starts from data",
        reason="its factors share numbers, so directions of a gradient cannot be put into them",
        instead="take lora's own start",
    ),
    _clash(
        "allocates", "not slots",
        reason="a rule switches slots, and this optimizer does not say what happens to its state then",
        instead="use the transform adamw",
    ),
    _clash(
        "no stock factor", "shaped start",
        reason="its form trains neither A nor B, so what the init puts there would never be read",
        instead="take lora's own start",
    ),
    _clash(
        "no stock factor", "other optimizer",
        reason="its form trains neither A nor B, which are all that the optimizer's options are for",
        instead="leave the transform and its options out: the form's own tensors step by AdamW",
    ),
    _clash(
        "no stock factor", "rules",
        reason="its form trains neither A nor B, and the rule is about their slots",
        instead="leave the rule out",
    ),
    _clash(
        "allocates", "one stock factor",
        reason="its slots are places in W, and a rule that copies or redraws slots would move them",
        instead="take a method that trains A and B",
    ),
    _clash(
        "ratio", "one stock factor",
        reason="only one factor trains, so the ratio of the learning rates of B and A says nothing",
        instead="set the learning rate and leave lora-plus out",
    ),
    _clash(
        "several allocate",
        reason="two rules would decide about the same slots",
        instead="keep one of them",
    ),
    _clash(
        "needs a gate", "no switch",
        reason="its rule switches slots by a trained gate, which this form does not have",
        instead="take the form that the rule's method brings",
    ),
    _clash(
        "needs shares", "no shares",
        reason="its rule weighs slots by a gate that shares the rank out among them, which this form does not have",
        instead="take the form that the rule's method brings",
    ),
    _clash(
        "moves at the start",
        reason="this init and this form together change W before the first step",
        instead="take the init that the method of the form brings",
    ),
    _clash(
        "cannot learn",
        reason="this init and this form start where no gradient reaches any of the trained tensors",
        instead="take the init that the method of the form brings",
    ),
    _clash(
        "too few slots",
        reason="a rule asks for more slots than the rank has",
        instead="lower its `keep` or `target_rank`, or raise the rank",
    ),
    _clash(
        "dropout", "needs dropout 0",
        reason="this method is wrong under dropout",
        instead="set `dropout: 0`",
    ),
    _clash(
        "deepspeed",
        reason="DeepSpeed replaces the parameter groups by flat partitions, so no optimizer of ours can step",
        instead="use FSDP2 or DDP",
    ),
    _clash(
        "adds features", "uneven slots",
        reason="it adds A·x of one layer to another's, and a rule gives them different ranks, which have no sum",
        instead="use `shortcut: bs` or `is`",
    ),
    _clash(
        "fsdp", "cross layer",
        reason="its form reads other layers' factors, which FSDP2 has sharded again",
        instead="use DDP, or a form that stays in its layer",
    ),
    _clash(
        "fsdp", "shares",
        reason="its form keeps a tensor for the whole model, which FSDP2 would split apart from its readers",
        instead="use DDP, or a form whose tensors stay in their layer",
    ),
    _clash(
        "half factors", "not bf16",
        reason="it multiplies small numbers of the factors, which half precision rounds away",
        instead="keep the adapter in fp32, PEFT's default (autocast_adapter_dtype=True)",
    ),
)  # fmt: skip
"""Checked in this order; the first that applies is raised."""
