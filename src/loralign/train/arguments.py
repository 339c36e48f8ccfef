"""A job in the Trainer's terms: every mistake in it is found before a model is loaded."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from loralign.data.read import first_line
from loralign.train.job import Job
from loralign.train.model import dtype_of
from loralign.train.replaced import OPTIMIZER, ROWS, instead_of
from loralign.train.undisturbed import same_randomness
from loralign.types import LoralignError, Recipe

REFUSALS = (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError)
"""What TRL and torch raise where a setting does not fit."""
REFUSED = {
    "fsdp": "start with `accelerate launch --use_fsdp --fsdp_version 2` (docs/scale.md)",
    "deepspeed": "use torchrun alone (data parallel), or `attach` in a script of your own",
    "push_to_hub": "upload the result yourself, `hf upload` does it",
    "hub_": "upload the result yourself, `hf upload` does it",
    "resume_from_checkpoint": "say --resume",
    "ignore_data_skip": "--resume goes on with the rows that come next",
    "save_only_model": "--resume needs the optimizer's state",
    "enable_jit_checkpoint": "a stop by SIGTERM leaves the last checkpoint as it is, set `train.save_every`",
    "fp16": "set `train.precision`",
    "bf16_full_eval": "an evaluation would round the trained adapter, set `train.precision`",
    "torch_compile": "`train.compile` decides it",
    "parallelism_config": "use torchrun or accelerate launch (docs/scale.md)",
}
"""Beginnings of fields that would take the run out of our hands or harm what it leaves, and what to do instead."""


SCHEDULED = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
"""Of a schedule, decided by the run."""


def arguments(job: Job, *, resumed: bool = False) -> SFTConfig:
    """TRL's settings of a job. resumed: the evaluation before the first step has been made.

    Raises:
        LoralignError: values that do not go together, an unknown field or tracker.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise LoralignError(
            "accelerate was told to use DeepSpeed, which replaces the parameter groups by flat partitions, so no "
            "optimizer of ours can step: set distributed_type: MULTI_GPU in its config, or start with torchrun"
        )
    settings = _settings(job) | {"eval_on_start": job.data.eval is not None and not resumed}
    _check_extra(job, settings)
    if "accelerator_config" not in job.training.extra:  # a copy that blocks waits for all that the step before left
        settings["accelerator_config"] = {"non_blocking": settings["dataloader_pin_memory"]}
    for tracker in job.training.report_to:
        if tracker not in (*get_available_reporting_integrations(), "all", "none"):
            raise LoralignError(
                f"`train.report_to` names {tracker!r}, which is not installed or not known: leave it out"
            )
    extra = job.training.extra

    def made_with(some: Mapping[str, Any]) -> SFTConfig:
        return SFTConfig(**settings, **some)

    try:
        made = made_with(extra)
    except (*REFUSALS, RuntimeError) as error:
        key = culprit(extra, partial(_refused, made_with))
        where = f"`train.extra.{key}`" if key else "`train`"
        raise LoralignError(f"{where} does not fit TRL's SFTConfig: {first_line(error)}") from error
    if job.training.steps is not None:
        check_schedule(made, job.training.steps)
    return made


def culprit(keys: Mapping[str, Any], refused: Callable[[Mapping[str, Any]], bool]) -> str | None:
    """The key without which the rest is taken; of several at fault the last. None: they are refused without any."""
    left = dict(keys)
    while left:
        for key in left:
            if not refused({k: v for k, v in left.items() if k != key}):
                return key
        del left[next(iter(left))]
    return None


def _refused(make: Callable[[Mapping[str, Any]], Any], some: Mapping[str, Any]) -> bool:
    try:
        make(some)
    except (*REFUSALS, RuntimeError, LoralignError):
        return True
    return False


@contextmanager
def naming(extra: Mapping[str, Any], again: Callable[[Mapping[str, Any]], Any]) -> Iterator[None]:
    """Within: what TRL and torch say of settings that they do not take is told with the key of `train.extra`.

    again: does the same with some of these settings.

    Raises:
        LoralignError: they refused something.
    """
    try:
        yield
    except REFUSALS as error:
        if key := culprit(extra, partial(_refused, again)):
            raise LoralignError(
                f"TRL's SFTTrainer does not take `train.extra.{key}` here ({first_line(error)}): leave it out"
            ) from error
        if type(error) is not ValueError and not extra:
            raise
        raise LoralignError(f"TRL's SFTTrainer does not take this run: {first_line(error)}") from error


def check_batches(trainer: Any) -> None:
    """Raise where the loader's settings do not fit it, or leave it without a batch."""
    with same_randomness():
        batches = len(trainer.get_train_dataloader())
    if not batches:
        raise LoralignError(
            f"`train.extra.dataloader_drop_last` leaves none of the {len(trainer.train_dataset)} rows, fewer than a "
            "batch: leave it out, or give more rows"
        )


def check_schedule(args: SFTConfig, steps: int) -> None:
    """Raise where the schedule has no learning rate for some step of a run of this length."""
    kwargs = args.lr_scheduler_kwargs or {}
    if wrong := _wrong_rates(args, steps, kwargs):
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if key := culprit(kwargs, lambda some: bool(_wrong_rates(args, steps, some))):
            raise LoralignError(
                f"`train.extra.lr_scheduler_kwargs` has {key!r}, which does not go with `train.schedule` {kind} "
                f"({wrong}): leave it out"
            )
        raise LoralignError(
            f"`train.schedule` {kind} does not go with {steps} steps, {args.get_warmup_steps(steps)} of them warm-up, "
            f"at rate {args.learning_rate:g} ({wrong}): take another schedule, more steps or a higher rate"
        )


def _wrong_rates(args: SFTConfig, steps: int, kwargs: Mapping[str, Any]) -> str:
    """Why the schedule, with settings of its own, has no rate for some step; "" where it has one for all."""
    own = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters.keys() - SCHEDULED
    if unknown := [key for key in kwargs if key not in own]:  # `constant` would leave them out without a word
        return f"it has no setting {unknown[0]!r}"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warm_up = args.get_warmup_steps(steps)
    try:
        made = get_scheduler(args.lr_scheduler_type, optimizer, warm_up, steps, scheduler_specific_kwargs=dict(kwargs))
        factors = [made.lr_lambdas[0](step) for step in {0, warm_up, steps // 2, steps - 1, steps}]
    except (*REFUSALS, ArithmeticError) as error:
        return first_line(error)
    return "" if all(math.isfinite(factor) for factor in factors) else "a rate that is not finite"


def _settings(job: Job) -> dict[str, Any]:
    t, has_eval = job.training, job.data.eval is not None
    if t.batch_size % t.micro_batch_size:
        raise LoralignError(f"batch_size {t.batch_size} is no multiple of micro_batch_size {t.micro_batch_size}")
    if t.load_best and not (has_eval and t.eval_every):
        raise LoralignError("load_best needs evaluation rows (`data.eval`) and `train.eval_every`")
    save_every = t.eval_every if t.load_best else t.save_every
    return {
        "output_dir": str(job.output / "checkpoints"),
        "max_steps": t.steps or -1,
        "num_train_epochs": t.epochs,
        "per_device_train_batch_size": t.micro_batch_size,
        "per_device_eval_batch_size": t.micro_batch_size,
        "gradient_accumulation_steps": t.batch_size // t.micro_batch_size,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.schedule,
        "warmup_steps": t.warmup,
        "eval_strategy": "steps" if has_eval and t.eval_every else "no",
        "eval_steps": t.eval_every,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 500,
        "save_total_limit": t.keep,
        "load_best_model_at_end": t.load_best or t.patience is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # the patience of a stopped run
        "logging_steps": t.log_every,
        "logging_nan_inf_filter": False,  # it would replace a loss that is not finite by the average before
        "report_to": list(t.report_to),
        "bf16": dtype_of(t.precision) == torch.bfloat16,
        "gradient_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "dataloader_num_workers": t.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed,
        "max_length": job.data.max_length,
        "packing": job.data.packing,
        "assistant_only_loss": False,  # the labels already say it
    }


def _check_extra(job: Job, settings: dict[str, Any]) -> None:
    """`train.extra` names fields of SFTConfig that the recipe's own keys do not decide."""
    extra = job.training.extra
    ours = sorted(settings.keys() & extra.keys())
    if ours:
        raise LoralignError(
            f"`train.extra.{ours[0]}` is decided by the recipe's own keys: leave it out of `train.extra`"
        )
    own = isinstance(job.recipe, Recipe) or job.recipe.optimizer is not None
    for name in (*(OPTIMIZER if own else ()), *ROWS):
        if name in extra:
            instead = instead_of(name) if name in OPTIMIZER else "leave it out; `data` says how rows are read"
            raise LoralignError(f"`train.extra.{name}` would not count, since loralign decides it: {instead}")
    if extra.get("use_liger_kernel") and not is_liger_kernel_available():
        raise LoralignError(
            "`train.extra.use_liger_kernel` needs the package liger-kernel, which is not installed: pip install "
            "liger-kernel, or leave it out (the loss is computed in chunks without it)"
        )
    known = [f.name for f in fields(SFTConfig) if f.init]
    for name in sorted(extra.keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ": leave it out"
        raise LoralignError(f"`train.extra.{name}` is no field of TRL's SFTConfig{hint}")
    kinds = get_type_hints(SFTConfig)
    for name, value in extra.items():
        mend = next((mend for start, mend in REFUSED.items() if name.startswith(start)), "")
        if mend and value not in (None, False):
            raise LoralignError(f"`train.extra.{name}` is refused: {mend}")
        try:
            TypeAdapter(kinds[name], config=ConfigDict(strict=True)).validate_json(json.dumps(value))
        except (TypeError, ValueError) as error:
            said = error.errors()[0]["msg"].lower() if isinstance(error, ValidationError) else error
            raise LoralignError(f"`train.extra.{name}` is not what SFTConfig takes: {said}") from error
