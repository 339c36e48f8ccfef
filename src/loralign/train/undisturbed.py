"""Evidence is collected before a trainer trains, and must change nothing of what it will do."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def undisturbed(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Within: evidence may be collected; randomness, metrics and modes of the trainer are as before afterwards."""
    with same_randomness(), same_metrics(trainer), _on_its_device(trainer, model), _as_in_training(trainer, model):
        yield


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Within: no module runs compiled code; hooks of evidence would compile it anew."""
    found = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    for m, _ in found:
        m._compiled_call_impl = None
    try:
        yield
    finally:
        for m, run in found:
            m._compiled_call_impl = run


@contextmanager
def _on_its_device(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Under FSDP, and with `bf16_full_eval`, the Trainer leaves the model on the host until it trains; batches and
    evidence belong on its device."""
    wanted, first = trainer.args.device, next(model.parameters())
    waits = first.device.type == "cpu" and wanted.type != "cpu"
    if waits:
        model.to(wanted)
    try:
        yield
    finally:
        if waits:
            model.to("cpu")


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the global generators as they were: evidence and judgement must not change data order or dropout."""
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


@contextmanager
def same_metrics(trainer: Any) -> Iterator[None]:
    """TRL's trainers average what `compute_loss` saw into the next log; evidence and judgement must not count there."""
    counts = "_metrics", "_total_train_tokens", "_unread"
    kept = {k: copy.deepcopy(v) for k, v in vars(trainer).items() if k in counts}
    try:
        yield
    finally:
        vars(trainer).update(kept)


@contextmanager
def _as_in_training(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Checkpoint activations where the trainer will: it switches that on in `train()`, evidence needs it before.

    Only the checkpointed layers themselves are told that they train, so dropout inside them stays as it was.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    modes = [m.training for m in layers]
    if trainer.args.gradient_checkpointing:
        options = dict(trainer.args.gradient_checkpointing_kwargs or {})
        for own in ("every_n_layers", "offload"):
            options.pop(own, None)
        switch: Any = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.24
        (switch or model.gradient_checkpointing_enable)(options or None)  # type: ignore[operator]
        for m in layers:
            m.training = True
    try:
        yield
    finally:
        for m, mode in zip(layers, modes, strict=True):
            m.training = mode
