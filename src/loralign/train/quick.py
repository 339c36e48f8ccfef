"""`train.compile: auto` of a recipe: batches of few shapes for an SFTTrainer, then compiled blocks."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loralign.carrier.abilities import positions
from loralign.data.packing import check_packing
from loralign.data.widths import Packed, Padded, widths
from loralign.train.backbone import Backbone
from loralign.train.compiled import NOT, Blocks, Until
from loralign.train.recorder import recovers
from loralign.train.row_trainer import steps_of
from loralign.train.unmasked import Unmasked

log = logging.getLogger("loralign")
SHORT = 200
"""Forwards of a run below which compiling costs more than it saves. Of the 1B shape (records/2026-11-29-h200-train)
37.4 s pass before the first steady step, and a step takes 124 ms where our own eager one, at 1.35 times PEFT's speed,
takes about 308: 37.4 s / 0.184 s."""
MASKED = ("eager", "sdpa", "flex_attention")
"""Kinds of attention that keep packed rows apart by a mask, whatever their number in a batch."""


def quicken(
    trainer: SFTTrainer,
    *,
    packing: bool,
    seed: int,
    backend: str | None = None,
    short: int = SHORT,
    replay: bool | None = None,
) -> Blocks | None:
    """Compile the model of a trainer whose rows are tokens; None, with a line that says why, where it does not pay.

    backend: as in `compile`; None: on a GPU only. short: forwards below which a run is left as it is. replay: whether
    steps of compiled blocks may become CUDA graphs; None: where torch goes on after a recording that fails.
    """
    if backend is None and trainer.args.device.type != "cuda":
        return None
    if (forwards := _forwards(trainer)) < short:
        log.info(NOT, f"the run has {forwards} forwards, and {short} are about what it takes to gain by it")
        return None
    blocks = Blocks(trainer.model, backend or "inductor")
    if why := _unfit(trainer, packing) or blocks.unfit():
        log.warning(NOT, why)
        return None
    top = _few_shapes(trainer, packing, seed)
    longest = max([top, _most(trainer), *_lengths(trainer.eval_dataset)])  # rules have rows of their own
    unmasked = Unmasked(trainer.model)
    if not packing:
        why = unmasked.start(longest, trainer.accelerator.autocast())
        log.info("%s", f"padded rows are masked in attention, since {why}" if why else "padded rows need no mask")
    blocks.start()
    backbone = Backbone(trainer.model, blocks)
    old = "" if replay is not None or recovers() else "torch before 2.12 does not recover from a recording that fails"
    if why := backbone.unfit() or old:
        log.info("the model's steps are not recorded, since %s", why)
    elif replay is not False and trainer.args.device.type == "cuda":
        backbone.start()
    trainer.add_callback(Until(blocks, backbone, unmasked))
    return blocks


def _unfit(trainer: SFTTrainer, packing: bool) -> str:
    """What is known of the trainer before anything is changed."""
    args, model = trainer.args, trainer.model
    if trainer.is_fsdp_enabled:
        return "FSDP splits its parameters over processes"
    if args.torch_compile:
        return "`train.extra.torch_compile` compiles the whole model"
    if not isinstance(trainer.data_collator, DataCollatorForLanguageModeling):
        return "the trainer has a collator of its own"
    if packing and attention(model) not in MASKED:
        return f"{attention(model)} joins packed rows to one of another length each time"
    return ""


def attention(model: Any) -> str:
    """The kind of attention of a possibly adapted model."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(base.config._attn_implementation)


def _forwards(trainer: SFTTrainer) -> int:
    return int(steps_of(trainer) * trainer.args.gradient_accumulation_steps)


def _most(trainer: SFTTrainer) -> int:
    """Tokens of a row at most; no more than the model has positions for, beyond which a GPU's lookup breaks the run."""
    most = trainer.args.max_length or 0
    return min(most, positions(trainer.model) or most)


def _lengths(rows: Any) -> list[int]:
    return [len(ids) for ids in rows["input_ids"]] if rows is not None else []


def _few_shapes(trainer: SFTTrainer, packing: bool, seed: int) -> int:
    """Give the trainer batches of one shape, or of at most four, and say how much of them is padding; the longest."""
    plain: Any = trainer.data_collator
    lengths = _lengths(trainer.train_dataset)
    most, size = trainer.args.max_length or max(lengths), trainer.args.per_device_train_batch_size
    if packing:
        collate = Packed(max(most, *lengths))
        check_packing(trainer.model, collate=collate)
        trainer.data_collator = collate
        share = 1 - sum(lengths) / (len(lengths) * collate.length)
        log.info("packed rows are padded to %d tokens: %.0f %% of a step", collate.length, 100 * share)
        return collate.length
    found = widths(lengths, size, most, seed)
    trainer.data_collator = Padded(plain, found)
    log.info(
        "rows are padded to one of %s tokens, so that few shapes are compiled: %.0f %% of a step is padding, %.0f %% "
        "if each batch had its own length",
        ", ".join(map(str, found.lengths)), 100 * found.padding, 100 * found.least,
    )  # fmt: skip
    return found.lengths[-1]
