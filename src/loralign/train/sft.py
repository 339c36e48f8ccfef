"""`loralign train`, task sft: TRL's SFTTrainer around a recipe, from rows to a verified plain adapter.

    load model and rows → insert the adapter → evidence → start (contract check 1) → train → export → verify → card

A run can be killed at any moment, also in the middle of a save: `resume` continues from the last complete checkpoint
and ends with the same bits on the CPU.
"""

from __future__ import annotations

import difflib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from loralign.evidence import Progress
from loralign.io.card import Card, write_card
from loralign.io.export import ExportReport, export
from loralign.io.folder import disk_full
from loralign.io.provenance import write_run
from loralign.io.verify import verify
from loralign.sites import explained_targets, peft_config, target_weights
from loralign.train.adapt import check_start
from loralign.train.attach import attach
from loralign.train.chat import Fit, fit
from loralign.train.checkpoint import last_complete
from loralign.train.data import fingerprint, rows_format, split_eval, to_trl
from loralign.train.job import Job
from loralign.train.model import dtype_of, load
from loralign.train.packing import check_packing
from loralign.train.read import read_rows
from loralign.types import Full, LoralignError, Recipe, WorkFailed

log = logging.getLogger("loralign")
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Result:
    """What a finished run leaves. seconds: wall clock by phase (init, train, export)."""

    output: Path
    metrics: dict[str, float]
    export: ExportReport | None
    verified: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class Ready:
    """A trainer that only needs `train()`."""

    trainer: SFTTrainer
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, int]
    fingerprint: str
    resume_from: Path | None
    init_seconds: float


def run(job: Job, *, resume: bool = False, progress: Progress | None = None) -> Result:
    """Train, export and verify one job; see the module.

    Raises:
        LoralignError: bad input, one sentence with the mend; nothing that exists is damaged.
        WorkFailed: the run diverged or the disk is full; checkpoints stay usable.
        VerificationFailed: the written adapter does not compute what was trained.
    """
    ready = prepare(job, resume=resume, progress=progress)
    trainer, started = ready.trainer, time.perf_counter()
    before = trainer.evaluate() if trainer.eval_dataset is not None and ready.resume_from is None else {}
    try:
        trainer.train(resume_from_checkpoint=str(ready.resume_from) if ready.resume_from else None)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not disk_full(error):
            raise
        raise WorkFailed(f"writing failed ({disk_full(error)}): free some space, then --resume") from error
    trained = time.perf_counter()
    metrics = _metrics(trainer, before)
    if isinstance(job.recipe, Full):
        trainer.model.save_pretrained(job.output)
        ready.tokenizer.save_pretrained(job.output)
        report, verified = None, False
    else:
        report = export(
            trainer.model, job.output, base_id=job.model, revision=job.revision, probes=_probes(ready), overwrite=True
        )
        verified = verify(job.output, base=job.model).passed
    seconds = {"init": ready.init_seconds, "train": trained - started, "export": time.perf_counter() - trained}
    _describe(job, ready, metrics, report, verified, seconds)
    return Result(job.output, metrics, report, verified, seconds)


def initialise(
    job: Job,
    *,
    measure: Callable[[SFTTrainer, Recipe], Measured] | None = None,
    progress: Progress | None = None,
) -> Measured | None:
    """Only the initialised adapter, exported to `job.output`, for other trainers.

    measure: called with the attached trainer before the export; what it returns is returned.
    """
    if isinstance(job.recipe, Full):
        raise LoralignError(f"{job.recipe.name} has no adapter to initialise: choose another method, or train it")
    ready = prepare(job, resume=False, progress=progress)
    measured = measure(ready.trainer, job.recipe) if measure else None
    export(
        ready.trainer.model, job.output, base_id=job.model, revision=job.revision, probes=_probes(ready), overwrite=True
    )
    shutil.rmtree(job.output / "checkpoints", ignore_errors=True)  # the trainer's, which never trains
    return measured


def prepare(job: Job, *, resume: bool, progress: Progress | None) -> Ready:
    """Everything up to the first training step."""
    set_seed(job.seed)
    resume_from = _resume_point(job, resume)
    model, tokenizer = load(
        job.model, revision=job.revision, precision=job.training.precision, trust_remote_code=job.trust_remote_code
    )
    if job.data.packing:
        check_packing(model)
    train, held_out = _tokens(job, tokenizer)
    args = _arguments(job, has_eval=held_out is not None)
    callbacks: list[TrainerCallback] = [LogCallback(job.output / "log.jsonl", resume_from is not None, progress)]
    if job.training.patience is not None:
        callbacks.append(EarlyStoppingCallback(job.training.patience))
    started = time.perf_counter()
    trainer = _trainer(job, model, tokenizer, args, train, held_out, callbacks)
    if isinstance(job.recipe, Recipe):
        attach(trainer, job.recipe, resume_from=resume_from, cache=job.cache, progress=progress)
        if resume_from is None:
            check_start(
                trainer.model,
                _one_batch(trainer),
                tolerance=1e-6 if dtype_of(job.training.precision) == torch.float32 else 1e-2,
            )
    trainer.remove_callback(PrinterCallback)
    sizes = {"train": len(trainer.train_dataset), "eval": len(trainer.eval_dataset or ())}
    return Ready(trainer, tokenizer, sizes, fingerprint(train), resume_from, time.perf_counter() - started)


def _resume_point(job: Job, resume: bool) -> Path | None:
    kept = job.output / "checkpoints"
    if resume:
        found = last_complete(kept)
        if found is None:
            raise LoralignError(
                f"nothing to resume in {job.output.name}: no checkpoint is complete; empty it, run without --resume"
            )
        for half in kept.glob("checkpoint-*"):  # cut off while it was written
            if int(half.name.rsplit("-", 1)[1]) > int(found.name.rsplit("-", 1)[1]):
                shutil.rmtree(half)
        return found
    if job.output.exists() and (not job.output.is_dir() or any(p.is_file() for p in job.output.rglob("*"))):
        raise LoralignError(f"{job.output.name} is not empty: choose another output folder, or --resume the run in it")
    return None


def _rows(job: Job) -> tuple[Dataset, Dataset | None]:
    rows = read_rows(job.data.train)
    train = to_trl(rows, rows_format(rows))
    if job.data.eval is None:
        return train, None
    if isinstance(job.data.eval, float):
        return split_eval(train, job.data.eval, seed=job.seed)
    held_out = read_rows(job.data.eval)
    return train, to_trl(held_out, rows_format(held_out))


def _tokens(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
    def one(rows: Dataset, what: str) -> Dataset:
        found: Fit = fit(rows, tokenizer, max_length=job.data.max_length, assistant_only=job.data.assistant_only)
        log.info(
            "%s: %d rows, %d tokens, %d with loss; %d rows cut at %d tokens, %d dropped because no answer was left",
            *(what, len(found.dataset), found.tokens, found.supervised, found.cut, job.data.max_length, found.dropped),
        )
        return found.dataset

    train, held_out = _rows(job)
    return one(train, "training"), None if held_out is None else one(held_out, "evaluation")


def _arguments(job: Job, *, has_eval: bool) -> SFTConfig:
    t = job.training
    if t.batch_size % t.micro_batch_size:
        raise LoralignError(f"batch_size {t.batch_size} is no multiple of micro_batch_size {t.micro_batch_size}")
    if t.load_best and not (has_eval and t.eval_every):
        raise LoralignError("load_best needs evaluation rows (`data.eval`) and `train.eval_every`")
    bf16 = dtype_of(t.precision) == torch.bfloat16
    save_every = t.eval_every if t.load_best else t.save_every
    settings: dict[str, Any] = {
        "output_dir": str(job.output / "checkpoints"),
        "max_steps": t.steps or -1,
        "num_train_epochs": t.epochs,
        "per_device_train_batch_size": t.micro_batch_size,
        "per_device_eval_batch_size": t.micro_batch_size,
        "gradient_accumulation_steps": t.batch_size // t.micro_batch_size,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.schedule,
        "warmup_steps": t.warmup,
        "eval_strategy": "steps" if has_eval and t.eval_every else "no",
        "eval_steps": t.eval_every,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 500,
        "save_total_limit": t.keep,
        "load_best_model_at_end": t.load_best or t.patience is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": t.log_every,
        "report_to": list(t.report_to),
        "bf16": bf16,
        "gradient_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "dataloader_num_workers": t.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed,
        "max_length": job.data.max_length,
        "packing": job.data.packing,
        "assistant_only_loss": False,  # the labels already say it
    }
    ours = sorted(settings.keys() & t.extra.keys())
    if ours:
        raise LoralignError(
            f"`train.extra.{ours[0]}` is decided by the recipe's own keys: leave it out of `train.extra`"
        )
    known = [f.name for f in fields(SFTConfig) if f.init]
    for name in t.extra.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ": leave it out"
        raise LoralignError(f"`train.extra.{name}` is no field of TRL's SFTConfig{hint}")
    for tracker in t.report_to:
        if tracker not in (*get_available_reporting_integrations(), "all", "none"):
            raise LoralignError(
                f"`train.report_to` names {tracker!r}, which is not installed or not known: leave it out"
            )
    try:
        return SFTConfig(**settings, **t.extra)
    except (TypeError, ValueError) as error:
        raise LoralignError(f"`train` does not fit TRL's SFTConfig: {error}") from error


def _trainer(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    train: Dataset,
    held_out: Dataset | None,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    common: dict[str, Any] = {"args": args, "train_dataset": train, "eval_dataset": held_out, "callbacks": callbacks}
    if isinstance(job.recipe, Recipe):
        config = peft_config(job.recipe, model)
        with explained_targets(model, job.recipe):
            return SFTTrainer(model, processing_class=tokenizer, peft_config=config, **common)
    wanted = {id(p) for p in target_weights(model, job.recipe).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
    args.max_grad_norm, args.weight_decay = job.recipe.max_grad_norm, job.recipe.weight_decay
    return SFTTrainer(model, processing_class=tokenizer, **common)


def _one_batch(trainer: SFTTrainer) -> dict[str, Any]:
    """One prepared evaluation-style batch; the global generators are left as they were."""
    dataset = trainer.train_dataset.select(range(min(2, len(trainer.train_dataset))))
    batch: dict[str, Any] = next(islice(iter(trainer.get_eval_dataloader(dataset)), 1))
    return {
        k: v for k, v in trainer._prepare_inputs(batch).items() if k in ("input_ids", "attention_mask", "position_ids")
    }


def _probes(ready: Ready) -> dict[str, torch.Tensor]:
    return {k: v.cpu() for k, v in _one_batch(ready.trainer).items() if k in ("input_ids", "attention_mask")}


def _metrics(trainer: SFTTrainer, before: dict[str, float]) -> dict[str, float]:
    found = {
        "train_loss": next(
            (h["train_loss"] for h in reversed(trainer.state.log_history) if "train_loss" in h), float("nan")
        )
    }
    if trainer.eval_dataset is not None:
        found["eval_loss"] = float(trainer.evaluate()["eval_loss"])
        if "eval_loss" in before:
            found["eval_loss_before"] = float(before["eval_loss"])
    if trainer.state.best_metric is not None:
        found["best_eval_loss"] = float(trainer.state.best_metric)
    return {**found, "steps": float(trainer.state.global_step)}


def _describe(
    job: Job,
    ready: Ready,
    metrics: dict[str, float],
    report: ExportReport | None,
    verified: bool,
    seconds: dict[str, float],
) -> None:
    card = Card(
        base=job.model,
        revision=job.revision,
        method=job.recipe.name,
        options=_options(job),
        data={"rows": ready.rows, "fingerprint": ready.fingerprint},
        learning_rate=job.training.learning_rate,
        lr_source=job.training.lr_source,
        metrics=metrics,
        export=report,
        verified=verified,
        source=job.source,
    )
    write_card(job.output, card)
    write_run(job.output, card, seconds=seconds)


def _options(job: Job) -> dict[str, Any]:
    if isinstance(job.recipe, Full):
        return {}
    r = job.recipe
    return {"rank": r.r, "alpha": r.alpha, "scale": r.scale(r.alpha, r.r), "dropout": r.dropout, "seed": r.seed}


class LogCallback(TrainerCallback):
    """log.jsonl, one line per log, and progress; a non-finite loss ends the run."""

    def __init__(self, path: Path, keep: bool, progress: Progress | None) -> None:
        self.path, self.keep, self.progress = path, keep, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self.keep:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        loss = logs.get("loss")
        if loss is not None and not abs(loss) < float("inf"):
            raise WorkFailed(f"the loss is {loss} at step {state.global_step}: lower the learning rate")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress("train", state.global_step, state.max_steps)
