"""A small Hugging Face Trainer over the toy model, for tests that drive whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from loralign import Recipe, adapt, attach, optimizer, peft_config
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


def attached_run(folder: Path, recipe: Recipe, resume: Path | None = None) -> Any:
    """Four steps through the Trainer and `attach`, a checkpoint after two; the trained model."""
    trainer = toy_trainer(folder, peft_config(recipe, llama()), steps=4, save_steps=2)
    attach(trainer, recipe, resume_from=resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model


def step_by_step(model: Any, recipe: Recipe, batches: list[dict[str, torch.Tensor]]) -> PeftModel:
    """Adapted and trained a step a batch, in train mode, with gradients left as a real run leaves them."""
    adapted = adapt(model, recipe, batches[:2]).train()
    optim = optimizer(adapted, recipe, lr=1e-2)
    for batch in batches:
        optim.zero_grad()
        adapted(**batch).loss.backward()
        optim.step()
    return adapted
