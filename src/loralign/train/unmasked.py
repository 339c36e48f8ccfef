"""Rows padded at their end, without a mask in causal attention: no token sees a later one, and padding comes last.

Of a padded batch Transformers makes a mask of rows × tokens², for which the host looks at the batch, and with which the
fastest kernels of attention don't run. Whether a model can do without is tried: without padding every layer must be
causal and ask for no mask (windows, prefixes and biases do), and padded rows must give the same hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loralign.carrier.abilities import text_config
from loralign.data.read import first_line
from loralign.train.beside import unseen
from loralign.train.compiled import ROUNDING

CAUSAL, PROBE = "loralign_causal", "loralign_probe"
"""Names by which Transformers calls attention; of the first it makes no masks."""
SPREAD = 3
"""Roundings of one block that all of them together may be apart."""


class Unmasked:
    """A model's attention, which needs no mask for rows padded at their end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.before = ""

    def start(self, length: int, autocast: AbstractContextManager[Any]) -> str:
        """Why masks stay, "" where there are none from now on. length: of the longest rows."""
        if why := self._unfit():
            return why
        try:
            with unseen(self.model), torch.no_grad(), autocast:
                if why := self._speaks_against(length):
                    return why
        except Exception as error:  # whatever it is: the model runs with masks next, and raises what is its own
            return f"the trial failed: {first_line(error)[:120]}"
        self.before = self.base.config._attn_implementation
        self.base.set_attn_implementation(CAUSAL)
        return ""

    def restore(self) -> None:
        """Leave the model as it was before."""
        if self.before:
            self.base.set_attn_implementation(self.before)

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _unfit(self) -> str:
        base = self.base
        if not isinstance(base, PreTrainedModel) or base.base_model is base:
            return f"{type(base).__name__} has no part below a head"
        if text_config(base.config) is not base.config:
            return "the model is more than a language model"
        if base.config._attn_implementation != "sdpa":
            return f"its attention is {base.config._attn_implementation}"
        return ""

    def _speaks_against(self, length: int) -> str:
        config = self.base.config
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (2, length), generator=draw).to(self.base.device)
        mask = torch.ones_like(ids)
        seen: list[bool] = []
        AttentionInterface.register(PROBE, partial(_probe, seen))
        AttentionMaskInterface.register(PROBE, sdpa_mask)
        with self._by(PROBE):
            self._hidden(ids[:1], mask[:1])
        if len(seen) < config.num_hidden_layers or not all(seen):
            return "some of its layers are not causal or need a mask without padding, too"
        mask[1, (length + 1) // 2 :] = 0
        with_mask = self._hidden(ids, mask)[mask.bool()].float()
        with self._by(CAUSAL):
            without = self._hidden(ids, mask)[mask.bool()].float()
        off = float((without - with_mask).norm() / with_mask.norm().clamp_min(1e-30))
        limit = SPREAD * ROUNDING.get(self.base.dtype, 0.03)
        return "" if off <= limit else f"without one, hidden states differ by {off:.1e} of their norm"

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        training = self.base.training
        self.base.eval()
        try:
            found: Tensor = self.base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            self.base.train(training)
        return found

    @contextmanager
    def _by(self, name: str) -> Iterator[None]:
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(name)
        try:
            yield
        finally:
            self.base.set_attn_implementation(before)


def _probe(seen: list[bool], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    seen.append(mask is None and bool(causal) and kwargs.get("position_bias") is None)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
