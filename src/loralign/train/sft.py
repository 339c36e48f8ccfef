"""`loralign train`, task sft: TRL's SFTTrainer around a recipe, from rows to a verified plain adapter.

    load model and rows → insert the adapter → evidence → start (contract check 1) → train → export → verify → card

A run can be killed at any moment, also in the middle of a save: `resume` continues from the last complete checkpoint
and ends with the same bits on the CPU.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTTrainer

from loralign.carrier.abilities import towers
from loralign.carrier.masters import masters, rounded
from loralign.carrier.storage import will_be_split
from loralign.data.chat import Prompts
from loralign.data.mix import Part
from loralign.data.packing import check_packing
from loralign.data.split import fingerprint
from loralign.evidence import Progress
from loralign.evidence.subspace import check_sources
from loralign.io.card import Card
from loralign.io.content import file_print
from loralign.io.export import ExportReport, check_exportable, export
from loralign.io.folder import disk_full
from loralign.io.lock import locked
from loralign.io.provenance import remove_left
from loralign.io.verify import verify
from loralign.plan.quantised import section_of
from loralign.plan.recommended import check_passes
from loralign.train.arguments import arguments, check_schedule
from loralign.train.attach import attach
from loralign.train.begun import (
    check_output,
    check_unchanged,
    clear_way,
    note_beginning,
    resume_point,
    settings_and_model,
)
from loralign.train.checkpoint import step_of
from loralign.train.ending import Patience, check_moved, samples, train_to_the_end
from loralign.train.job import Job
from loralign.train.journal import Journal
from loralign.train.model import dtype_of, load
from loralign.train.quick import quicken
from loralign.train.rank_log import RankLog
from loralign.train.record import card_of, describe, metrics_of
from loralign.train.reference import save
from loralign.train.row_trainer import steps_of, trainer_of
from loralign.train.saves import CheckpointCallback, keep_some
from loralign.train.split import check_base, check_split, whole_model
from loralign.train.start import check_start
from loralign.train.tokens import measured, name_ends, place, tokens
from loralign.train.validation import apart, batches
from loralign.types import CommonSubspace, Full, LoralignError, Recipe, WorkFailed

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
    """A trainer that only needs `train()`. job: with nothing left open that the model decides."""

    job: Job
    trainer: SFTTrainer
    tokenizer: PreTrainedTokenizerBase
    journal: Journal
    prompts: Prompts
    read: tuple[tuple[Part, str], ...]
    """What was taken of each source of the rows, and the hash of its content."""
    fingerprints: dict[str, str]
    resume_from: Path | None
    init_seconds: float
    before: list[torch.Tensor]
    """Samples of what trains, where it does not start at zero."""
    dtypes: dict[str, torch.dtype]
    """Of the matrices that full fine-tuning keeps as fp32 masters."""

    @property
    def own_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, where it is not the base's as it was: it belongs beside the adapter."""
        return self.tokenizer if self.prompts.given else None

    @property
    def rows(self) -> tuple[int, int]:
        """For training and held out."""
        return len(self.trainer.train_dataset), len(self.trainer.eval_dataset or ())

    def card(self) -> Card:
        """What is known before the first step."""
        return card_of(self.job, self.rows, self.read, self.fingerprints["data.train"], self.prompts)


def run(job: Job, *, resume: bool = False, progress: Progress | None = None) -> Result:
    """Train, export and verify one job; see the module.

    Raises:
        LoralignError: bad input, one sentence with the mend; nothing that exists is damaged.
        WorkFailed: the run diverged or the disk is full; checkpoints stay usable.
        VerificationFailed: the written adapter does not compute what was trained.
    """
    with locked(job.output):
        return _run(job, resume=resume, progress=progress)


def _run(job: Job, *, resume: bool, progress: Progress | None) -> Result:
    ready = prepare(job, resume=resume, progress=progress)
    job, trainer, started = ready.job, ready.trainer, time.perf_counter()
    try:
        if ready.resume_from is None and trainer.is_world_process_zero():
            note_beginning(job.output, settings_and_model(job, ready.fingerprints))
        if isinstance(job.recipe, Recipe):
            keep_some(trainer.args, steps_of(trainer))
        train_to_the_end(trainer, ready.resume_from)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not disk_full(error):
            raise
        raise WorkFailed(f"writing failed ({disk_full(error)}): free some space, then --resume") from error
    trained = time.perf_counter()
    if isinstance(job.recipe, Full):
        rounded(trainer.model, job.recipe, ready.dtypes)
    metrics = metrics_of(trainer, ready.journal.loss_before)
    probes = _probes(ready)
    with whole_model(trainer, job, probes) as model:
        if model is not None:
            check_moved(trainer, model, job.recipe, ready.before)
        if not trainer.is_world_process_zero():  # of several processes the first one writes
            return Result(job.output, metrics, None, False, {"init": ready.init_seconds, "train": trained - started})
        report, verified = _written(ready, model, probes)
    seconds = {"init": ready.init_seconds, "train": trained - started, "export": time.perf_counter() - trained}
    card = replace(ready.card(), metrics=metrics, export=report, verified=verified)
    describe(job.output, card, seconds)
    return Result(job.output, metrics, report, verified is True, seconds)


def _written(ready: Ready, model: Any, probes: dict[str, torch.Tensor]) -> tuple[ExportReport | None, bool | str]:
    """Export and its proof; full fine-tuning writes a model."""
    job = ready.job
    if isinstance(job.recipe, Full):
        save(model, ready.tokenizer, job.output)
        return None, False
    report = export(
        model, job.output, base_id=job.model, revision=job.revision, probes=probes,
        tokenizer=ready.own_tokenizer, overwrite=True,
    )  # fmt: skip
    proof = verify(job.output, base=job.model)
    verified = proof.passed and (proof.proven or proof.line())
    if verified is not True:
        log.warning("%s", verified)
    return report, verified


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
    card = replace(ready.card(), trained=False)
    export(
        ready.trainer.model, job.output, base_id=job.model, revision=job.revision, probes=_probes(ready), card=card,
        tokenizer=ready.own_tokenizer, overwrite=True,
    )  # fmt: skip
    shutil.rmtree(job.output / "checkpoints", ignore_errors=True)  # the trainer's, which never trains
    return measured


def _check_sources(recipe: Recipe | Full) -> None:
    """Of a common subspace; before the model is loaded."""
    if isinstance(recipe, Recipe) and isinstance(recipe.init.needs, CommonSubspace):
        check_sources(recipe.init.needs.sources, recipe.init.needs.base)


def prepare(job: Job, *, resume: bool, progress: Progress | None) -> Ready:
    """Everything up to the first training step."""
    set_seed(job.seed)
    remove_left(job.output)
    resume_from = resume_point(job.output) if resume else None
    if not resume:
        check_output(job.output)
    if resume_from is None:
        _check_sources(job.recipe)
    job, described = measured(job)
    dtype = dtype_of(job.training.precision)
    check_base(section_of(job.quantize, job.model, described.config, dtype), will_be_split())
    args = arguments(job, resumed=resume_from is not None)
    model, tokenizer = load(job.model, precision=job.training.precision, quantize=job.quantize, **place(job))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU (torch sees no GPU)"
    how = f", linear layers quantised while it was loaded: {job.quantize}" if job.quantize else ""
    log.info("on %s, base in %s%s", device, str(model.dtype).removeprefix("torch."), how)
    recipe = without_towers(job.recipe, model)
    if job.data.packing:
        check_packing(model)
    made = tokens(job, tokenizer, model)
    held_out, prompts = None if made.held_out is None else made.held_out.dataset, made.train.prompts
    train, deciding = apart(made.train.dataset, recipe)
    read = tuple((part, file_print(part.source.name)) for part in made.parts)
    name_ends(model, tokenizer, prompts)
    if args.max_steps < 0:
        check_schedule(args, max(1, math.ceil(len(train) * args.num_train_epochs / job.training.batch_size)))
    rows = {"data.train": fingerprint(train)} | ({} if held_out is None else {"data.eval": fingerprint(held_out)})
    if resume_from is not None:
        clear_way(resume_from, check_unchanged(job, rows).run, job.training.keep)
    journal = Journal(job.output / "log.jsonl", step_of(resume_from) if resume_from else None, progress)
    started = time.perf_counter()
    dtypes = masters(model, recipe) if isinstance(recipe, Full) else {}

    trainer = trainer_of(replace(job, recipe=recipe), model, tokenizer, args, train, held_out)
    check_split(trainer, job.recipe)
    if job.once and args.max_steps > 0:
        a_step = job.training.batch_size * args.world_size
        check_passes(args.max_steps / max(1, math.ceil(len(trainer.train_dataset) / a_step)))  # the last may be smaller
    if isinstance(recipe, Recipe):
        check_exportable(trainer.model)
        size, device = trainer.args.per_device_train_batch_size, trainer.args.device
        judges = None if deciding is None else batches(deciding, trainer.data_collator, size, device)
        callback = attach(
            trainer, recipe, resume_from=resume_from, cache=job.cache, progress=progress, validation=judges
        )
        journal.note_evidence(callback.evidence)
        trainer.add_callback(RankLog(callback, job.output, step_of(resume_from) if resume_from else None))
        if resume_from is None and not trainer.is_fsdp_enabled:  # no process may have room for the whole model
            check_start(
                trainer.model,
                _one_batch(trainer),
                tolerance=1e-6 if dtype == torch.float32 else 1e-2,
            )
    else:
        trainer.add_callback(CheckpointCallback(recipe.name, resume_from, args.save_total_limit))
        trainer.args.save_total_limit = None
    trainer.add_callback(journal)
    if job.training.patience is not None:
        trainer.add_callback(Patience(job.training.patience))
    trainer.remove_callback(PrinterCallback)
    if job.training.compile == "auto":
        quicken(trainer, packing=job.data.packing, seed=job.seed)
    seconds = time.perf_counter() - started
    start = samples(trainer.model, recipe)
    return Ready(job, trainer, tokenizer, journal, prompts, read, rows, resume_from, seconds, start, dtypes)


def without_towers(recipe: Recipe | Full, model: PreTrainedModel) -> Recipe | Full:
    """The recipe for rows of text, which never reach the image or audio towers of a model that has some."""
    apart = towers(model)
    if apart:
        log.info("rows of text do not reach %s: left as they are", ", ".join(apart))
    return replace(recipe, exclude=tuple(dict.fromkeys((*recipe.exclude, *apart))))


def _one_batch(trainer: SFTTrainer) -> dict[str, Any]:
    """The first two rows of training as a batch; the global generators are left as they were."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(min(2, len(trainer.train_dataset)))])
    return {
        k: v for k, v in trainer._prepare_inputs(batch).items() if k in ("input_ids", "attention_mask", "position_ids")
    }


def _probes(ready: Ready) -> dict[str, torch.Tensor]:
    return {k: v.cpu() for k, v in _one_batch(ready.trainer).items() if k in ("input_ids", "attention_mask")}
