"""The trainer of `loralign train`: TRL's SFTTrainer over rows that are tokens, and how one is made for a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from loralign.carrier.sites import peft_config
from loralign.optim.pairs import PairOptimizer
from loralign.train.arguments import arguments, check_batches, naming
from loralign.train.job import Job
from loralign.train.reference import optimize
from loralign.train.settled import Settling
from loralign.types import Recipe


class RowTrainer(Settling, SFTTrainer):
    """SFTTrainer whose `num_tokens` counts packed rows that stay rows, TRL knows one row of them; and which does not go
    through all modules at every step for the operations of a token and a norm that our optimizer has."""

    _total_train_tokens: int
    _flos: tuple[int, int] = 0, 0
    """Operations of a batch, and its tokens."""

    def floating_point_ops(self, inputs: Any) -> int:
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if not self._flos[1]:
            self._flos = int(super().floating_point_ops(inputs)), tokens
        return self._flos[0] * tokens // max(1, self._flos[1])

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm if self._pairs() else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if (ours := self._pairs()) and "loss" in logs:
            logs["grad_norm"] = ours.grad_norm  # before any tracker sees the entry
        super().log(logs, *args, **kwargs)

    def _pairs(self) -> PairOptimizer | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, PairOptimizer) else None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = inputs.get("position_ids") if "attention_mask" not in inputs else None
        if rows is not None and model.training:
            self._total_train_tokens += (rows.shape[0] - 1) * rows.shape[1] * self.accelerator.num_processes
        return super().compute_loss(model, inputs, *args, **kwargs)


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
