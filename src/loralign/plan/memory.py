"""What a run costs, before anything is spent: bytes from a trace of one training step (`trace.py`), counts and
floating point operations from the sites.

Optimizer state is what `transform.init` makes of every pair. Bytes are of live tensors at the fullest moment of a step,
from the second optimizer step on; left out are Python and its libraries (about 0.5 GB on the CPU), what an allocator
keeps after it was freed, and workspaces inside kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loralign.carrier.masters import masters
from loralign.carrier.path import wire
from loralign.carrier.sites import ADAPTER, put_in, sites, target_weights
from loralign.carrier.slot import Own, effective, install, share
from loralign.methods.reference import state_over_numbers
from loralign.plan.combinations import check_ranks, draw, probe, snapshots
from loralign.plan.course import commits, course, sides, trained_by
from loralign.plan.several import ALONE, Layout, Load, spread
from loralign.plan.start import evidence_bytes, init_seconds
from loralign.plan.trace import Step, example_batch, trace, usual_loss
from loralign.types import (
    Batch,
    Full,
    Loss,
    Pair,
    Recipe,
    Site,
    Start,
    Weight,
)


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs on a model."""

    trainable: int
    """Trained numbers."""
    weights_bytes: int
    adapter_bytes: int
    """Live and frozen slots, and a form's own tensors."""
    optimizer_bytes: int
    """State; on a GPU also the trained numbers as they were before the last step."""
    activation_bytes: int
    """What forward and backward add at the fullest moment, gradients included."""
    peak_bytes: int
    evidence_bytes: int
    """What the init must know before training: exact gradients are kept on the host, all else beside the model."""
    init_seconds: float | None
    """Collecting it and writing the start, at the speed of a matrix product on this machine; None: planned for another
    device."""
    sites: int
    export_rank: int
    """Largest rank in the exported file, 0 for the reference."""
    gathered_bytes: int = 0
    """What FSDP2 holds whole for a moment; every count of bytes is then of one GPU."""
    start_bytes: int = 0
    """The fullest moment of collecting what the init must know of batches, on the model's device; 0: it needs none, or
    FSDP2 splits the model, where this is not planned."""

    @property
    def fullest_bytes(self) -> int:
        """Of the start and of any step."""
        return max(self.start_bytes, self.peak_bytes)


def estimate(
    model: nn.Module,
    recipe: Recipe | Full,
    step: Step,
    *,
    batch: Batch | None = None,
    loss: Loss | None = None,
    layout: Layout = ALONE,
) -> Estimate:
    """The cost of a recipe on a model.

    Args:
        model: a fresh base model on the meta device, in the dtype it will be loaded in; it is used up.
        batch: what the model takes, on any device, where `example_batch` cannot know it.
        loss: (model, batch) -> scalar; None: what TRL's SFTTrainer computes for a causal language model, else the
            model's own.
        layout: over how many GPUs the run is spread; the bytes are those of one.
    Raises:
        LoralignError: no site matches, a rank does not fit, or the model's forward depends on the values in a batch.
    Example:
        >>> from loralign import build
        >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> with torch.device("meta"): base = LlamaForCausalLM(config)
        >>> estimate(base, build("lora", r=2), Step(rows=1, length=8)).trainable
        496
    """
    weights, numel = _nbytes(_tensors(model)), sum(p.numel() for p in model.parameters())
    batch, loss = batch or example_batch(model, step), loss or usual_loss(model, step)
    if isinstance(recipe, Full):
        return _reference(model, recipe, step, batch, loss, layout)
    start = probe(recipe, recipe.s())
    adapted, found = _adapted(model, recipe)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    ranks = {site.name: int(effective(site.layer, site.adapter)[0].shape[0]) for site in found}
    static, state = _nbytes(_tensors(adapted)), _state_bytes(recipe, found, trained, step.total_steps)
    names = [site.name for site in found]
    episodes = course(recipe, step.total_steps, names)
    committed, last = commits(episodes, ranks), trained_by(episodes[-1], names)
    each, extra = 2 if start.twin else 1, snapshots(recipe, step.total_steps)
    most = episodes[-1].keep_slots
    held = {name: min(each * committed[name], most or 2**31) + extra * R for name, R in ranks.items()}
    live = {name: each * R * (name in last or not held[name]) for name, R in ranks.items()}
    frozen = sum(((each - 1) * s.r + held[s.name]) * 4 * (s.d_in + s.d_out) for s in found)
    gradients, stepping = _nbytes(trained), _step_bytes(recipe, trained, start.twin)
    if step.device == "cuda" and not layout.sharded:
        state += gradients  # what the last step moved, until its norm is read (optim/norm.py)
    moment = _moment(adapted, step, batch, loss, layout, gradients) - static
    on_host, beside = evidence_bytes(recipe.init.needs, found)
    kept = beside + on_host * (step.device == "cpu")
    whole = Estimate(
        trainable=sum(p.numel() for p in trained),
        weights_bytes=weights,
        adapter_bytes=static - weights + frozen,
        optimizer_bytes=state,
        activation_bytes=moment,
        peak_bytes=static + frozen + state + max(moment, stepping),
        evidence_bytes=on_host + beside,
        init_seconds=init_seconds(recipe, start, found, numel, step),
        sites=len(found),
        export_rank=max(held[name] + live[name] for name in names),
        start_bytes=static + moment + kept if recipe.init.needs.draws else 0,
    )
    apart = "sharded" in recipe.transform.facts.accepts and not recipe.rules
    return spread(whole, adapted, step, layout, Load(moment, gradients, stepping, frozen, apart=apart))


def _moment(model: nn.Module, step: Step, batch: Batch, loss: Loss, layout: Layout, gradients: int) -> int:
    """The fullest moment of a forward and backward, on several GPUs without the gradients of what trains."""
    if layout.gpus == 1:
        return trace(model, step, batch, loss)
    return trace(model, replace(step, micro_batches=2), batch, loss) - gradients  # they are there from the start


def _step_bytes(recipe: Recipe, trained: Sequence[nn.Parameter], twin: bool) -> int:
    """Gradients, updates, and what the optimizer's step holds beside them at its fullest moment; a twin's sums."""
    facts = (recipe.transform.facts, *(rule.facts for rule in recipe.rules))
    return int((2 + twin + sum(one.transient for one in facts)) * _nbytes(trained))


def _reference(model: nn.Module, recipe: Full, step: Step, batch: Batch, loss: Loss, layout: Layout) -> Estimate:
    """Full fine-tuning of the same matrices, which are fp32 masters; the state is measured on a small matrix. FSDP2
    gathers the masters in bf16, where autocast keeps copies until backward."""
    wanted = list(target_weights(model, recipe).values())
    if layout.sharded:
        model.requires_grad_(False)
        for p in wanted:
            p.requires_grad_(True)
    else:
        masters(model, recipe)
    numel, weights = sum(p.numel() for p in wanted), _nbytes(_tensors(model))
    missing = 4 * numel - _nbytes(wanted)
    moment = _moment(model, step, batch, loss, layout, _nbytes(wanted)) - weights
    gradients = 4 * numel
    state = int(state_over_numbers(recipe.optimizer) * gradients)
    peak = weights + missing + state + max(moment, gradients)
    whole = Estimate(numel, weights + missing, 0, state, moment, peak, 0, 0.0, len(wanted), 0)
    return spread(whole, model, step, layout, Load(moment, gradients, gradients, layout.part(missing), apart=True))


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _adapted(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, list[Site]]:
    """The model with the recipe's sites and form, on the meta device. A twin's frozen slots are left out: they cost
    their own bytes and no activation."""
    with torch.device("meta"):  # PEFT would draw every factor on the CPU first
        adapted = put_in(model, recipe)
    found = sites(adapted)
    check_ranks(recipe, found)
    shared, train, turns = share(adapted.base_model, recipe.form), sides(recipe, found), recipe.init.facts.turns
    for site in found:
        shape = (site.d_out, site.d_in)
        weight = Weight(site.name, shape, lambda shape=shape: torch.empty(shape, device="meta"))  # type: ignore[misc]
        own = Own(recipe.form.trained(weight, site.r, draw), recipe.form.constants(weight, site.r, draw), shared)
        start = Start(*_factors(site), train=train[site.name])
        install(site.layer, site.adapter, start, recipe.form, own, chain=False, turns=turns)
    wire(adapted, {site.name: site.layer for site in found}, ADAPTER, recipe.form)
    return adapted, found


def _state_bytes(
    recipe: Recipe, found: Sequence[Site], trained: Sequence[nn.Parameter], total_steps: int | None
) -> int:
    """Optimizer state of the link that has most: what the transform makes of each awake pair's trained factors, and two
    fp32 moments of everything else."""
    train, names = sides(recipe, found), [site.name for site in found]
    of_pairs: dict[str, int] = {}
    known: dict[Any, int] = {}
    paired = 0
    for site in found:
        side: Any = "".join(f for f in train[site.name] if f in recipe.form.facts.stock)
        key = (site.r, site.d_in, site.d_out, side)
        if side and key not in known:
            state = recipe.transform.init(Pair(site.name, *_factors(site), site.s, side))
            known[key] = _nbytes([t for t in tree_leaves(state) if isinstance(t, Tensor)])
        of_pairs[site.name] = known.get(key, 0)
        both = "AB" if recipe.init.facts.turns else side
        paired += site.r * (site.d_in * ("A" in both) + site.d_out * ("B" in both))
    rest = sum(p.numel() for p in trained) - paired
    awake = [trained_by(episode, names) for episode in course(recipe, total_steps, names)]
    return max(sum(of_pairs[name] for name in part) for part in awake) + 8 * rest


def _factors(site: Site) -> tuple[Tensor, Tensor]:
    return torch.empty(site.r, site.d_in, device="meta"), torch.empty(site.d_out, site.r, device="meta")
