"""Make any Hugging Face or TRL trainer run a recipe: evidence from its own loss, our optimizer, rules and episodes.

    trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=peft_config(recipe, model))
    attach(trainer, recipe)
    trainer.train()

Checkpoints hold an adapter that stock PEFT loads; beside it `loralign.json` (written last: a checkpoint without it is
incomplete) and, where a method has state of its own, `loralign_state.safetensors`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from loralign.evidence import Progress
from loralign.plan import check_combination
from loralign.sites import ADAPTER, peft_config
from loralign.train.adapt import gather, optimizer, restore_storage, start
from loralign.train.callback import RecipeCallback
from loralign.train.checkpoint import read_note
from loralign.types import Batch, LoralignError, Recipe

log = logging.getLogger("loralign")


def attach(
    trainer: Any,
    recipe: Recipe,
    *,
    resume_from: str | Path | None = None,
    rest_lr: float | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> RecipeCallback:
    """Prepare a trainer, built with `peft_config=peft_config(recipe, model)`, for the recipe; call before `train()`.

    Args:
        resume_from: the checkpoint that `trainer.train(resume_from_checkpoint=…)` will read; the init is not repeated.
        rest_lr: learning rate of tensors outside pairs (a fresh head), where it differs from the trainer's.
        cache: folder for evidence. progress: called with (what, done, total).
    Raises:
        LoralignError: a model that is not the recipe's, a reference adapter, DeepSpeed with a pairwise transform.
    Side effects: the trainer's `max_grad_norm` becomes 0, the recipe's own clip acts inside the optimizer.
    """
    check_combination(recipe)
    if getattr(trainer.args, "deepspeed", None) and "zero" not in recipe.transform.accepts:
        raise LoralignError(
            f"{recipe.name}: DeepSpeed flattens parameters, so pairs (A, B) cannot step together; use FSDP2 or DDP"
        )
    model = _own_model(trainer, recipe)
    if resume_from is None:
        with _same_randomness():
            evidence = gather(
                model, recipe, _batches(trainer, recipe), loss=_loss_of(trainer), cache=cache, progress=progress
            )
            stored = start(model, recipe, evidence)
    else:
        stored = read_note(Path(resume_from)).storage
        restore_storage(model, recipe, stored)
    callback = RecipeCallback(recipe, model, stored, resume_from=Path(resume_from) if resume_from else None)
    trainer.add_callback(callback)
    lr = float(trainer.args.learning_rate)
    trainer.optimizer_cls_and_kwargs = (
        lambda: lambda opt_model, **_: callback.adopt(optimizer(_unwrapped(opt_model), recipe, lr, rest_lr=rest_lr)),
        {},
    )
    trainer.args.max_grad_norm = 0.0
    trainer.args.ddp_broadcast_buffers = False
    return callback


def _own_model(trainer: Any, recipe: Recipe) -> PeftModel:
    model = _unwrapped(trainer.model)
    if not isinstance(model, PeftModel):
        raise LoralignError(
            "the trainer holds a plain model: build it with peft_config=loralign.peft_config(recipe, model)"
        )
    if "ref" in model.peft_config:
        raise LoralignError(
            'the trainer copied the adapter to a frozen one named "ref", which would drift from the base model: '
            "pass the plain model and peft_config=loralign.peft_config(recipe, model) instead of a ready PeftModel"
        )
    if list(model.peft_config) != [ADAPTER]:
        raise LoralignError(f"expected one adapter named {ADAPTER!r}, found {sorted(model.peft_config)}")
    if getattr(trainer, "optimizer", None) is not None:
        raise LoralignError("the trainer already has an optimizer: call attach before train() and pass no `optimizers`")
    config: Any = model.peft_config[ADAPTER]
    with_plain = peft_config(recipe, model.get_base_model(), adapted=True)
    for key in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora", "bias"):
        if getattr(config, key) != getattr(with_plain, key):
            raise LoralignError(
                f"the trainer's adapter has {key} = {getattr(config, key)!r}, the recipe {getattr(with_plain, key)!r}: "
                "build it with peft_config=loralign.peft_config(recipe, model)"
            )
    return model


def _unwrapped(model: nn.Module) -> Any:
    return model.module if hasattr(model, "module") and not isinstance(model, PeftModel) else model


def _loss_of(trainer: Any) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        prepared = trainer._prepare_inputs(dict(batch))
        with trainer.compute_loss_context_manager():
            value: Tensor = trainer.compute_loss(model, prepared)
        return value

    return loss


def _batches(trainer: Any, recipe: Recipe) -> Iterator[Batch]:
    wanted = getattr(recipe.init.needs, "micro_batches", 0)
    if wanted:
        yield from islice(iter(trainer.get_train_dataloader()), wanted)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Leave the global generators as they were: evidence must not change data order or dropout."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
