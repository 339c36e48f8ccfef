"""The shape of a recipe file: its keys, types, defaults and limits; the docstrings are the help in editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from loralign.carrier.quantise import Quantize
from loralign.data.columns import NAMES, faults

Count = Annotated[int, Field(ge=1, lt=2**31)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Rank = Annotated[int, Field(ge=1, le=10**6)]
Processes = Annotated[int, Field(ge=0, le=256)]
Alpha = Annotated[float, Field(ge=1e-6, le=1e6)]
Rate = Annotated[float, Field(ge=1e-12, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(max_length=200)]


def _usable(text: str, longest: int = 255) -> str:
    """A path or hub id that the system can at least look for."""
    if not text.strip():
        raise ValueError("is empty: name a file or folder")
    if len(text.encode()) > 4000 or any(len(part.encode()) > longest for part in text.split("/")):
        raise ValueError(f"is too long for a file's name: at most {longest} bytes")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError("begins with ~ and a user without a home: write the folder out") from error
    return text


Source = Annotated[str, AfterValidator(_usable)]
Target = Annotated[str, AfterValidator(lambda text: _usable(text, 200))]
"""Of an output: temporary files beside it have longer names."""
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def written_schema(found: dict[str, Any], title: str) -> str:
    """A JSON schema as it stands in a file, for editors."""
    said = {**found, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def _names(columns: dict[str, str]) -> dict[str, str]:
    if wrong := faults(columns):
        raise ValueError(wrong)
    return columns


Columns = Annotated[
    dict[str, Annotated[str, Field(min_length=1, max_length=200)]],
    AfterValidator(_names),
    Field(json_schema_extra={"propertyNames": {"enum": list(NAMES)}}),
]
"""Our names of columns to those in the rows."""


class SourceSection(_Section):
    source: Source
    """A json, jsonl, csv, parquet or arrow file, a folder written by `save_to_disk`, or a hub id."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the rows of a mix; those of all entries sum to 1."""
    columns: Columns = {}
    """Its names of columns, as in `data.columns`; omitted: those, {}: none."""
    split: Name | None = None
    """Of a hub id or a saved folder, such as test, or a part of the rows: "train[:1000]"."""


class DataSection(_Section):
    train: Source | SourceSection | list[Source | SourceSection]
    """Training rows: a json, jsonl, csv, parquet or arrow file, a folder written by `save_to_disk`, or a hub id; or a
    list of these, each alone or as {source, share, columns, split}. Without shares all rows of all are trained."""
    eval: Source | Share | SourceSection | None = None
    """Held-out rows: a file, or the share of the training rows to hold out."""
    columns: Columns = {}
    """Our names of columns to those in the rows, where they differ: {prompt: question, completion: answer}."""
    mix: Literal["once", "all"] = "once"
    """Of shares. once: no row is taken twice, and the source with too few rows for its share sets the size of the mix;
    all: every row is taken, and those of such a source are repeated."""
    max_length: Count | None = None
    """Tokens per row; longer rows are cut and counted. Omitted: 1024, or the model's positions where it has fewer."""
    assistant_only: bool = True
    """Loss on the answers only, where rows have roles or prompt and completion."""
    packing: bool = False
    """Several rows per sequence; refused where rows would see each other."""


class TrainSection(_Section):
    learning_rate: Rate | None = None
    """Peak learning rate of A (and of B times the method's ratio); omitted: the method's prior."""
    steps: Count | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the training rows, instead of `steps`; neither: 1."""
    batch_size: BatchSize = 16
    """Rows per optimizer step and process."""
    micro_batch_size: Count | None = None
    """Rows per forward, a divisor of batch_size; omitted: the largest up to 4."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the rate rises."""
    eval_every: Count | None = None
    """Optimizer steps between evaluations; omitted: at the end only."""
    save_every: Count | None = None
    """Optimizer steps between checkpoints, the last step has one too; omitted: 500 for an adapter that takes more steps
    than that, else none, and nothing to resume from."""
    keep: Count = 2
    """Checkpoints kept."""
    patience: Count | None = None
    """Stop after so many evaluations without a better loss; ends with the best checkpoint."""
    load_best: bool = False
    """End with the checkpoint of the lowest evaluation loss."""
    log_every: Count = 10
    """Optimizer steps between lines of log.jsonl."""
    report_to: list[str] = []
    """Trackers of the Trainer: tensorboard, wandb, …"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 elsewhere; what trains is fp32 always."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    compile: Literal["auto", "off"] = "auto"
    """auto: on a GPU the model's blocks are compiled and, where that is faster, replayed as CUDA graphs, each after a
    trial; off: neither."""
    workers: Processes = 0
    """Data loader processes."""
    extra: dict[str, Any] = {}
    """Further fields of TRL's SFTConfig, as they are."""


class RecipeKeys(_Section):
    """What every file says of a model and the recipe that adapts it."""

    model: Source
    """Folder, .gguf file or hub id of the base model."""
    method: Name = "lora"
    """Method id, or a mix such as "lora-ga + lora-rite"; `loralign methods` lists them."""
    preset: Name | None = None
    """Named settings of the method, for instance those of its paper; what stands in this file wins."""
    options: dict[str, Any] = {}
    """The method's own options; `loralign methods METHOD` shows them."""
    rank: Rank | None = None
    """Rank r of every adapted matrix; omitted: the preset's, else 16."""
    alpha: Alpha | None = None
    """Scale: s = alpha/rank, or what the method makes of it; omitted: the preset's, else 32."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: str | list[str] = "all-linear"
    """Modules to adapt: endings of their names, a regular expression, or all-linear (all but the head)."""
    exclude: list[str] = []
    """Endings of module names to leave as they are."""
    ranks: dict[str, Rank] = {}
    """Ending of a module name to its rank, where it differs."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of what trains."""
    max_grad_norm: NotNegative = 1.0
    """Clip of the global gradient norm; 0: off; omitted: the method's own, 1 for most."""
    output: Target
    """Folder of the result; it must be empty or absent, or hold the run to resume."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn."""
    revision: Name | None = None
    """Commit, tag or branch of a hub model."""


class RunFile(RecipeKeys):
    """A recipe of loralign: one training run."""

    task: Literal["sft"] = "sft"
    """sft: supervised fine-tuning of a causal language model."""
    data: DataSection
    """Rows, and how they become tokens."""
    train: TrainSection = TrainSection()
    """The optimisation."""
    quantize: Quantize | None = None
    """Quantise the frozen base while it is loaded, in memory only: nf4 (QLoRA; bitsandbytes, a GPU) or int8 (torchao);
    omitted: not, a checkpoint that is stored quantised stays as it is."""
    trust_remote_code: bool = False
    """Run code that the model's repository ships."""
    cache: Target | None = None
    """Folder where evidence (gradients) is kept between runs."""
