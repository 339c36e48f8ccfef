"""A small Hugging Face Trainer over the toy model, for tests that drive whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from toy import VOCAB, llama


def rows(n: int = 16, length: int = 10, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (n, length), generator=g)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def toy_trainer(
    folder: Path,
    config: LoraConfig,
    *,
    steps: int,
    save_steps: int = 1000,
    model: PreTrainedModel | None = None,
    held_out: int = 0,
    **args: Any,
) -> Trainer:
    """Batch 4, lr 1e-2, constant schedule, CPU; `held_out` rows to evaluate; the model is wrapped by stock PEFT."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": save_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    judged: Any = rows(held_out) if held_out else None
    wrapped = get_peft_model(model or llama(), config)
    arguments = TrainingArguments(**{**settings, **args})
    return Trainer(model=wrapped, args=arguments, train_dataset=rows(), eval_dataset=judged)  # type: ignore[arg-type]
