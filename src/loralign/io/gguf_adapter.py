"""A LoRA adapter in llama.cpp's format: one file for `llama-server --lora` and Ollama's `ADAPTER`.

    names   the base's weight as gguf's own tensor map has it: blk.N.attn_q.weight.lora_a (r, d_in), .lora_b (d_out, r)
    scale   adapter.lora.alpha over each tensor's own rank: one alpha for all, B' = B·r/alpha
    rows    of q and k in files of Llama's architecture the two halves of a head are interleaved, for its rotary
            embedding; so are the rows of their B

Source: llama.cpp `convert_lora_to_gguf.py` and `conversion/llama.py` (names, rows), `src/llama-adapter.cpp` and `.h`
        (what is read, `get_scale`), as read in 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.io.folder import GGUF
from loralign.io.layout import Stored
from loralign.io.report import ExportReport
from loralign.types import LoralignError, Site, WorkFailed


@dataclass(frozen=True)
class Architecture:
    """name: llama.cpp's. interleaved: whether q and k are stored for rotations of neighbouring pairs."""

    name: str
    interleaved: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True),
    "MistralForCausalLM": Architecture("llama", interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", interleaved=False),
    "Qwen3ForCausalLM": Architecture("qwen3", interleaved=False),
}


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LoralignError("profile gguf needs the package gguf: pip install 'loralign[gguf]'") from error
    return gguf


def gguf_names(model: PeftModel, found: Sequence[Site]) -> dict[str, str]:
    """llama.cpp's name of each adapted weight.

    Raises LoralignError for models and modules that this profile does not know, and without the package gguf.
    """
    gguf, base = gguf_package(), model.get_base_model()
    kind = type(base).__name__
    if kind not in ARCHITECTURES:
        raise LoralignError(
            f"profile gguf knows {', '.join(ARCHITECTURES)}, this is {kind}: export with profile merged and convert "
            "the model, or portable and convert the adapter, by llama.cpp's scripts"
        )
    blocks = base.config.num_hidden_layers
    names = gguf.get_tensor_name_map(_number(gguf, ARCHITECTURES[kind].name), blocks)
    table = {site.name: names.get_name(f"{site.name}.weight", try_suffixes=(".weight",)) for site in found}
    unknown = [name for name, other in table.items() if other is None]
    if unknown:
        raise LoralignError(f"llama.cpp has no weight for {unknown[0]} of {kind}: export with profile merged")
    if base.config.tie_word_embeddings and "output.weight" in table.values():
        raise LoralignError(
            "the head shares its weight with the embedding, so llama.cpp has no tensor for its adapter: export with "
            "profile peft"
        )
    return table


def _number(gguf: Any, name: str) -> Any:
    return next(number for number, said in gguf.MODEL_ARCH_NAMES.items() if said == name)


def write_gguf(
    folder: Path, model: PeftModel, stored: Mapping[str, Stored], names: Mapping[str, str], report: ExportReport
) -> None:
    """The file; then it is read back and compared with what was meant."""
    gguf, kind = gguf_package(), ARCHITECTURES[type(model.get_base_model()).__name__]
    config: Any = model.get_base_model().config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(str(folder / GGUF), kind.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, report.base)
    if report.revision:
        writer.add_base_model_version(0, report.revision)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, next(iter(stored.values())).alpha)
    meant: dict[str, Tensor] = {}
    for site, (A, B, _) in stored.items():
        part = names[site].split(".")[-2]
        rows = interleaved(B, heads[part]) if kind.interleaved and part in heads else B
        meant |= {f"{names[site]}.lora_a": A, f"{names[site]}.lora_b": rows}
    for name, tensor in meant.items():
        values, dtype = tensor.contiguous(), str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            bits = values.view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _read_back(gguf, folder / GGUF, meant)


def interleaved(B: Tensor, heads: int) -> Tensor:
    """Rows of every head in the order 0, d/2, 1, d/2 + 1, … B: (heads·d, r)."""
    return B.reshape(heads, 2, B.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(B.shape)


def _read_back(gguf: Any, path: Path, meant: Mapping[str, Tensor]) -> None:
    try:
        found = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    except (ValueError, IndexError, KeyError) as error:  # numpy writes small arrays without a word on a full disk
        raise WorkFailed(f"{path.name} was not written whole: free some space, then try again") from error
    for name, tensor in meant.items():
        same = name in found and list(reversed(found[name].shape.tolist())) == list(tensor.shape)
        if not same or found[name].data.tobytes() != tensor.contiguous().view(torch.uint8).numpy().tobytes():
            raise WorkFailed(f"{name} was not written as meant to {path.name}: is the disk healthy?")
