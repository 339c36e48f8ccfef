"""From a recipe to a model that is ready to train: insert, collect evidence, write the start; and its optimizer.

`adapt` serves bare loops; `attach` (in `train/attach.py`) and the command line write the same `start`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from loralign.carrier.sites import inserted, put_in, sites
from loralign.carrier.slot import form_of, shared_of, trained_of
from loralign.evidence import Evidence, Progress, collect, model_loss
from loralign.io.described import described
from loralign.maths.bounds import NotNegative
from loralign.maths.given import checked
from loralign.methods.form.plain import plain
from loralign.optim.pairs import PairOptimizer
from loralign.plan.combinations import check_combination, check_ranks
from loralign.train.start import is_chain, parameter, start
from loralign.train.undisturbed import as_written
from loralign.types import Batches, LoralignError, Loss, Need, Recipe, Site


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
    ours = {id(p) for s in found for p in (parameter(s, "lora_A"), parameter(s, "lora_B"))}
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
