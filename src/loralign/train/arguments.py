"""A job in the Trainer's terms: every mistake in it is found before a model is loaded."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from loralign.train.job import Job
from loralign.train.model import dtype_of
from loralign.types import LoralignError


def arguments(job: Job, *, resumed: bool = False) -> SFTConfig:
    """TRL's settings of a job. resumed: the evaluation before the first step has been made.

    Raises:
        LoralignError: values that do not go together, an unknown field or tracker.
    """
    settings = _settings(job) | {"eval_on_start": job.data.eval is not None and not resumed}
    _check_extra(job, settings)
    for tracker in job.training.report_to:
        if tracker not in (*get_available_reporting_integrations(), "all", "none"):
            raise LoralignError(
                f"`train.report_to` names {tracker!r}, which is not installed or not known: leave it out"
            )
    try:
        return SFTConfig(**settings, **job.training.extra)
    except (TypeError, ValueError) as error:
        raise LoralignError(f"`train` does not fit TRL's SFTConfig: {error}") from error


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
    known = [f.name for f in fields(SFTConfig) if f.init]
    for name in sorted(extra.keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ": leave it out"
        raise LoralignError(f"`train.extra.{name}` is no field of TRL's SFTConfig{hint}")
