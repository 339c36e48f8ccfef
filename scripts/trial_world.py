"""Random weights of a model's shape, its tokenizer, and rows to read: for timing where no weights can be had."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def make_world(folder: Path, shape: str) -> list[str]:
    """Weights, tokenizer and rows, where they are not there yet; the settings that name them."""
    config = SHAPES[shape]
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / "model")
        words = {w: i for i, w in enumerate(("<eos>", "<unk>", *(f"w{i}" for i in range(2, config["vocab_size"]))))}
        made = Tokenizer(WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            folder / "model"
        )
        part = 1 if shape == "smollm2-135m" else 20
        for seed, (split, count) in enumerate((("train", 4000), ("valid", 440), ("test", 880))):
            texts = (_chain(150, config["vocab_size"], 10**6 * seed + n) for n in range(count // part))
            lines = (json.dumps({"text": text}) for text in texts)
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    rows = [f"task.{split}={folder / split}.jsonl" for split in ("train", "valid", "test")]
    return [f"model={folder / 'model'}", *rows, f"output={folder / 'study'}"]


def _chain(count: int, words: int, seed: int) -> str:
    """Words of which each has four that may follow it: something to learn."""
    draw, at, said = random.Random(seed), 2 + seed % (words - 2), []
    for _ in range(count):
        said.append(f"w{at}")
        at = 2 + (5 * at + draw.randrange(4)) % (words - 2)
    return " ".join(said)
