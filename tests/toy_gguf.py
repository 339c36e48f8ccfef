"""A tiny Llama (or Qwen) with its tokenizer as a GGUF file, its matrices in Q8_0 or as they were drawn."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
WORDS = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "ab", "<s>", "</s>"]


def write(path: Path, architecture: str = "llama", *, packed: bool = True) -> Path:
    """The file, with random weights. architecture: llama, qwen2 (biases) or qwen3 (norms of q and k)."""
    writer = gguf.GGUFWriter(str(path), architecture)
    head = 128 if architecture == "qwen3" else HIDDEN // HEADS  # Transformers reads no other for Qwen3
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(WORDS.index("<s>"))
    writer.add_eos_token_id(WORDS.index("</s>"))
    draw = np.random.default_rng(0)

    def matrix(name: str, *shape: int) -> None:
        values = draw.normal(0.0, 0.15, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str, width: int = HIDDEN) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    def bias(name: str, width: int) -> None:
        writer.add_tensor(f"{name}.bias", draw.normal(0.0, 0.15, width).astype(np.float32))

    matrix("token_embd", len(WORDS), HIDDEN)
    wide, narrow = HEADS * head, KV_HEADS * head
    for i in range(LAYERS):
        for name, rows in (("attn_q", wide), ("attn_k", narrow), ("attn_v", narrow)):
            matrix(f"blk.{i}.{name}", rows, HIDDEN)
            if architecture == "qwen2":
                bias(f"blk.{i}.{name}", rows)
        matrix(f"blk.{i}.attn_output", HIDDEN, wide)
        for name in ("attn_q_norm", "attn_k_norm") if architecture == "qwen3" else ():
            ones(f"blk.{i}.{name}", head)
        matrix(f"blk.{i}.ffn_gate", WIDE, HIDDEN)
        matrix(f"blk.{i}.ffn_up", WIDE, HIDDEN)
        matrix(f"blk.{i}.ffn_down", HIDDEN, WIDE)
        ones(f"blk.{i}.attn_norm")
        ones(f"blk.{i}.ffn_norm")
    ones("output_norm")
    matrix("output", len(WORDS), HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
