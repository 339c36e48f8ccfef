"""A trial's steps as CUDA graphs: forward and backward of one shape are recorded once and replayed from then on.

A small model's step is thousands of kernels that a GPU runs faster than a host can name them. Of every shape the first
step runs as it is, the second is recorded, later ones are copied into its inputs and replayed. What is between them,
the optimizer, rules and knots, runs as ever. A recording holds addresses: where a tensor of the model is another one
than it was (a chain's knot), it is made afresh. What cannot be recorded, because the host looks at a number in the
middle of a step, runs as it is, and that is said once for training and once for evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from loralign.carrier.abilities import drops_layers

log = logging.getLogger("loralign")
Outputs = Sequence[Tensor | None]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""(work) -> (its outputs, what computes them again from what its inputs hold then)."""

MOST = 8
"""Shapes that are recorded, of training and evaluation each: every recording keeps its activations."""


def without_compiling() -> Any:
    """Within: what is compiled already runs, what would be compiled raises a RuntimeError. A compiler that runs while
    kernels are recorded launches its own, which spoils the recording and the generators after it."""
    return torch.compiler.set_stance("fail_on_recompile")


def cuda_graph(work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Record the work, which is not executed; replaying it fills the outputs."""
    graph = torch.cuda.CUDAGraph()
    with without_compiling(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return outputs, graph.replay


class Wiring:
    """Which tensors a model holds, to notice that one of them was replaced, freed, frozen or thawed."""

    def __init__(self, model: nn.Module) -> None:
        holders = [held for m in model.modules() for held in (m._parameters, m._buffers)]
        self.seen = [
            (held, name, t, t.data_ptr(), t.requires_grad)
            for held in holders
            for name, t in held.items()
            if t is not None
        ]
        self.trained: list[Tensor] = list({id(t): t for *_, t, _, trained in self.seen if trained}.values())

    def holds(self) -> bool:
        return all(
            held.get(name) is t and t.data_ptr() == at and t.requires_grad == trained
            for held, name, t, at, trained in self.seen
        )


@dataclass(frozen=True)
class Recording:
    """Static inputs, static outputs, and what computes the ones from the others."""

    inputs: Mapping[str, Tensor]
    outputs: Outputs
    replay: Callable[[], None]


class Recorder:
    """Runs work on batches: as it is, recorded or replayed."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model, self.record = model, record
        self.wiring = Wiring(model)
        self.recordings: dict[Any, Recording | None] = {}
        """By kind and shapes; None: seen once."""
        self.refused: set[str] = set()
        """Kinds that are not recorded any more."""

    def trained(self) -> list[Tensor]:
        """What trains now; where the model was changed, everything is recorded afresh."""
        if not self.wiring.holds():
            self.wiring, self.recordings = Wiring(self.model), {}
        return self.wiring.trained

    def run(self, kind: str, work: Callable[[Mapping[str, Any]], Outputs], batch: Mapping[str, Any]) -> Outputs:
        """work(batch); outputs that were replayed are overwritten by the next run of the same shape."""
        self.trained()
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        key = (kind, *((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, v) for k, v in batch.items()))
        if kind in self.refused or self._first(key):
            return work(batch)
        known = self.recordings.get(key) or self._recorded(kind, work, batch, tensors)
        if known is None:
            return work(batch)
        self.recordings[key] = known
        for name, value in tensors.items():
            known.inputs[name].copy_(value)
        known.replay()
        return known.outputs

    def _first(self, key: Any) -> bool:
        """Whether this shape was never seen, or is one too many."""
        if key in self.recordings:
            return False
        if sum(k[0] == key[0] for k in self.recordings) < MOST:
            self.recordings[key] = None
        return True

    def _recorded(
        self, kind: str, work: Callable[[Mapping[str, Any]], Outputs], batch: Mapping[str, Any], tensors: Any
    ) -> Recording | None:
        inputs = {name: value.clone() for name, value in tensors.items()}
        try:
            outputs, replay = self.record(lambda: work({**batch, **inputs}))
        except (RuntimeError, torch.AcceleratorError) as error:
            self.refused.add(kind)
            why = str(error).splitlines()[0][:120]
            log.warning("%s runs one kernel at a time, because its step cannot be recorded: %s", kind, why)
            return None
        return Recording(inputs, outputs, replay)


class CapturedTrainer(Trainer):
    """A Trainer whose forward and backward are recorded, once `record_steps` is called.

    What the Trainer computes for its log alone is left out."""

    recorder: Recorder | None = None

    def record_steps(self, model: nn.Module, record: Record) -> None:
        """From the next step on; a model that skips layers by chance runs as it is."""
        if not drops_layers(model):
            self.recorder = Recorder(model, record)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.recorder is None:
            return super().training_step(model, inputs, num_items_in_batch)
        trained = self.recorder.trained()
        before = [p.grad for p in trained]
        plain = super().training_step

        def work(batch: Mapping[str, Any]) -> Outputs:
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
        if self.recorder is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch, plain = self._prepare_inputs(inputs), super().prediction_step

        def work(given: Mapping[str, Any]) -> Outputs:
            loss, logits, _ = plain(model, dict(given), prediction_loss_only, ignore_keys)
            return [loss, logits if isinstance(logits, Tensor) else None]

        found = self.recorder.run("evaluation", work, batch)
        loss, logits = (None if t is None else t.clone() for t in found)
        return loss, logits, None if prediction_loss_only else batch["labels"]


COUNT = "loralign's number of items"
"""The key under which the Trainer's number of items travels with a batch."""
