"""A trial's steps as CUDA graphs: forward and backward of one shape, loss and all, are one recording.

What is between them, the optimizer, rules and knots, runs as ever. A batch with fewer rows than usual, an epoch's last,
is neither recorded nor run by compiled blocks: either costs more than it saves on the few such batches of a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loralign.carrier.abilities import drops_layers
from loralign.train.recorder import Batch, Outputs, Record, Recorder, Replayed
from loralign.train.settled import Settling
from loralign.train.undisturbed import as_written


class Steps(Recorder[Replayed]):
    """Runs work on batches: as it is, recorded or replayed."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        super().__init__(model)
        self.record = record

    def run(self, kind: str, work: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        """work(batch); outputs that were replayed are overwritten by the next run of the same shape."""
        known = self.of(kind, batch, lambda given: self.record(lambda: work(given)))
        if known is None:
            return work(batch)
        outputs, replay = known
        replay()
        return outputs


class CapturedTrainer(Settling):
    """A Trainer whose forward and backward are recorded, once `record_steps` is called.

    What the Trainer computes for its log alone is left out."""

    recorder: Steps | None = None

    def record_steps(self, model: nn.Module, record: Record) -> None:
        """From the next step on; a model that skips layers by chance runs as it is."""
        if not drops_layers(model):
            self.recorder = Steps(model, record)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if len(inputs[ROWS]) < self.args.per_device_train_batch_size:
            with as_written(model):
                return super().training_step(model, inputs, num_items_in_batch)
        if self.recorder is None:
            return super().training_step(model, inputs, num_items_in_batch)
        trained = self.recorder.trained()
        before = [p.grad for p in trained]
        plain = super().training_step

        def work(batch: Batch) -> Outputs:
            for p in trained:
                p.grad = None
            given = dict(batch)
            loss = plain(model, given, given.pop(COUNT))
            return [loss, *(p.grad for p in trained)]

        loss, *grads = self.recorder.run("training", work, {**self._prepare_inputs(inputs), COUNT: num_items_in_batch})
        several = self.args.gradient_accumulation_steps > 1  # else the next replay may overwrite them
        for p, grad, earlier in zip(trained, grads, before, strict=True):
            p.grad = (grad.clone() if several else grad) if grad is not None else None
            if earlier is not None:
                p.grad = earlier if p.grad is None else p.grad.add_(earlier)
        assert loss is not None
        return loss.clone()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer would go through all modules at every step, for what no trial reports."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As little: what clips has its own norm, and a trial logs none."""
        return grad_norm

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if len(inputs[ROWS]) < self.args.per_device_eval_batch_size:
            with as_written(model):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.recorder is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch, plain = self._prepare_inputs(inputs), super().prediction_step

        def work(given: Batch) -> Outputs:
            loss, logits, _ = plain(model, dict(given), prediction_loss_only, ignore_keys)
            return [loss, logits if isinstance(logits, Tensor) else None]

        found = self.recorder.run("evaluation", work, batch)
        loss, logits = (None if t is None else t.clone() for t in found)
        return loss, logits, None if prediction_loss_only else batch["labels"]


ROWS = "input_ids"
"""What every batch of a study holds, a row each."""
COUNT = "loralign's number of items"
"""The key under which the Trainer's number of items travels with a batch."""
