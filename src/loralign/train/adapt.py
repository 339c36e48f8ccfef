"""From a recipe to a model that is ready to train: insert, collect evidence, write the start, check the contract.

`adapt` serves bare loops; `attach` (in `train/attach.py`) and the command line use the same `start`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loralign.carrier.links import make_room
from loralign.carrier.path import wire
from loralign.carrier.sites import draw_for, factors, inserted, keep_saving_right, put_in, sites, skipped, weight
from loralign.carrier.slot import Own, form_of, install, share, shared_of, trained_of
from loralign.carrier.slot_check import self_test
from loralign.evidence import Evidence, Progress, collect, model_loss
from loralign.io.described import described
from loralign.maths.bounds import NotNegative
from loralign.maths.given import checked
from loralign.methods.form.plain import plain
from loralign.optim.pairs import PairOptimizer
from loralign.plan.combinations import check_combination, check_ranks, probe
from loralign.train.undisturbed import as_written
from loralign.types import (
    Batches,
    Directions,
    LoralignError,
    Loss,
    Need,
    Nothing,
    Recipe,
    Site,
    Start,
    Train,
    WorkFailed,
)

log = logging.getLogger("loralign")


@dataclass(frozen=True)
class Storage:
    """How one site is stored; enough to read a checkpoint back without repeating its init."""

    r: int
    twin: bool
    train: Train
    frozen: int = 0
    """Frozen slots, those of a twin among them."""


@checked
def adapt(
    model: nn.Module,
    recipe: Recipe,
    batches: Batches | None = None,
    *,
    loss: Loss = model_loss,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PeftModel:
    """The model with the recipe's adapter inserted and initialised; W_eff = W0 at this point, W0 is never written.

    Args:
        model: a plain base model, without adapter.
        batches: what the model (or `loss`) takes; needed where the init must see gradients or activations.
        loss: (model, batch) -> scalar mean loss; default: the model's own `.loss`.
        cache: folder for evidence, keyed by content; None: not kept.
        progress: called with (what, done, total).
    Raises:
        LoralignError: an impossible combination or input, with the mend.
    Example:
        >>> from loralign import adapt, build
        >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = adapt(LlamaForCausalLM(LlamaConfig(**sizes)), build("lora", r=2))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
        True
    """
    check_loaded(model)
    check_combination(recipe)
    peft_model = put_in(model, recipe)
    evidence = gather(peft_model, recipe, batches, loss=loss, cache=cache, progress=progress)
    start(peft_model, recipe, evidence)
    return peft_model


def check_loaded(model: nn.Module) -> None:
    """Raise LoralignError where a model has no weights, or where what is made now could never train."""
    if torch.is_inference_mode_enabled():
        raise LoralignError("tensors made within torch.inference_mode() never train: call this outside of it")
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise LoralignError(
            f"{missing[0]} has no values here (device meta: offloaded, or never loaded): load the model with "
            "from_pretrained, onto a device that holds it whole"
        )


def gather(
    model: PeftModel,
    recipe: Recipe,
    batches: Batches | None,
    *,
    needs: Need | None = None,
    loss: Loss = model_loss,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Collect what an init must know through the adapter as it is: freshly inserted its product is zero, at a knot of a
    chain it is what the links before have learnt.

    needs: None: those of the recipe's init. Raises LoralignError, before a batch is taken, where the recipe does not
    fit the rank of a site.
    """
    found = sites(model)
    check_ranks(recipe, found)
    wanted = recipe.init.needs if needs is None else needs
    with as_written(model):
        return collect(wanted, model, found, batches, loss=loss, seed=recipe.seed, cache=cache, progress=progress)


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
    return any(read([_parameter(site, "lora_B").any() for site in sites(model)]))


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
    made = {s.name: Start(*(_parameter(s, side).detach().clone() for side in sides)) for s in found}
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


@checked
def optimizer(
    model: PeftModel, recipe: Recipe, lr: NotNegative, *, rest_lr: NotNegative | None = None
) -> PairOptimizer:
    """The recipe's optimizer over everything that trains.

    Args:
        lr: learning rate of A (B: lr·ratio of the transform; a form's own tensors: lr·its ratio) and of the rest.
        rest_lr: learning rate of tensors outside pairs (a fresh head), where it differs.
    Raises LoralignError where the model was adapted for another recipe.
    """
    found = sites(model)
    _check_same(found, recipe)
    shared = shared_of(model.base_model)
    ours = {id(p) for s in found for p in (_parameter(s, "lora_A"), _parameter(s, "lora_B"))}
    ours |= {id(p) for s in found for p in trained_of(s.layer, s.adapter).values()} | {id(p) for p in shared.values()}
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
    return PairOptimizer(
        found,
        rest,
        recipe.transform,
        shared=shared,
        rules=recipe.rules,
        lr=lr,
        rest_lr=rest_lr,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        links=is_chain(recipe, [site.name for site in found]),
    )


def is_chain(recipe: Recipe, names: Sequence[str]) -> bool:
    """Whether the recipe's outer loop has more than one link."""
    first = recipe.outer.episode(0, 2**31, names, draw_for(recipe.seed))
    return first is not None and first.steps < 2**31


def _check_same(found: Sequence[Site], recipe: Recipe) -> None:
    """Raise LoralignError where the adapter has other ranks, another scale or form than the recipe."""
    mend = "pass the recipe that the model was adapted with"
    wanted = inserted(recipe, [site.name for site in found])
    for site in found:
        slots, alpha = wanted[site.name]
        if site.r != slots:
            raise LoralignError(f"{site.name} has rank {site.r}, the recipe {slots}: {mend}")
        if not math.isclose(site.s, alpha / slots, rel_tol=1e-6):
            raise LoralignError(f"{site.name} has the scale {site.s:g}, the recipe {alpha / slots:g}: {mend}")
        form = form_of(site.layer, site.adapter) or plain()
        if dict(described(form, "form")) != dict(described(recipe.form, "form")):
            kinds = type(form).__name__, type(recipe.form).__name__
            other = f"the form {kinds[0]}, {recipe.name} {kinds[1]}" if len(set(kinds)) > 1 else "other options"
            raise LoralignError(f"{site.name} has {other}: {mend}")


def _parameter(site: Site, side: str) -> Any:
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
