"""Tiny random models of every family that the tests use, seeded; dropout 0, weights so large that all layers matter.

llama()  LlamaForCausalLM          gpt2()  GPT2LMHeadModel (Conv1D)     tied()  Llama, head tied to the embedding
bert()   BertForSequenceClassification (3 labels, fresh head)           t5()    T5ForConditionalGeneration
vit()    ViTForImageClassification (3 labels)              moe()   Mixtral, 4 fused experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 64
LABELS = 3


def _seeded(make: Callable[[Any], PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """The model in eval mode; the global generator is left as it was."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = make(config).eval()
    torch.set_rng_state(state)
    return model


def _llama_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """2 layers, hidden 32, grouped-query attention; `changes` are fields of LlamaConfig."""
    return _seeded(LlamaForCausalLM, _llama_config(**changes), seed)


def tied(seed: int = 0) -> PreTrainedModel:
    return llama(seed, tie_word_embeddings=True)


def gpt2(seed: int = 0) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.15,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(GPT2LMHeadModel, config, seed)


def bert(seed: int = 0) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        num_labels=LABELS,
    )
    return _seeded(BertForSequenceClassification, config, seed)


def t5(seed: int = 0) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        is_encoder_decoder=True,
    )
    return _seeded(T5ForConditionalGeneration, config, seed)


def vit(seed: int = 0) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_channels=3,
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
    )
    return _seeded(ViTForImageClassification, config, seed)


def moe(seed: int = 0) -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(MixtralForCausalLM, config, seed)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "tied": tied,
    "moe": moe,
}


def batch_for(model: Any, rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and labels that `model(**batch).loss` takes (plain or adapted model); the last row is padded."""
    draw = torch.Generator().manual_seed(1000 + seed)
    config = model.config
    classes = torch.randint(LABELS, (rows,), generator=draw)
    if config.model_type == "vit":
        pixels = torch.randn(rows, config.num_channels, config.image_size, config.image_size, generator=draw)
        return {"pixel_values": pixels, "labels": classes}
    ids = torch.randint(3, VOCAB, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    ids[-1, length - 3 :], mask[-1, length - 3 :] = config.pad_token_id, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if config.model_type == "bert":
        return {**batch, "labels": classes}
    if config.is_encoder_decoder:
        return {**batch, "labels": torch.randint(3, VOCAB, (rows, length // 2), generator=draw)}
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)}


def batches_for(model: Any, count: int, **kwargs: Any) -> list[dict[str, Tensor]]:
    """Different batches, for training and for evidence."""
    return [batch_for(model, seed=i, **kwargs) for i in range(count)]
