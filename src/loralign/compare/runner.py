"""One worker's resident process: the base is loaded and the data tokenised once, then trial follows trial.

Each trial is a Hugging Face Trainer with `attach`; what a trial may change is put back bit by bit before the next, so a
trial's outcome depends on (spec, arm, rate, seed) alone and not on what ran before.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from loralign.carrier.sites import factors, put_in, sites, target_weights
from loralign.compare.captured import CapturedTrainer
from loralign.compare.compiled import compiled, warm
from loralign.compare.spec import Arm, Outcome, Spec, Trial
from loralign.compare.study import warn_of_idle_arms
from loralign.compare.tasks import Prepared, Rows, prepare_task
from loralign.compare.watch import Report, Watch
from loralign.plan.combinations import check_ranks
from loralign.train.attach import attach
from loralign.train.recorder import Record, cuda_graph
from loralign.train.validation import apart, batches
from loralign.types import Full, LoralignError, Recipe, Validation, WorkFailed

log = logging.getLogger("loralign")


class Resident:
    """The state that trials share.

    A GPU replays recorded steps (`captured.py`), of compiled blocks with `spec.compile` (`compiled.py`); a CPU runs
    them as they are.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.compile = spec.compile and self.device == "cuda"
        self.record: Record | None = cuda_graph if spec.capture and self.device == "cuda" else None
        if self.device == "cpu":
            torch.set_num_threads(spec.cpu_threads)
        self.task: Prepared = prepare_task(spec, self.device)
        self.adapted: Any = self.task.model
        self._check_arms()
        self.pristine = self._pristine()
        self.known: set[str] = set()
        """Arms whose blocks are compiled."""
        self.teardown_s = 0.0

    def run(self, trial: Trial, report: Report) -> Outcome:
        """Train one arm at one rate on one seed; divergence is an outcome, not an error."""
        arm = next(a for a in self.spec.arms if a.name == trial.arm)
        started = time.perf_counter()
        self._reset(trial.seed)
        watch = Watch(started, report, self.device == "cuda")
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._train(arm, trial, folder, watch)
            return self._outcome(watch, started)
        except LoralignError as error:
            raise type(error)(f"arm {arm.name!r} at {trial.lr:g}: {error}") from error
        finally:
            ended = time.perf_counter()
            self._unload()
            self.teardown_s = time.perf_counter() - ended

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _check_arms(self) -> None:
        """Every arm fits the model and the steps: found before the first trial of any."""
        left = {}
        for arm in self.spec.arms:
            if isinstance(arm.recipe, Recipe):
                adapted = put_in(self.task.model, arm.recipe)
                try:
                    check_ranks(arm.recipe, sites(adapted))
                    left[arm.name] = self._left(arm.recipe, adapted)
                except LoralignError as error:
                    raise LoralignError(f"arm {arm.name!r}: {error}") from error
                finally:
                    adapted.unload()
        warn_of_idle_arms(self.spec, left)

    def _left(self, recipe: Recipe, adapted: nn.Module) -> int:
        """The steps that what the start reads, and what a rule judges by, leave at most; some, or this raises."""
        rows = recipe.init.needs.draws * self.spec.micro_batch_size
        tokens = round(rows * self.task.tokens_per_row) + self._judged(recipe, adapted)
        left = left_after(tokens, self.task.tokens_per_row * self.spec.batch_size, self.spec)
        apart(self.task.train, recipe)
        return left

    def _pristine(self) -> dict[str, Tensor]:
        """On the host: what some trial changes, which is the head and what full fine-tuning trains."""
        changed = {id(p) for p in self.task.head_parameters()}
        for recipe in (arm.recipe for arm in self.spec.arms):
            if isinstance(recipe, Full):
                changed |= {id(p) for p in target_weights(self.task.model, recipe).values()}
        kept = {n: p for n, p in self.task.model.named_parameters() if id(p) in changed}
        return {n: t.detach().to("cpu", copy=True) for n, t in (*kept.items(), *self.task.model.named_buffers())}

    @torch.no_grad()
    def _reset(self, seed: int) -> None:
        set_seed(seed)
        self.adapted = model = self.task.model
        present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in self.pristine.items():
            present[name].copy_(value)
        self.task.fresh_head(seed)
        model.requires_grad_(True)

    def _train(self, arm: Arm, trial: Trial, folder: str, watch: Watch) -> None:
        """What fails because numbers ran away is marked on `watch`; every other failure is raised."""
        try:
            trainer, watch.init_tokens = self._trainer(arm, trial, folder, watch)
        except WorkFailed as error:
            if trial.phase == "rate":  # whatever the rate: an error of the arm
                raise
            watch.diverged, watch.note = True, str(error)
            return
        trainer.remove_callback(PrinterCallback)
        watch.init_s = time.perf_counter() - watch.started
        try:
            with compiled(self.task.model) if self.compile else nullcontext():
                if self.record:
                    trainer.record_steps(self.adapted, self.record)
                if self.compile and arm.name not in self.known:
                    self._warm(trainer, trial)
                    self.known.add(arm.name)
                    watch.warm_s = watch.paused = time.perf_counter() - watch.started - watch.init_s
                trainer.train()
        except (WorkFailed, torch.linalg.LinAlgError) as error:
            if isinstance(error, WorkFailed) and self._finite():
                raise
            watch.diverged, watch.note = True, str(error)

    def _warm(self, trainer: CapturedTrainer, trial: Trial) -> None:
        """Compile for a whole batch that is learnt and one that is held out; smaller ones run as they are."""
        size, held_out, collate = self.spec.micro_batch_size, self._held_out(trial), self.task.collate
        seen = collate(list(held_out[:size])) if len(held_out) >= size else None
        warm(trainer, self.adapted, collate(list(self.task.train[:size])), seen)

    def _finite(self) -> bool:
        trained = [p for p in self.adapted.parameters() if p.requires_grad]
        tensors = [t for p in trained for t in (p, p.grad) if t is not None]
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    def _trainer(self, arm: Arm, trial: Trial, folder: str, watch: Watch) -> tuple[CapturedTrainer, int]:
        spec, model = self.spec, self.task.model
        args = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.micro_batch_size,
            per_device_eval_batch_size=spec.micro_batch_size,
            gradient_accumulation_steps=spec.batch_size // spec.micro_batch_size,
            learning_rate=trial.lr,
            lr_scheduler_type=spec.schedule,
            warmup_steps=spec.warmup,
            eval_strategy="steps",
            eval_steps=spec.eval_every,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would read every step's loss; what diverged is found by its evaluations
            report_to=[],
            bf16=self.device == "cuda" and spec.autocast,
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device == "cuda",
            accelerator_config={"non_blocking": self.device == "cuda"},  # else every batch waits for the step before
            disable_tqdm=True,
            seed=trial.seed,
            data_seed=trial.seed,
            remove_unused_columns=False,
        )
        args._n_gpu = min(1, args.n_gpu)  # one trial, one GPU; the Trainer would spread it over all that it sees
        common: dict[str, Any] = {"args": args, "train_dataset": self.task.train, "eval_dataset": self._held_out(trial)}
        common |= {"data_collator": self.task.collate, "compute_metrics": self.task.metrics, "callbacks": [watch]}
        if isinstance(arm.recipe, Full):
            return self._full(arm.recipe, trial, common), 0
        recipe = replace(arm.recipe, seed=trial.seed)
        self.adapted = put_in(model, recipe)
        rows, deciding = apart(self.task.train, recipe)
        trainer = CapturedTrainer(model=self.adapted, **{**common, "train_dataset": rows})
        judges = None
        if deciding is not None:
            judges = batches(deciding, self.task.collate, spec.micro_batch_size, args.device)
        attached = attach(trainer, recipe, rest_lr=spec.task.head_lr, validation=judges)
        watch.run = attached
        tokens = attached.spent.tokens + self._judged(recipe, self.adapted)
        args.max_steps = left_after(tokens, self.task.tokens_per_row * spec.batch_size, spec)
        return trainer, tokens

    def _judged(self, recipe: Recipe, adapted: nn.Module) -> int:
        """Tokens of a rule's own validation rows: of a forward alone half, since a step has a backward as long."""
        slots = sum(site.r for site in sites(adapted))
        return sum(
            round(rule.facts.forwards(slots) * rule.needs.rows * self.task.tokens_per_row / 2)
            for rule in recipe.rules
            if isinstance(rule.needs, Validation) and rule.facts.forwards
        )

    def _held_out(self, trial: Trial) -> Rows:
        """Test rows for what is reported, validation rows for what is chosen."""
        return self.task.test if trial.phase == "seed" else self.task.valid

    def _full(self, reference: Full, trial: Trial, common: dict[str, Any]) -> CapturedTrainer:
        model = self.task.model
        wanted = {id(p) for p in target_weights(model, reference).values()}
        head = {id(p) for p in self.task.head_parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in wanted | head)
        decay = reference.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if id(p) in wanted - head], "lr": trial.lr},
            *({"params": [p], "lr": self.spec.task.head_lr, "weight_decay": decay * (p.dim() > 1)}
              for p in self.task.head_parameters()),
        ]  # fmt: skip
        common["args"].max_grad_norm = reference.max_grad_norm
        trainer = CapturedTrainer(model=model, **common)
        trainer.optimizer_cls_and_kwargs = (
            lambda: lambda *_, **__: (reference.optimizer or adamw)(groups, trial.lr, decay),
            {},
        )
        return trainer

    def _outcome(self, watch: Watch, started: float) -> Outcome:
        cuda, adapted = self.device == "cuda", watch.run is not None and not watch.diverged
        exported = {s.name: int(factors(s)[0].shape[0]) for s in sites(self.adapted)} if adapted else {}
        slots = watch.slots() if adapted else None
        return Outcome(
            steps=tuple(watch.steps),
            seconds=tuple(watch.seconds),
            losses=tuple(watch.losses),
            metrics=dict(watch.metrics),
            diverged=watch.diverged or not watch.losses,
            pruned=watch.pruned,
            init_s=watch.init_s,
            init_tokens=watch.init_tokens,
            step_tokens=self.task.tokens_per_row * self.spec.batch_size,
            step_s=watch.step_s,
            total_s=time.perf_counter() - started,
            between_s=self.teardown_s + watch.begun - started,
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
            trainable=sum(p.numel() for p in self.adapted.parameters() if p.requires_grad),
            rank=max(exported.values(), default=0),
            ranks=(slots[1] if slots else exported) or None,
            begun_slots=slots[0] if slots else None,
            device=torch.cuda.get_device_name() if cuda else "cpu",
            note=watch.note or (watch.run.summary() if watch.run else ""),
        )

    def _unload(self) -> None:
        if self.adapted is not self.task.model:
            self.adapted.unload()
            self.adapted = self.task.model
        for p in self.task.model.parameters():
            p.grad = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def left_after(tokens: int, step_tokens: float, spec: Spec) -> int:
    """Steps that a start leaves of a trial: steps − ⌈tokens / step_tokens⌉ where they are charged as steps."""
    left = spec.steps - math.ceil(tokens / step_tokens) if spec.charge == "steps" else spec.steps
    if left < 1:
        raise LoralignError(
            f"its start and rules read as many tokens as {tokens / step_tokens:.0f} steps, the trial has {spec.steps}: "
            "raise `train.steps`, or set `train.charge: none`"
        )
    return left


def adamw(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Full fine-tuning's usual optimizer."""
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=True)
