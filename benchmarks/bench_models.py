"""The random Llamas that the benchmarks of steps run, by shape."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, tuple[dict[str, int], int, int]] = {  # config, rows, tokens
    "tiny": ({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}, 2, 64),
    "small": (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
        1,
        512,
    ),
    "host": (
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 3},
        1,
        4,
    ),
    "wide": (
        {"hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 32},
        1,
        256,
    ),
    "rows": (
        {"hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 32},
        8,
        1024,
    ),
    "135m": (
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        32,
        128,
    ),
    "1b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8,
        1024,
    ),
    "8b": (
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        4,
        1024,
    ),
}


def half(shape: str, device: str) -> bool:
    return device == "cuda" or shape == "host"


def base_model(shape: str, device: str) -> Any:
    """A model of its own; on the CPU, where all kinds are in memory at once, they share the frozen weights."""
    if device != "cpu":
        return fresh_model(shape, device)
    model = one_model(shape)
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@functools.cache
def one_model(shape: str) -> LlamaForCausalLM:
    return fresh_model(shape, "cpu")


def fresh_model(shape: str, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=8192 if device == "cpu" else 32000, use_cache=False, **SHAPES[shape][0])
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if half(shape, device) else torch.float32)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(dtype)
    return model.train()
