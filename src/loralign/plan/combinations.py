"""What may be combined, and which ranks fit: read before anything is spent. What a run costs is in `plan_memory.py`.

A recipe is described by facts (short words, `facts`), found by asking its parts: the init is called once on a small
random matrix, the outer loop for its first two episodes. A `Clash` names facts that do not go together, the reason and
the alternative. Parts may declare further facts in an attribute `facts: frozenset[str]`:

    "commits"          a form whose `effective` stays right when live slots become frozen ones
    "needs dropout 0"  a form or rule that is wrong under dropout
    "allocates"        a rule that decides which slots live
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loralign.maths.draws import keyed_generator
from loralign.types import Directions, Factors, Init, LoralignError, Nothing, Preheated, Recipe, Site, Train, Weight


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
        "chain", "linked twin",
        reason="a link of a chain cannot start from a frozen twin",
        instead="take an init whose product is zero, or train one episode",
    ),
    _clash(
        "chain", "links need data",
        reason="later links start in the middle of training, where no evidence is collected",
        instead="take an init that needs no data, or train one episode",
    ),
    _clash(
        "chain", "computed form", "not commits",
        reason="a link commits A and B, and this form makes something else of them, so the model would jump",
        instead="take a method of the plain form",
    ),
    _clash(
        "several allocate",
        reason="two rules would decide about the same slots",
        instead="keep one of them",
    ),
    _clash(
        "too few slots",
        reason="a rule trains more slots at each step than the rank has",
        instead="lower its `keep`, or raise the rank",
    ),
    _clash(
        "dropout", "needs dropout 0",
        reason="this method is wrong under dropout",
        instead="set `dropout: 0`",
    ),
    _clash(
        "deepspeed", "not zero",
        reason="DeepSpeed flattens parameters, so pairs (A, B) cannot step together",
        instead="use FSDP2 or DDP, or the transform adamw",
    ),
    _clash(
        "zero3", "reads weights",
        reason="ZeRO-3 shards W before the init can read it",
        instead="use ZeRO-2, FSDP2 or DDP, or an init that does not read W",
    ),
    _clash(
        "half factors", "not bf16",
        reason="it multiplies small numbers of the factors, which half precision rounds away",
        instead="keep the adapter in fp32, PEFT's default (autocast_adapter_dtype=True)",
    ),
)  # fmt: skip
"""Checked in this order; the first that applies is raised."""

ABILITIES = ("gated", "one_sided", "bf16", "zero")
"""What a transform may accept; the lack of one is a fact."""


@dataclass(frozen=True)
class Surroundings:
    """Facts about where a recipe runs. engine: what shards or replicates. zero_stage: of DeepSpeed. factors: dtype."""

    engine: Literal["none", "ddp", "fsdp", "deepspeed"] = "none"
    zero_stage: int = 0
    factors: torch.dtype = torch.float32


def check_combination(recipe: Recipe, surroundings: Surroundings | None = None) -> None:
    """Raise LoralignError, with the reason and the alternative, where the parts of a recipe do not go together."""
    found = facts(recipe) | around(surroundings or Surroundings())
    for clash in CLASHES:
        if clash.facts <= found:
            raise LoralignError(f"{recipe.name}: {clash.reason}; {clash.instead}")


def check_ranks(recipe: Recipe, found: Sequence[Site]) -> None:
    """Raise LoralignError where a recipe does not fit the rank and shape of a site, the smallest first."""
    by_size = sorted(found, key=lambda site: min(site.d_out, site.d_in))
    refused = {site.name: why for site in by_size if (why := misfit(recipe, site))}
    if refused:
        first, *rest = refused
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in rest))
        more = f" (and at {len(rest)} more site{'s' * (len(rest) > 1)}: {kinds})" if rest else ""
        raise LoralignError(f"{refused[first]}{more}")


def misfit(recipe: Recipe, site: Site) -> str:
    """Why a recipe cannot serve a site at its rank, with the mend; "" where it can."""
    at = f"{site.name} ({site.d_out} × {site.d_in})"
    most = recipe.init.largest_rank(site.d_out, site.d_in)
    if most is not None and site.r > most:
        lower = "lower `rank`, give the module its own in `ranks`, or " if most else ""
        return (
            f"rank {site.r} is too large for {recipe.name} at {at}, where it can start {most} slots at most: "
            f"{lower}name it in `exclude`"
        )
    match recipe.init.needs:
        case Preheated(rank=rank) if rank(site.r) < site.r:
            return f"the preheat's rank {rank(site.r)} is below the adapter's {site.r} at {at}: raise `options.rank`"
    least = max((getattr(rule, "least_rank", 1) for rule in recipe.rules), default=1)
    if site.r < least:
        return (
            f"rank {site.r} is too small for {recipe.name} at {at}, which trains {least} slots at each step: lower its "
            "`keep`, or raise the rank"
        )
    return ""


def around(surroundings: Surroundings) -> frozenset[str]:
    """The facts of where a recipe runs."""
    deepspeed = surroundings.engine == "deepspeed"
    half = surroundings.factors in (torch.bfloat16, torch.float16)
    return _named({"deepspeed": deepspeed, "zero3": deepspeed and surroundings.zero_stage >= 3, "half factors": half})


def facts(recipe: Recipe) -> frozenset[str]:
    """The facts of a recipe, in the words of the table."""
    start = probe(recipe.init, recipe.scale(recipe.alpha, recipe.r))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    first, second = (recipe.outer.episode(i, _MANY, names) for i in range(2))
    chain = first is not None and first.steps < _MANY and second is not None
    later = second.init if second is not None and second.init is not None else recipe.init
    link = probe(later, 1.0) if chain else start
    sides = [start.train, *(episode.train for episode in (first, second) if episode is not None)]
    declared = [fact for part in _parts(recipe) for fact in getattr(part, "facts", ())]
    return _named(
        {
            "twin": start.twin,
            "reads weights": start.read,
            "one side trains": any(side != "AB" for side in sides),
            "computed form": not recipe.form.identity,
            "chain": chain,
            "linked twin": chain and (start.twin or link.twin),
            "links need data": chain and not isinstance(later.needs, Nothing),
            "dropout": recipe.dropout > 0,
            "several allocate": declared.count("allocates") > 1,
            "too few slots": any(getattr(rule, "least_rank", 1) > recipe.r for rule in recipe.rules),
            "not commits": "commits" not in declared,
            **{f"not {able}": able not in recipe.transform.accepts for able in ABILITIES},
            **{fact: True for fact in declared},
        }
    )


_MANY = 2**31


def _parts(recipe: Recipe) -> Iterator[Any]:
    yield from (recipe.init, recipe.form, recipe.transform, recipe.outer, *recipe.rules)


def _named(true: dict[str, bool]) -> frozenset[str]:
    return frozenset(name for name, holds in true.items() if holds)


@dataclass(frozen=True)
class Start:
    """What an init does, seen on a small matrix."""

    twin: bool
    train: Train
    read: bool
    """It read the values of W."""


def probe(init: Init, s: float) -> Start:
    """Call an init on a random (48, 40) matrix with made-up evidence; an init that refuses it counts as plain."""
    made_up = keyed_generator(0, "plan", 0, "probe")
    reads: list[bool] = []

    def read() -> Tensor:
        reads.append(True)
        return torch.randn(48, 40, generator=made_up)

    left, right = (torch.linalg.qr(torch.randn(d, 16, generator=made_up))[0] for d in (48, 40))
    values = torch.arange(16.0, 0.0, -1.0)
    evidence = None if isinstance(init.needs, Nothing) else Directions(left, values, right)
    try:
        made = init(Weight("model.layers.0.probe", (48, 40), read), 2, s, evidence, draw)
    except LoralignError:
        made = Factors(torch.zeros(2, 40), torch.zeros(48, 2))
    return Start(made.twin, made.train, bool(reads))


def draw(purpose: str, step: int = 0) -> torch.Generator:
    """Keyed randomness of planning; nothing of a run depends on it."""
    return keyed_generator(0, purpose, step, "probe")


def links(recipe: Recipe, total_steps: int, names: Sequence[str]) -> int:
    """How many episodes a run of so many steps has."""
    index, done = 0, 0
    while done < total_steps and (episode := recipe.outer.episode(index, total_steps, names)) is not None:
        index, done = index + 1, done + episode.steps
    return index


def idle(recipe: Recipe, total_steps: int | None) -> str:
    """What to say where a run ends before a rule acts, with the mend; "" where all act. None: of unknown length."""
    first = 1 + max((getattr(rule, "wait_steps", -1) for rule in recipe.rules), default=-1)
    if not first or (total_steps and first < total_steps):
        return ""
    said = f"{recipe.name}: its rule acts after step {first}"
    if not total_steps:
        return f"{said}: the run must have more, and how many `train.epochs` makes is known only with the rows"
    lower = f"lower `options.wait_steps` to {total_steps - 2} at most or " if total_steps > 1 else ""
    return (
        f"{said} and the run has {total_steps} steps, so it is trained as if without it: {lower}raise `train.steps` to "
        f"{first + 1} at least"
    )


def snapshots(recipe: Recipe, total_steps: int | None) -> int:
    """Frozen slots per live one that rules will add in a run of so many steps (None, 0: of unknown length)."""
    return sum(
        int(getattr(rule, "freezes", 0))
        for rule in recipe.rules
        if not total_steps or getattr(rule, "wait_steps", 0) < total_steps
    )
