"""What may be combined, and which ranks fit: read before anything is spent. What a run costs is in `memory.py`.

A recipe is described by facts (short words, `facts`), found by asking its parts for their `Facts` and by calling init
and form once on a small random matrix, the outer loop for its first two episodes. A `Clash` names facts that do not go
together, the reason and the alternative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loralign.carrier.sites import draw_for
from loralign.maths.draws import keyed_generator
from loralign.methods.transform.adamw import adamw
from loralign.plan.clashes import CLASHES as CLASHES
from loralign.plan.clashes import Clash as Clash
from loralign.types import (
    Directions,
    Facts,
    Live,
    LoralignError,
    Nothing,
    Preheated,
    Recipe,
    Site,
    Start,
    TopGradient,
    Train,
    Weight,
)

ABILITIES = ("gated", "one_sided", "bf16", "slots")
"""What a transform may accept; the lack of one is a fact."""


@dataclass(frozen=True)
class Surroundings:
    """Facts about where a recipe runs. engine: what shards or replicates. factors: dtype."""

    engine: Literal["none", "ddp", "fsdp", "deepspeed"] = "none"
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
    if why := recipe.init.fits(site.d_out, site.d_in, site.r):
        smaller = not recipe.init.fits(site.d_out, site.d_in, 1)
        lower = "lower `rank`, give the module its own in `ranks`, or " if smaller else ""
        return f"rank {site.r} is too large for {recipe.name} at {at}, where {why}: {lower}name it in `exclude`"
    match recipe.init.needs:
        case Preheated(rank=rank) if rank(site.r) < site.r:
            return f"the preheat's rank {rank(site.r)} is below the adapter's {site.r} at {at}: raise `options.rank`"
    form, rules = recipe.form.facts, [rule.facts for rule in recipe.rules]
    asks = max(rules, key=lambda rule: rule.least_rank, default=form)
    small = f"rank {site.r} is too small for {recipe.name} at {at}, which"
    if rules and site.r < asks.least_rank:
        return f"{small} trains {asks.least_rank} slots or more: lower its `{asks.least_option}`, or raise the rank"
    if site.r < form.least_rank:
        return (
            f"{small} has {form.least_rank} ranks of its own kind: lower its `{form.least_option}`, or raise the rank"
        )
    return ""


def around(surroundings: Surroundings) -> frozenset[str]:
    """The facts of where a recipe runs."""
    half = surroundings.factors in (torch.bfloat16, torch.float16)
    engine = {name: surroundings.engine == name for name in ("deepspeed", "fsdp")}
    return _named({**engine, "half factors": half})


def facts(recipe: Recipe) -> frozenset[str]:
    """The facts of a recipe, in the words of the table."""
    start = probe(recipe, recipe.s())
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    first, second = (recipe.outer.episode(i, _MANY, names, draw) for i in range(2))
    chain = first is not None and first.steps < _MANY and second is not None
    sides = [start.train, *(episode.train for episode in (first, second) if episode is not None)]
    form, transform = recipe.form.facts, recipe.transform.facts
    rules = [rule.facts for rule in recipe.rules]
    return _named(
        {
            "twin": start.twin,
            "reads weights": start.read,
            "starts from data": isinstance(recipe.init.needs, TopGradient | Preheated),
            "moves at the start": start.moves,
            "cannot learn": not start.learns,
            "one side trains": any(side != "AB" for side in sides) or len(form.stock) == 1,
            "no stock factor": not form.stock,
            "shaped start": start.twin
            or start.read
            or start.train != "AB"
            or not isinstance(recipe.init.needs, Nothing),
            "other optimizer": recipe.transform != adamw(),
            "rules": bool(rules),
            "one stock factor": form.stock != "AB",
            "ratio": recipe.transform.lr_ratio != 1.0,
            "computed form": not form.identity,
            "gated": form.gated,
            "tied": form.tied,
            "cross layer": form.cross_layer,
            "adds features": form.path == "features",
            "uneven slots": any(_uneven(rule, names, recipe.r) for rule in rules),
            "pairwise": "elementwise" not in transform.accepts,
            "chain": chain,
            "dropout": recipe.dropout > 0,
            "needs dropout 0": any(part.facts.needs_no_dropout for part in _parts(recipe)),
            "allocates": any(rule.allocates for rule in rules),
            "needs a gate": any(rule.needs_gate for rule in rules),
            "no switch": not form.switches,
            "needs shares": any(rule.needs_shares for rule in rules),
            "no shares": not form.shares,
            "several allocate": sum(rule.allocates for rule in rules) > 1,
            "too few slots": any(rule.least_rank > recipe.r for rule in rules),
            "not commits": not form.commits,
            "shares": bool(recipe.form.shared()),
            "reads links": form.link is not None,
            "cuts links": any(e is not None and e.keep_slots is not None for e in (first, second)),
            "narrows": recipe.outer.facts.narrows,
            **{f"not {able}": able not in transform.accepts for able in ABILITIES},
        }
    )


_MANY = 2**31


def _uneven(rule: Facts, names: Sequence[str], r: int) -> bool:
    return rule.slots is not None and len(set(rule.slots(dict.fromkeys(names, r)).values())) > 1


def _parts(recipe: Recipe) -> Iterator[Any]:
    yield from (recipe.init, recipe.form, recipe.transform, recipe.outer, *recipe.rules)


def _named(true: dict[str, bool]) -> frozenset[str]:
    return frozenset(name for name, holds in true.items() if holds)


@dataclass(frozen=True)
class Probe:
    """What an init does, seen on a small matrix."""

    twin: bool
    train: Train
    read: bool
    """It read the values of W."""
    moves: bool
    """Without a twin, the form's factors of its values have a product."""
    learns: bool
    """Some trained tensor has a gradient there."""


def probe(recipe: Recipe, s: float, shape: tuple[int, int] = (48, 40)) -> Probe:
    """Call an init and a form on a random matrix with made-up evidence; an init that refuses it counts as plain."""
    d_out, d_in = shape
    init, made_up = recipe.init, keyed_generator(0, "plan", 0, "probe")
    reads: list[bool] = []

    def read() -> Tensor:
        reads.append(True)
        return torch.randn(shape, generator=made_up)

    left, right = (torch.linalg.qr(torch.randn(d, 16, generator=made_up))[0] for d in shape)
    values = torch.arange(16.0, 0.0, -1.0)
    evidence = None if isinstance(init.needs, Nothing) else Directions(left, values, right)
    W = Weight("model.layers.0.probe", shape, read)
    try:
        made = init(W, 2, s, evidence, draw)
    except LoralignError:
        made = Start(torch.zeros(2, d_in), torch.zeros(d_out, 2))
    seen = bool(reads)
    own = {**recipe.form.trained(W, 2, draw), **made.own}
    leaves = {**own, **{side: getattr(made, side) for side in "AB" if side in recipe.form.facts.stock}}
    leaves = {key: value.detach().clone().requires_grad_() for key, value in leaves.items()}
    own = {**{key: leaves[key] for key in own}, **recipe.form.constants(W, 2, draw)}
    none = torch.zeros(0, d_in), torch.zeros(d_out, 0)
    stock = leaves.get("A", made.A), leaves.get("B", made.B)
    live = Live(*stock, *none, own, dict(recipe.form.shared()))
    with torch.enable_grad():
        A, B = (factor.dense() for factor in recipe.form.factors(live, ()))
        product = B @ A
        slopes = torch.autograd.grad(
            (product * torch.randn(shape, generator=made_up)).sum(), list(leaves.values()), allow_unused=True
        )
    found = {key: g is not None and bool(g.any()) for key, g in zip(leaves, slopes, strict=True)}
    learns = any(on for key, on in found.items() if key not in "AB" or key in made.train)
    return Probe(made.twin, made.train, seen, not made.twin and bool(product.any()), learns)


draw = draw_for(0, "probe")
"""Keyed randomness of planning; nothing of a run depends on it."""


def snapshots(recipe: Recipe, total_steps: int | None) -> int:
    """Frozen slots per live one that rules will add in a run of so many steps (None, 0: of unknown length)."""
    return sum(
        rule.facts.freezes for rule in recipe.rules if not total_steps or (rule.facts.wait_steps or 0) < total_steps
    )
