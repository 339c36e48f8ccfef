"""`adapter.gguf` read back as stock PEFT's adapter, by the formula of llama.cpp: scale = alpha / rank of each tensor.

Nothing here imports loralign; the writer (`gguf_adapter.py`) is not used, so that a fault in it shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NAME = "adapter.gguf"
INTERLEAVED = ("llama",)
"""Architectures whose q and k are stored for rotations of neighbouring pairs."""


class Fields:
    """What the file says of itself; ValueError where it is no adapter."""

    def __init__(self, path: Path) -> None:
        import gguf

        try:
            self._file = gguf.GGUFReader(str(path))
        except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        self.tensors = {t.name: t for t in self._file.tensors}
        if self._said("general.type") != "adapter" or self._said("adapter.type") != "lora":
            raise ValueError("it says of itself that it is no LoRA adapter")
        self.architecture = str(self._said("general.architecture"))
        self.alpha = float(self._said("adapter.lora.alpha"))
        self.base, self.revision = self._said("general.base_model.0.name"), self._said("general.base_model.0.version")

    def _said(self, key: str) -> Any:
        field = self._file.get_field(key)
        return None if field is None else field.contents()


def values(tensor: Any) -> Tensor:
    """The numbers of one stored tensor, in the order of its rows."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(np.array(tensor.data).view(np.uint8)).view(torch.bfloat16).reshape(shape)
    if tensor.tensor_type.name not in ("F32", "F16"):
        raise ValueError(f"{tensor.name} is stored as {tensor.tensor_type.name}")
    return torch.from_numpy(np.array(tensor.data)).reshape(shape)


def write_as_peft(fields: Fields, model: Any, folder: Path) -> None:
    """An adapter folder of stock PEFT for this base; ValueError where the file names no weight of it."""
    import gguf

    kind = next((k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == fields.architecture), None)
    if kind is None:
        raise ValueError(f"gguf knows no architecture {fields.architecture}")
    config, table = model.config, gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    left = set(fields.tensors)
    found: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, module in model.named_modules():
        stored = table.get_name(f"{name}.weight", try_suffixes=(".weight",)) if isinstance(module, nn.Linear) else None
        if stored is None or not {f"{stored}.lora_a", f"{stored}.lora_b"} <= left:
            continue
        A, B = (values(fields.tensors[f"{stored}.lora_{side}"]) for side in "ab")
        part = stored.split(".")[-2]
        if fields.architecture in INTERLEAVED and part in heads:
            B = B.reshape(heads[part], B.shape[0] // heads[part] // 2, 2, -1).transpose(1, 2).reshape(B.shape)
        found |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B.contiguous()}
        ranks[name] = int(A.shape[0])
        left -= {f"{stored}.lora_a", f"{stored}.lora_b"}
    if left or not found:
        raise ValueError(f"the base has no weight for {sorted(left)[0]}" if left else "it holds no pairs")
    saved = {
        "peft_type": "LORA",
        "r": max(ranks.values()),
        "lora_alpha": fields.alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{name}$": rank for name, rank in ranks.items()},
        "base_model_name_or_path": fields.base,
    }
    save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(saved), encoding="utf-8")
