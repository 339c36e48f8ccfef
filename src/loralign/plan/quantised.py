"""What quantisation makes of a base's weights, from a `quantization_config` alone: the checkpoint's own, or the one by
which the base is quantised while it is loaded.

    bitsandbytes 4-bit    ½ B a number, 4 B per 64 numbers; with double quantisation 1 B and 4 B per 16,384
    bitsandbytes 8-bit    1 B a number, 4 B a row                       torchao int8   1 B a number, 4 B a row

Linear layers are quantised, but for the head and those that the config leaves out. A forward holds one layer's weight
de-quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loralign.carrier.quantise import KINDS, Quantize, as_data, check_plain


class UnknownQuantisation(ValueError):
    """How it stores weights is not known here."""


def quantisation(config: Any) -> dict[str, Any]:
    """The section of a model's config as plain data, {} where there is none."""
    section = as_data(getattr(config, "quantization_config", None))
    return {} if "gguf" in str(section.get("quant_method", "")).lower() else section  # de-quantised while it is loaded


def section_of(quantize: Quantize | None, name: str, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The section that a base has once it is loaded: its own, or that of the kind by which it is quantised meanwhile.

    Raises:
        LoralignError: both.
    """
    stored = quantisation(config)
    if quantize is None:
        return stored
    check_plain(quantize, name, stored)
    return KINDS[quantize].settings(dtype)


def saved_bytes(model: nn.Module, section: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes less than the model as it is, and of the largest weight that is de-quantised for a moment."""
    skipped = tuple(section.get("llm_int8_skip_modules") or section.get("modules_to_not_convert") or ())
    found: Any = model
    head = found.get_output_embeddings()
    less = most = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not _named(name, skipped):
            now = module.weight.numel() * module.weight.element_size()
            less, most = less + now - _stored(module, section), max(most, now)
    return less, most


def _named(name: str, skipped: tuple[str, ...]) -> bool:
    return any(name == key or name.endswith("." + key) or name.startswith(key + ".") for key in skipped)


def _stored(module: nn.Linear, section: Mapping[str, Any]) -> int:
    count, kind = module.weight.numel(), str(section.get("quant_method", "")).lower()
    if section.get("load_in_4bit"):
        per_block = 1 + 4 / 256 if section.get("bnb_4bit_use_double_quant") else 4
        return int(count * (0.5 + per_block / 64))
    if section.get("load_in_8bit") or (kind == "torchao" and _int8(section)):
        return count + 4 * module.out_features
    raise UnknownQuantisation(kind or "of an unnamed kind")


def _int8(section: Mapping[str, Any]) -> bool:
    """Weights of eight bits; activations may be quantised beside weights of four."""
    said = str(section.get("quant_type", "")).lower()
    return "int8" in said and "int4" not in said
