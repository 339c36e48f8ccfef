"""Make any Hugging Face or TRL trainer run a recipe: evidence from its own loss, our optimizer, rules and episodes.

    trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=peft_config(recipe, model))
    attach(trainer, recipe)
    trainer.train()

Checkpoints hold an adapter that stock PEFT loads; beside it `loralign.json` (written last: a checkpoint without it is
incomplete) and, where a method has state of its own, `loralign_state.safetensors`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, set_seed

from loralign.carrier.packed import not_sent
from loralign.carrier.sites import ADAPTER, as_layers, beside, differing_target, peft_config, sites
from loralign.evidence import Evidence, Progress
from loralign.evidence.store import check_replicas
from loralign.maths.bounds import NotNegative
from loralign.maths.draws import keyed_generator
from loralign.maths.given import checked, said
from loralign.plan.combinations import Surroundings, check_combination, probe
from loralign.plan.course import check_length, idle
from loralign.train.adapt import check_loaded, gather, optimizer
from loralign.train.callback import RecipeCallback
from loralign.train.checkpoint import note_to_resume
from loralign.train.compiled import Until
from loralign.train.compiled import compile as compile_blocks
from loralign.train.replaced import ignored, instead_of
from loralign.train.start import carry_on, check_goes_on, is_trained, restore_storage, start
from loralign.train.undisturbed import same_metrics, undisturbed
from loralign.train.validation import validation_loss
from loralign.types import Batch, Episode, LoralignError, Nothing, Recipe, Validation

log = logging.getLogger("loralign")


@checked
def attach(
    trainer: Any,
    recipe: Recipe,
    *,
    resume_from: str | Path | None = None,
    rest_lr: NotNegative | None = None,
    cache: Path | None = None,
    validation: Iterable[Batch] | None = None,
    progress: Progress | None = None,
    rows: Callable[[Episode | None], Iterable[Batch]] | None = None,
    compile: Literal["auto", "off"] = "off",
) -> RecipeCallback:
    """Prepare a trainer, built with `peft_config=peft_config(recipe, model)`, for the recipe; call before `train()`.

    Args:
        resume_from: the checkpoint that `trainer.train(resume_from_checkpoint=…)` will read; the init is not repeated.
        rest_lr: learning rate of tensors outside pairs (a fresh head), where it differs from the trainer's.
        cache: folder for evidence. progress: called with (what, done, total).
        validation: batches for rules that decide by a validation loss.
        compile: auto: the model's blocks run compiled on a GPU, see `loralign.compile`; for collators of few shapes.
        rows: (episode that begins, None for the first) -> batches for evidence; None: the trainer's training batches.
    Raises:
        LoralignError: a model that is not the recipe's, a reference adapter, DeepSpeed with a pairwise transform,
            another `compile`.
    Side effects: the trainer's `max_grad_norm` becomes 0, the recipe's own clip acts inside the optimizer; checkpoints
        beyond its `save_total_limit` are deleted after ours is complete.
    """
    if not isinstance(trainer, Trainer):
        raise LoralignError(
            f"attach() takes a trainer of Transformers or TRL, not {said(trainer)}: for a loop of your own use adapt()"
        )
    if trainer.model_init is not None:
        raise LoralignError(
            "attach() prepares the model that the trainer holds, and `model_init` makes another one in train(): build "
            "the trainer with the model itself"
        )
    check_loaded(trainer.model)
    check_combination(recipe)
    _check_sharding(trainer, recipe)
    model = _own_model(trainer, recipe)
    _name_ignored(trainer.args, recipe)
    check_length(recipe, max(0, trainer.args.max_steps))
    if trainer.args.max_steps > 0 and (why := idle(recipe, trainer.args.max_steps)):
        log.warning("%s", why)
    if resume_from is None and is_trained(model):
        stored, spent, facts = carry_on(model, recipe), None, {}
    elif resume_from is None:
        if not isinstance(recipe.init.needs, Nothing) or probe(recipe, recipe.s()).read:
            check_replicas(model, recipe)
        with undisturbed(trainer, model):
            evidence = gather(
                model,
                recipe,
                _batches(trainer, recipe, recipe.init.needs.draws, rows and rows(None)),
                loss=loss_of(trainer),
                cache=cache,
                progress=progress,
            )
            stored, spent, facts = start(model, recipe, evidence), evidence.spent, evidence.facts()
    else:
        stored, spent, facts = dict(note_to_resume(Path(resume_from), recipe).storage), None, {}
        restore_storage(model, recipe, stored)
    judges = any(isinstance(rule.needs, Validation) for rule in recipe.rules)
    validation = None if validation is None else list(validation)
    if judges and not validation:
        raise LoralignError(
            f"{recipe.name} decides by the loss on validation rows: pass attach(…, validation=batches), which are "
            "neither training rows nor rows that you report on"
        )
    callback = RecipeCallback(
        recipe,
        model,
        stored,
        resume_from=Path(resume_from) if resume_from else None,
        keep=trainer.args.save_total_limit,
        spent=spent,
        wrapped=lambda: trainer.model_wrapped,
        evidence=facts,
        gather=lambda episode: _at_knot(trainer, model, recipe, episode, rows, progress),
        observe=validation_loss(model, validation, loss_of(trainer), lambda: same_metrics(trainer))
        if judges and validation
        else None,
    )
    trainer.add_callback(callback)
    lr = float(trainer.args.learning_rate)
    trainer.optimizer_cls_and_kwargs = (
        lambda: lambda opt_model, **_: callback.adopt(optimizer(_unwrapped(opt_model), recipe, lr, rest_lr=rest_lr)),
        {},
    )
    trainer.args.max_grad_norm = 0.0
    trainer.args.save_total_limit = None
    trainer.args.ddp_broadcast_buffers = False
    not_sent(model)
    if compile == "auto":
        trainer.add_callback(Until(compile_blocks(model)))
    return callback


def _check_sharding(trainer: Any, recipe: Recipe) -> None:
    plugins = trainer.accelerator.state
    if trainer.args.n_gpu > 1:
        raise LoralignError(
            f"{trainer.args.n_gpu} GPUs in one process (torch's DataParallel) copy the adapter at every step: start "
            "with `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if trainer.is_deepspeed_enabled:
        raise LoralignError(
            f"{recipe.name}: DeepSpeed replaces the parameter groups by flat partitions, so the recipe's own optimizer "
            "cannot step; use FSDP2 or DDP"
        )
    if trainer.is_fsdp_enabled:
        check_combination(recipe, Surroundings(engine="fsdp"))
    if trainer.is_fsdp_enabled and getattr(getattr(plugins, "fsdp_plugin", None), "fsdp_version", 2) == 1:
        raise LoralignError("FSDP version 1 flattens parameters: set fsdp_version: 2 in the accelerate config")


def _name_ignored(args: Any, recipe: Recipe) -> None:
    for key, value in ignored(args, recipe).items():
        log.warning("the trainer's %s = %s does not count: %s decides; %s", key, value, recipe.name, instead_of(key))


_BUILD = "build it with peft_config=loralign.peft_config(recipe, model)"


def _own_model(trainer: Any, recipe: Recipe) -> PeftModel:
    model = _unwrapped(trainer.model)
    if not isinstance(model, PeftModel):
        raise LoralignError(
            "the trainer holds a plain model: build it with peft_config=loralign.peft_config(recipe, model)"
        )
    _check_lora(model)
    as_layers(model)
    if any(isinstance(c, RecipeCallback) for c in trainer.callback_handler.callbacks):
        raise LoralignError("this trainer is already attached to a recipe: build a new one for another run")
    adapters, trained = set(model.peft_config), is_trained(model)
    if trained:
        check_goes_on(recipe)
    if "ref" in adapters and not trained:
        raise LoralignError(
            'the trainer copied the adapter to a frozen one named "ref", which would drift from the base model: '
            "pass the plain model and peft_config=loralign.peft_config(recipe, model) instead of a ready PeftModel"
        )
    if adapters - ({"ref"} if trained else set()) != {ADAPTER}:
        raise LoralignError(f"expected one adapter named {ADAPTER!r}, found {sorted(model.peft_config)}")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise LoralignError("the trainer already has an optimizer: call attach before train() and pass no `optimizers`")
    if alone := beside(model):
        raise LoralignError(
            f"{next(iter(alone))} trains beside the adapter, and no checkpoint would hold it: freeze it, or name its "
            "module in `modules_to_save` of the PEFT config before the trainer is built"
        )
    config: Any = model.peft_config[ADAPTER]
    with_plain = peft_config(recipe, model.get_base_model(), adapted=True)
    for key in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora", "bias"):
        if getattr(config, key) != getattr(with_plain, key):
            instead = "a trained adapter goes on as it is, so set the recipe to that" if trained else _BUILD
            raise LoralignError(
                f"the trainer's adapter has {key} = {getattr(config, key)!r}, the recipe {getattr(with_plain, key)!r}: "
                f"{instead}"
            )
    other = differing_target(model, recipe)
    if other:
        raise LoralignError(
            f"the trainer's adapter {other}, the recipe does not: "
            + ("set `targets` of the recipe to what is trained" if trained else _BUILD)
        )
    for site in sites(model):
        for side in (site.layer.lora_A, site.layer.lora_B):  # TRL makes the adapter of a quantised model bf16
            side[site.adapter].float()  # type: ignore[index]
    return model


def _check_lora(model: PeftModel) -> None:
    other = next((c for c in model.peft_config.values() if not isinstance(c, LoraConfig)), None)
    if other is not None:
        raise LoralignError(f"the trainer's adapter is no LoRA ({type(other).__name__}): {_BUILD}")


def _unwrapped(model: nn.Module) -> Any:
    return model.module if hasattr(model, "module") and not isinstance(model, PeftModel) else model


def loss_of(trainer: Any) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss that a trainer computes on a batch of its own loader."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        prepared = trainer._prepare_inputs(dict(batch))
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            value: Tensor = trainer.compute_loss(model, prepared)
        return value

    return loss


def _at_knot(
    trainer: Any,
    model: PeftModel,
    recipe: Recipe,
    episode: Episode,
    rows: Callable[[Episode | None], Iterable[Batch]] | None,
    progress: Progress | None,
) -> Evidence:
    """Evidence for a later link: batches drawn by (seed, episode), randomness of the training as it was."""
    needs = (episode.init or recipe.init).needs
    with undisturbed(trainer, model):
        set_seed(keyed_generator(recipe.seed, "rows at a knot", episode.index).initial_seed() % 2**31)
        batches = _batches(trainer, recipe, needs.draws, rows and rows(episode))
        found = gather(model, recipe, batches, needs=needs, loss=loss_of(trainer), progress=progress)
    for p in model.parameters():
        p.grad = None
    return found


def _batches(trainer: Any, recipe: Recipe, wanted: int, rows: Iterable[Batch] | None = None) -> Iterator[Batch]:
    if not wanted:
        return
    loader = trainer.get_train_dataloader() if rows is None else rows
    try:
        for batch in islice(iter(loader), wanted):
            if not isinstance(batch, Mapping):
                raise LoralignError(
                    f"{recipe.name} starts from gradients, and {type(trainer).__name__} hands out prompts, which have "
                    "none before they are answered: use a method whose start needs no data (lora, pissa, olora)"
                )
            yield batch
    finally:
        getattr(loader, "end", lambda: None)()  # accelerate counts a loader as running until it is exhausted
