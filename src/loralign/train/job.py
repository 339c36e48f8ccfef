"""A run as plain data: what `loralign train` does, after its file has been parsed. No strings are interpreted here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loralign.carrier.quantise import Quantize
from loralign.data.mix import Mix, Source
from loralign.types import Full, Recipe

USUAL_LENGTH = 1024
"""Tokens per row, where nobody says how many."""


@dataclass(frozen=True)
class Data:
    """Where rows come from and how they become tokens."""

    train: str | Source | Sequence[Source]
    """Local json, jsonl, csv, parquet or arrow file, a folder written by `save_to_disk`, or a hub id; or several."""
    eval: str | float | Source | None = None
    """A file, or the share of the training rows to hold out, or None."""
    mix: Mix = "once"
    """Of sources with shares: no row is taken twice, or every row at least once."""
    max_length: int | None = None
    """Tokens per row; longer rows are cut and counted. None: USUAL_LENGTH, or the model's positions where fewer."""
    assistant_only: bool = True
    """Loss on the answers only, where rows have roles or prompt and completion."""
    packing: bool = False
    """Several rows per sequence; refused where rows would see each other."""


@dataclass(frozen=True)
class Training:
    """The optimisation, in the Trainer's terms."""

    learning_rate: float
    lr_source: str = "given"
    """How the rate was chosen, for the model card."""
    steps: int | None = None
    """Optimizer steps; None: by epochs."""
    epochs: float = 1.0
    batch_size: int = 16
    """Rows per optimizer step and process."""
    micro_batch_size: int = 4
    """Rows per forward; batch_size must be a multiple."""
    schedule: str = "cosine"
    """A Transformers scheduler name: cosine, linear, constant, …"""
    warmup: float = 0.03
    """Share of the steps."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; None: at the end only, where there are evaluation rows."""
    save_every: int | None = None
    """Optimizer steps between checkpoints, the last step has one too; None: 500 in an adapter's run of more steps, else
    none at all."""
    keep: int = 2
    """Checkpoints kept."""
    patience: int | None = None
    """Stop after so many evaluations without a better loss."""
    load_best: bool = False
    """End with the checkpoint of the lowest evaluation loss."""
    log_every: int = 10
    report_to: tuple[str, ...] = ()
    """Trackers of the Trainer: tensorboard, wandb, …"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 elsewhere. The adapter's own tensors are fp32 always."""
    gradient_checkpointing: bool = False
    compile: Literal["auto", "off"] = "auto"
    """auto: the blocks are compiled on a GPU, where that works."""
    workers: int = 0
    """Data loader processes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of TRL's SFTConfig, as they are."""


@dataclass(frozen=True)
class Job:
    """One run of task sft."""

    model: str
    """Folder or hub id of the base model; `file.gguf` inside a folder is read too."""
    recipe: Recipe | Full
    data: Data
    training: Training
    output: Path
    revision: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    quantize: Quantize | None = None
    """How the base is quantised while it is loaded."""
    cache: Path | None = None
    """Folder of the evidence cache, None: none is kept."""
    source: dict[str, Any] = field(default_factory=dict)
    """The parsed file, for `run.json`."""
    chosen_by: str = ""
    """Who chose the method, and why, where the file left that open."""
    once: bool = False
    """Refuse to go through the rows more than once: what chose the method has no ground there."""
