"""Whether packing is safe for a model: tested, not looked up.

TRL's "bfd" packing flattens a batch into one row and restarts `position_ids` at each sample. Transformers turns that
into a block-diagonal mask (eager, sdpa, flex) or into sequence lengths (flash attention), but only where the model
hands position_ids on, only without an attention mask, and **only without a key-value cache**: whoever calls a model
on a packed batch passes `use_cache=False`, as SFTTrainer does; otherwise even Llama lets the samples see each other.

So two samples run packed exactly as TRL collates them, and nothing of the first may reach the logits of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loralign.data.read import first_line
from loralign.types import LoralignError

ROUNDING = 0.05
"""A smaller share is rounding (the first sample changes the group sizes of experts); leaks measure 0.6 to 1."""


Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def check_packing(model: PreTrainedModel, collate: Collate | None = None) -> None:
    """Refuse packing where samples would see each other; four small forwards with the model as it is.

    collate: what makes batches of packed rows, where it is not TRL's.

    Raises:
        LoralignError: the model mixes samples.
    """
    try:
        mixed = _mixing(model, collate or DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    except (TypeError, ValueError, NotImplementedError, RuntimeError, ImportError) as error:
        raise LoralignError(
            f"{type(model).__name__} can't run packed rows ({first_line(error)}): set packing: false"
        ) from error
    if mixed > ROUNDING:
        raise LoralignError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed rows see each "
            "other: set packing: false, or load a model that keeps them apart (Llama, Qwen, Gemma, Mistral do)"
        )


@torch.no_grad()
def _mixing(model: PreTrainedModel, collate: Collate) -> float:
    """How far sample one moves the logits of sample two when packed, as a share of plain concatenation's."""
    vocab, length = model.config.get_text_config().vocab_size, 8
    draw = torch.Generator().manual_seed(0)
    one, other, second = torch.randint(vocab, (3, length), generator=draw).tolist()

    def logits(first: list[int], lengths: list[int]) -> Tensor:
        batch = collate([{"input_ids": first + second, "seq_lengths": lengths}] * 2)
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        return model(**batch, use_cache=False).logits[0, length : 2 * length].float()

    training = model.training
    model.eval()
    try:
        packed = (logits(one, [length] * 2) - logits(other, [length] * 2)).abs().max()
        joined = (logits(one, [2 * length]) - logits(other, [2 * length])).abs().max()
    finally:
        model.train(training)
    return float(packed / joined.clamp_min(torch.finfo(torch.float32).tiny))
