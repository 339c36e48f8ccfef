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
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from toy import VOCAB, _llama_config, llama


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


def grpo(folder: Path, config: LoraConfig | None, model: Any = None, **changes: Any) -> GRPOTrainer:
    """Two answers of at most 4 words per prompt; longer ones earn more."""
    few = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2, "beta": 0.1}
    return GRPOTrainer(
        model or llama(),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=GRPOConfig(**settings(folder, **few, **changes)),
        train_dataset=preferences().select_columns(["prompt"]),
        processing_class=tokenizer(),
        peft_config=config,
    )


def kto(folder: Path, config: LoraConfig | None, model: Any = None, **changes: Any) -> KTOTrainer:
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in preferences(8)
        for kind in ("chosen", "rejected")
    ]
    return KTOTrainer(
        model or llama(),
        args=KTOConfig(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
    )


def orpo(folder: Path, config: LoraConfig | None, model: Any = None, **changes: Any) -> ORPOTrainer:
    return ORPOTrainer(
        model or llama(),
        args=ORPOConfig(**settings(folder, **changes)),
        train_dataset=preferences(8),
        processing_class=tokenizer(),
        peft_config=config,
    )


def judge() -> Any:
    """A fresh classifier with one label."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_llama_config(num_labels=1)).eval()


def reward(folder: Path, config: LoraConfig | None, model: Any = None, **changes: Any) -> RewardTrainer:
    return RewardTrainer(
        model or judge(),
        args=RewardConfig(**settings(folder, **changes)),
        train_dataset=preferences(8),
        processing_class=tokenizer(),
        peft_config=config,
    )
