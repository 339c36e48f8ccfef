"""Rows padded at their end without a mask: the same gradients where causality alone hides tokens, else a reason."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import toy
from loralign import Recipe, adapt, build
from loralign.train.unmasked import CAUSAL, Unmasked
from test_compiled import seeing

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 12


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def gradients(model: Any) -> list[Tensor]:
    """Of rows of which two are padded."""
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(40, (3, LENGTH), generator=draw), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 7:], mask[2, 4:] = 0, 0
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


CAUSAL_MODELS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=16),
    "gqa": Qwen2Config(**SIZES, intermediate_size=16, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "wide window": MistralConfig(**SIZES, intermediate_size=16, num_key_value_heads=2, sliding_window=64),
}


@pytest.mark.parametrize("kind", CAUSAL_MODELS)
def test_gradients_without_a_mask_are_the_gradients(kind: str) -> None:
    recipe = build("lora", r=2)
    assert isinstance(recipe, Recipe)
    model = adapt(made(CAUSAL_MODELS[kind]), recipe).train()
    with_mask, unmasked = gradients(model), Unmasked(model)
    assert unmasked.start(LENGTH, nullcontext()) == ""
    assert unmasked.base.config._attn_implementation == CAUSAL and model.training
    for a, b in zip(with_mask, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    unmasked.restore()
    assert unmasked.base.config._attn_implementation == "sdpa"


OTHERS: dict[str, tuple[Any, str]] = {
    "window": (MistralConfig(**SIZES, intermediate_size=16, num_key_value_heads=2, sliding_window=4), "not causal or"),
    "both ways": (LlamaConfig(**SIZES, intermediate_size=16, is_causal=False), "not causal or"),
    "eager": (LlamaConfig(**SIZES, intermediate_size=16, attn_implementation="eager"), "its attention is eager"),
    "no interface": (BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2), "its attention is"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_needs_a_mask_keeps_it(kind: str) -> None:
    config, why = OTHERS[kind]
    model = made(config)
    before, unmasked = model.config._attn_implementation, Unmasked(model)
    assert why in unmasked.start(LENGTH, nullcontext())
    assert model.config._attn_implementation == before
    unmasked.restore()
    assert model.config._attn_implementation == before


def test_an_encoder_and_a_model_of_images_keep_their_masks() -> None:
    encoder = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=16))
    assert Unmasked(encoder).start(LENGTH, nullcontext())
    assert Unmasked(seeing()).start(LENGTH, nullcontext()) == "the model is more than a language model"
    assert Unmasked(toy.llama().model).start(LENGTH, nullcontext()) == "LlamaModel has no part below a head"


def test_a_layer_without_such_attention_and_one_that_reads_the_mask_itself_keep_it() -> None:
    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            return torch.zeros_like(hidden_states), None

    def pooled(layer: nn.Module, args: Any, kwargs: Any, hidden: Tensor) -> Tensor:
        mask = kwargs["attention_mask"]
        rows = torch.ones(hidden.shape[:2]) if mask is None else mask[:, 0, -1].float()
        return hidden + (rows[..., None] * hidden).sum(1, keepdim=True) / rows.sum(1)[:, None, None]

    first, second = made(CAUSAL_MODELS["llama"]), made(CAUSAL_MODELS["llama"])
    first.model.layers[1].self_attn = Nothing()
    assert "some of its layers are not causal" in Unmasked(first).start(LENGTH, nullcontext())
    second.model.layers[0].register_forward_hook(pooled, with_kwargs=True)
    assert "without one, hidden states differ by" in Unmasked(second).start(LENGTH, nullcontext())
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"
