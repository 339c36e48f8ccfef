"""The start of every site: written into a model, carried on from a trained adapter, or its storage restored."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.links import make_room
from loralign.carrier.path import wire
from loralign.carrier.sites import draw_for, factors, keep_saving_right, sites, skipped, weight
from loralign.carrier.slot import Own, install, share
from loralign.carrier.slot_check import self_test
from loralign.plan.combinations import check_ranks, probe
from loralign.types import Directions, LoralignError, Nothing, Recipe, Site, Start, Train, WorkFailed

log = logging.getLogger("loralign")


@dataclass(frozen=True)
class Storage:
    """How one site is stored; enough to read a checkpoint back without repeating its init."""

    r: int
    twin: bool
    train: Train
    frozen: int = 0
    """Frozen slots, those of a twin among them."""


@torch.no_grad()
def start(model: PeftModel, recipe: Recipe, evidence: Mapping[str, Directions]) -> dict[str, Storage]:
    """Write the start of every site: factors, storage, forms; returns how each one is stored."""
    self_test()
    found = sites(model)
    check_ranks(recipe, found)
    note_ranks(found)
    made: dict[str, Start] = {}
    for site in found:
        W, draw = weight(site), draw_for(recipe.seed, site.name)
        made[site.name] = recipe.init(W, site.r, site.s, evidence.get(site.name), draw)
    return write_start(model, recipe, made)


def is_trained(model: PeftModel) -> bool:
    """Whether the adapter moves the model already: some site's B is not zero."""
    return any(read([parameter(site, "lora_B").any() for site in sites(model)]))


def check_goes_on(recipe: Recipe) -> None:
    """Raise LoralignError where the recipe's start or form would make something else of a trained adapter."""
    plain = probe(recipe, 1.0)
    known = isinstance(recipe.init.needs, Nothing) and not plain.twin and plain.train == "AB"
    if not known or not recipe.form.facts.identity:
        raise LoralignError(
            f"the adapter is trained already, and {recipe.name} would reset it: go on with a method that starts as "
            "plain LoRA does (lora, lora-pro, lora-rite), or merge it and adapt the merged model"
        )


@torch.no_grad()
def carry_on(model: PeftModel, recipe: Recipe) -> dict[str, Storage]:
    """A trained adapter goes on as it is: its slots are the live ones, W_eff is not touched."""
    self_test()
    found = sites(model)
    check_ranks(recipe, found)
    sides = ("lora_A", "lora_B")
    made = {s.name: Start(*(parameter(s, side).detach().clone() for side in sides)) for s in found}
    log.info("%s: goes on from a trained adapter; its slots at %d sites are live", recipe.name, len(found))
    return write_start(model, recipe, made, moved=True)


def note_ranks(found: Sequence[Site]) -> None:
    """One warning for all sites whose rank is above their smaller side."""
    wide = [site for site in found if site.r > min(site.d_in, site.d_out)]
    if wide:
        first, more = wide[0], f" and at {len(wide) - 1} more sites" if len(wide) > 1 else ""
        log.warning(
            "rank %d exceeds the smaller side (%d) of %s%s: slots beyond it add nothing",
            *(first.r, min(first.d_in, first.d_out), first.name, more),
        )


def write_start(
    model: PeftModel, recipe: Recipe, made: Mapping[str, Start], *, moved: bool = False
) -> dict[str, Storage]:
    """moved: the model may start away from W0."""
    found = sites(model)
    chain = is_chain(recipe, [site.name for site in found])
    shared = share(model.base_model, recipe.form)
    for site in found:
        start, W, draw = made[site.name], weight(site), draw_for(recipe.seed, site.name)
        trained = dict(recipe.form.trained(W, site.r, draw))
        if unknown := set(start.own) - set(trained):
            raise LoralignError(f"the init of {recipe.name} sets {min(unknown)!r}, which its form does not train")
        own = Own({**trained, **start.own}, recipe.form.constants(W, site.r, draw), shared)
        install(site.layer, site.adapter, start, recipe.form, own, chain=chain, turns=recipe.init.facts.turns)
    wire(model, {site.name: site.layer for site in found}, found[0].adapter, recipe.form)
    for site in moving([s for s in found if not moved and not made[s.name].twin]):
        raise WorkFailed(f"the init of {recipe.name} moves {site.name} away from W0 without a twin")
    keep_saving_right(model)
    left = Counter(skipped(model, found).values())
    said = ", ".join(f"{count} × {reason}" for reason, count in left.items())
    log.info("%s: %d sites adapted; left as they are: %s", recipe.name, len(found), said or "none")
    return {name: Storage(int(f.A.shape[0]), f.twin, f.train) for name, f in made.items()}


def moving(found: Sequence[Site]) -> list[Site]:
    """The sites whose adapter changes W. (No product is formed where a factor is zero.)"""
    possible = read([A.any() & B.any() for A, B in map(factors, found)])
    left = [site for site, on in zip(found, possible, strict=True) if on]
    return [site for site, on in zip(left, read([(B @ A).any() for A, B in map(factors, left)]), strict=True) if on]


def read(flags: Sequence[Tensor]) -> list[bool]:
    """What they hold, of every device at once: each look waits for a device, on which others may be at work."""
    held = dict[int, bool]()
    for device in dict.fromkeys(flag.device for flag in flags):
        here = [i for i, flag in enumerate(flags) if flag.device == device]
        held |= zip(here, torch.stack([flags[i] for i in here]).tolist(), strict=True)
    return [held[i] for i in range(len(flags))]


def restore_storage(model: PeftModel, recipe: Recipe, stored: Mapping[str, Storage]) -> None:
    """Prepare a freshly inserted adapter to receive a checkpoint: its init's storage, without repeating the init."""
    made = {}
    for site in sites(model):
        if site.name not in stored:
            raise LoralignError(f"the checkpoint knows no site {site.name}: it belongs to another model or `targets`")
        kind = stored[site.name]
        if kind.r != site.r:
            raise LoralignError(f"the checkpoint has rank {kind.r} at {site.name}, the recipe {site.r}")
        zeros = torch.zeros(site.r, site.d_in), torch.zeros(site.d_out, site.r)
        made[site.name] = Start(*zeros, twin=kind.twin, train=kind.train)
    write_start(model, recipe, made)
    for site in sites(model):
        make_room(site.layer, site.adapter, stored[site.name].frozen)


def is_chain(recipe: Recipe, names: Sequence[str]) -> bool:
    """Whether the recipe's outer loop has more than one link."""
    first = recipe.outer.episode(0, 2**31, names, draw_for(recipe.seed))
    return first is not None and first.steps < 2**31


def parameter(site: Site, side: str) -> Any:
    """Of a side ("lora_A", "lora_B"): what trains."""
    return getattr(site.layer, side)[site.adapter]._parameters["weight"]


@torch.no_grad()
def check_start(model: PeftModel, batch: Mapping[str, Any], *, tolerance: float = 1e-6) -> float:
    """Contract 1 on one batch, in evaluation mode: relative difference of the adapted model's output to the base's."""
    training = model.training
    model.eval()
    try:
        keep = {k: v for k, v in batch.items() if k != "labels"}
        adapted = model(**keep).logits.float()
        with model.disable_adapter():
            base = model(**keep).logits.float()
    finally:
        model.train(training)
    error = float((adapted - base).norm() / base.norm())
    if not error <= tolerance:
        raise WorkFailed(f"the adapted model differs from the base by {error:.1e} at step 0 (allowed {tolerance:.0e})")
    return error
