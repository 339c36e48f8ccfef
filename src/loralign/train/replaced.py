"""Settings of a Hugging Face trainer that something of ours decides instead: none is dropped in silence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from loralign.types import Recipe

OPTIMIZER = (
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""What the recipe's own optimizer replaces."""
ROWS = (
    *("chat_template_path", "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "eos_token"),
    *("truncation_mode", "completion_only_loss", "model_init_kwargs", "trust_remote_code"),
    *("packing_strategy", "eval_packing", "padding_free"),
)
"""What `loralign train` does itself before TRL sees a row: it loads the model, turns rows into tokens and labels,
and packs whole rows, which it has tried with the model."""
_SAME = {"optim": ("adamw_torch", "adamw_torch_fused")}


def instead_of(key: str) -> str:
    """Where to say it instead."""
    if key in ("weight_decay", "max_grad_norm"):
        return f"set the recipe's own `{key}`"
    return "set it in the method's `options` where it has it (adamw: betas, eps)"


def ignored(args: Any, recipe: Recipe) -> dict[str, Any]:
    """Settings of these arguments, other than the defaults, that do not count, with their values."""
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    found = {}
    for key in OPTIMIZER:
        value = getattr(args, key, None)
        value = getattr(value, "value", value)
        default = getattr(defaults.get(key), "value", defaults.get(key))
        if value != default and value not in _SAME.get(key, (getattr(recipe, key, default),)):
            found[key] = value
    return found
