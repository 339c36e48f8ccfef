"""Tiny TRL trainers for the tests: a random Llama, a tokenizer of 64 words, inline rows; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from toy import VOCAB, llama


def tokenizer() -> PreTrainedTokenizerFast:
    """Words "w4" to "w63" have their number as id."""
    special = ("<pad>", "<bos>", "<eos>", "<unk>")
    words = {w: i for i, w in enumerate((*special, *(f"w{i}" for i in range(len(special), VOCAB))))}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def words(count: int, seed: int) -> str:
    ids = torch.randint(4, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in ids)


def texts(rows: int = 24) -> Dataset:
    """Rows of unequal length."""
    return Dataset.from_list([{"text": words(5 + i % 4, i)} for i in range(rows)])


def preferences(rows: int = 24) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(4, i), "chosen": " " + words(3 + i % 2, 100 + i), "rejected": " " + words(3, 200 + i)}
            for i in range(rows)
        ]
    )


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return {**fields, **changes}


def sft(folder: Path, config: LoraConfig | None, model: Any = None, **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model or llama(),
        SFTConfig(**settings(folder, **changes)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=config,
    )


def dpo(
    folder: Path, config: LoraConfig | None, model: Any = None, ref_model: Any = None, **changes: Any
) -> DPOTrainer:
    return DPOTrainer(
        model or llama(),
        ref_model,
        args=DPOConfig(**settings(folder, **changes)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=config,
    )
