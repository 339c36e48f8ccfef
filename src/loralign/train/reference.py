"""A run of the reference, which trains the matrices themselves: its optimizer and its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loralign.io.folder import fresh_folder
from loralign.io.public import make_public
from loralign.types import Full


def optimize(trainer: Any, reference: Full) -> None:
    """Let the trainer use the reference's own optimizer, where it has one, its clip and its decay."""
    args = trainer.args
    args.max_grad_norm, args.weight_decay = reference.max_grad_norm, reference.weight_decay
    if reference.optimizer is not None:
        made, trained = reference.optimizer, [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer_cls_and_kwargs = (
            lambda: lambda *_, **__: made([{"params": trained}], args.learning_rate, args.weight_decay),
            {},
        )


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """The whole model and its tokenizer."""
    with fresh_folder(output, overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_public(folder)
