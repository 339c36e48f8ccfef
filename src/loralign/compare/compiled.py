"""A study's blocks, compiled for all its trials: an arm's adapters come and go, the code stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from loralign.carrier.ragged import OPEN, leave_ranks_open
from loralign.train.compiled import named_blocks
from loralign.train.undisturbed import undisturbed
from loralign.types import Batch, LoralignError

LIMIT = 128
"""Variants of a block: arms × training and evaluation × the first block and the others. Beyond it torch would fall back
to eager code without a word; here it raises."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Transformers model."""
    found = named_blocks(model)
    if not found:
        raise LoralignError(f"`train.compile`: {type(model).__name__} does not name its blocks; leave it out")
    return found


@contextmanager
def compiled(base: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Within: the blocks of the base, with whatever adapter they carry, run compiled code."""
    config: Any = torch._dynamo.config
    limits = {"recompile_limit": LIMIT, "accumulated_recompile_limit": 8 * LIMIT, "fail_on_recompile_limit_hit": True}
    with config.patch(**limits, **OPEN):
        found = blocks(base)
        leave_ranks_open(found)
        for block in found:
            block.compile(dynamic=False, backend=backend)
        try:
            yield
        finally:
            for block in found:
                block._compiled_call_impl = None


def warm(trainer: Trainer, model: nn.Module, learnt: Batch, held_out: Batch | None) -> None:
    """Run a batch of either kind once, as the trainer will; weights, gradients and generators stay as they were."""
    was_training, autocast = model.training, trainer.accelerator.autocast  # it wraps the model when it trains, not yet
    _, items = trainer.get_batch_samples(iter([learnt]), 1, trainer.args.device)  # blocks get it, too
    with undisturbed(trainer, model):
        model.train()
        with autocast():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(learnt)), num_items_in_batch=items)
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        if held_out is not None:
            with autocast():
                trainer.prediction_step(model, dict(held_out), prediction_loss_only=True)
    model.train(was_training)
