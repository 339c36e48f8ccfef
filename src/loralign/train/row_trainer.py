"""The trainer of `loralign train`: TRL's SFTTrainer over rows that are tokens, and how one is made for a job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from loralign.carrier.sites import peft_config
from loralign.optim.pairs import PairOptimizer
from loralign.train.arguments import arguments, check_batches, naming
from loralign.train.job import Job
from loralign.train.reference import optimize
from loralign.train.settled import Settling, bare
from loralign.types import Recipe

MOST_UNREAD = 1000
"""Batches of which numbers wait on the device; each takes the 512 bytes that CUDA's allocator gives at least."""


class RowTrainer(Settling, SFTTrainer):
    """SFTTrainer that does not wait for the device at every step.

    - TRL reads from the device five times after each forward, for its log, before it goes on to the backward. Here the
      numbers stay there until they are logged (`_settle`); the loss and what is logged are TRL's. Where a setting
      changes the loss (`loss_type`, label smoothing, a loss of one's own, router losses, sequence parallelism) TRL
      computes it.
    - `num_tokens` counts packed rows that stay rows; TRL knows one row of them.
    - The operations of a token and a norm that our optimizer has are not looked for in all modules.
    """

    _total_train_tokens: int
    _flos: tuple[int, int] = 0, 0
    """Operations of a batch, and its tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread: list[Tensor] = []
        """Of each batch since the last log (4,): labelled tokens, sum of their entropies, right guesses, tokens."""

    def floating_point_ops(self, inputs: Any) -> int:
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if not self._flos[1]:
            self._flos = int(super().floating_point_ops(inputs)), tokens
        return self._flos[0] * tokens // max(1, self._flos[1])

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm if self._pairs() else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._settle()
        if (ours := self._pairs()) and "loss" in logs:
            logs["grad_norm"] = ours.grad_norm  # before any tracker sees the entry
        super().log(logs, *args, **kwargs)

    def _pairs(self) -> PairOptimizer | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, PairOptimizer) else None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not self._own_loss():
            self._settle()
            rows = inputs.get("position_ids") if "attention_mask" not in inputs else None
            if rows is not None and self.model.training:
                self._total_train_tokens += (rows.shape[0] - 1) * rows.shape[1] * self.accelerator.num_processes
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = bare(model)(**{**inputs, "use_cache": False}, fused_lm_head=True)
        labelled = outputs.label_mask.sum()
        over = labelled if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -outputs.log_probs.sum() / over.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages over the processes
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        tokens = labelled.new_full((), ids.numel()) if mask is None else mask.sum()
        seen = labelled, outputs.entropy.detach().sum(), outputs.is_top1.sum(), tokens
        self._unread.append(torch.stack([number.float() for number in seen]))
        if len(self._unread) == MOST_UNREAD:
            self._settle()
        return loss

    def _own_loss(self) -> bool:
        """Is this a batch of training whose loss is the mean of the labelled tokens'?"""
        plain = self.args.loss_type == "nll" and self.compute_loss_func is None and self.label_smoother is None
        alone = not self.aux_loss_enabled and self.accelerator.parallelism_config is None
        return bool(self.model.training) and plain and alone

    def _settle(self) -> None:
        """Read what was left on the device, of all processes, into what TRL averages for its next entry."""
        if not self._unread:
            return
        counted = self.accelerator.gather(torch.stack(self._unread)[None]).double().sum(0).tolist()
        self._unread.clear()
        metrics = self._metrics["train"]
        for labelled, entropy, right, tokens in counted:
            metrics["entropy"].append(entropy / labelled if labelled else 0.0)
            metrics["mean_token_accuracy"].append(right / labelled if labelled else 0.0)
            self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]


def steps_of(trainer: SFTTrainer) -> int:
    """Optimizer steps of the whole run."""
    args, rows = trainer.args, len(trainer.train_dataset)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    return args.max_steps if args.max_steps > 0 else math.ceil(rows / a_step * args.num_train_epochs)


def trainer_of(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    train: Dataset,
    held_out: Dataset | None,
) -> RowTrainer:
    """A trainer of these rows, with a stock adapter in the model or the reference's own optimizer.

    Raises:
        LoralignError: TRL or torch does not take the job's settings.
    """
    common: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": train, "eval_dataset": held_out}

    def unadapted(extra: Mapping[str, Any]) -> None:
        fewer = replace(job, training=replace(job.training, extra=dict(extra)))
        check_batches(RowTrainer(model, args=arguments(fewer), **common))

    with naming(job.training.extra, unadapted):
        config = peft_config(job.recipe, model) if isinstance(job.recipe, Recipe) else None
        trainer = RowTrainer(model, args=args, peft_config=config, **common)
        check_batches(trainer)
    if not isinstance(job.recipe, Recipe):
        optimize(trainer, job.recipe)
    return trainer
