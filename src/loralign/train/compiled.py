"""Blocks of a GPU model compiled once for all trials: traces are kept with the code, adapters come and go.

torch.compile guards on structure and not on the identity of modules, so a block with a fresh adapter of a known kind
runs the code that an earlier trial made. What is new at the start of a trial is compiled by `warm`, outside its clock;
what a rule changes later, such as delta-lora's snapshot, is compiled inside of it. Shapes are static: with dynamic ones
the numbers would depend on which shapes came before, and an outcome on earlier trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from loralign.train.attach import loss_of
from loralign.train.undisturbed import undisturbed
from loralign.types import Batch, LoralignError

LIMIT = 128
"""Variants of a block: arms × training and evaluation × sizes of a batch. Beyond it torch would fall back to eager code
without a word; here it raises."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Transformers model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise LoralignError(f"`train.compile`: {type(model).__name__} does not name its blocks; leave it out")
    return found


@contextmanager
def compiled(base: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Within: the blocks of the base, with whatever adapter they carry, run compiled code."""
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=8 * LIMIT, fail_on_recompile_limit_hit=True):
        found = blocks(base)
        for block in found:
            block.compile(dynamic=False, backend=backend)
        try:
            yield
        finally:
            for block in found:
                block._compiled_call_impl = None


def warm(trainer: Trainer, model: nn.Module, learnt: Batch, held_out: Sequence[Batch]) -> None:
    """Run batches of every shape once, forward and backward; weights, gradients and generators stay as they were."""
    was_training = model.training
    with undisturbed(trainer, model):
        model.train()
        loss_of(trainer)(model, learnt).backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        for batch in held_out:
            with trainer.accelerator.autocast():  # the Trainer wraps the model in it when it trains, not before
                trainer.prediction_step(model, dict(batch), prediction_loss_only=True)
    model.train(was_training)
