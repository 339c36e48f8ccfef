"""One worker's resident process: the base is loaded and the data tokenised once, then trial follows trial.

Each trial is a Hugging Face Trainer with `attach`; the base weights are put back bit by bit before every trial, so a
trial's outcome depends on (spec, arm, rate, seed) alone and not on what ran before.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from loralign.compare.spec import Arm, Outcome, Spec, Trial
from loralign.compare.tasks import Prepared, prepare_task
from loralign.sites import factors, peft_config, sites, target_weights
from loralign.train.attach import attach
from loralign.types import Full, WorkFailed

log = logging.getLogger("loralign")
Report = Callable[[int, float], bool]
"""report(step, loss) -> True when the trial should be given up."""


class Resident:
    """The state that trials share."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.task: Prepared = prepare_task(spec, self.device)
        self.pristine = {k: v.detach().clone() for k, v in self.task.model.state_dict().items()}
        self.ended = time.perf_counter()

    def run(self, trial: Trial, report: Report) -> Outcome:
        """Train one arm at one rate on one seed; divergence is an outcome, not an error."""
        arm = next(a for a in self.spec.arms if a.name == trial.arm)
        previous, started = self.ended, time.perf_counter()
        self._reset(trial.seed)
        watch = Watch(started, report)
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            try:
                trainer, init_tokens = self._trainer(arm, trial, folder, watch)
                trainer.remove_callback(PrinterCallback)
                watch.init_s = time.perf_counter() - started
                trainer.train()
            except (WorkFailed, torch.linalg.LinAlgError) as error:
                watch.diverged, watch.note, init_tokens = True, str(error), 0
        outcome = self._outcome(trial, watch, init_tokens, started, started - previous)
        self._unload()
        self.ended = time.perf_counter()
        return outcome

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _reset(self, seed: int) -> None:
        set_seed(seed)
        self.task.model.load_state_dict(self.pristine)
        self.task.fresh_head(seed)
        self.task.model.requires_grad_(True)
        self.adapted: Any = self.task.model

    def _trainer(self, arm: Arm, trial: Trial, folder: str, watch: Watch) -> tuple[Trainer, int]:
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
            report_to=[],
            bf16=self.device == "cuda" and spec.autocast,
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device == "cuda",
            disable_tqdm=True,
            seed=trial.seed,
            data_seed=trial.seed,
            remove_unused_columns=False,
        )
        rows = self.task.test if trial.phase == "seed" else self.task.valid
        common: dict[str, Any] = {"args": args, "train_dataset": self.task.train, "eval_dataset": rows}
        common |= {"data_collator": self.task.collate, "compute_metrics": self.task.metrics, "callbacks": [watch]}
        if isinstance(arm.recipe, Full):
            return self._full(arm.recipe, trial, common), 0
        recipe = replace(arm.recipe, seed=trial.seed)
        self.adapted = get_peft_model(model, peft_config(recipe, model))
        trainer = Trainer(model=self.adapted, **common)
        return trainer, attach(trainer, recipe, rest_lr=spec.task.head_lr).spent.tokens

    def _full(self, reference: Full, trial: Trial, common: dict[str, Any]) -> Trainer:
        model = self.task.model
        wanted = {id(p) for p in target_weights(model, reference).values()}
        head = {id(p) for p in self.task.head_parameters()}
        groups = {trial.lr: [p for p in model.parameters() if id(p) in wanted and id(p) not in head]}
        for p in model.parameters():
            p.requires_grad_(id(p) in wanted | head)
        options: list[dict[str, Any]] = [{"params": ps, "lr": lr} for lr, ps in groups.items()]
        if head:
            options.append({"params": self.task.head_parameters(), "lr": self.spec.task.head_lr})
        common["args"].max_grad_norm = reference.max_grad_norm
        decay = reference.weight_decay
        trainer = Trainer(model=model, **common)
        trainer.optimizer_cls_and_kwargs = (
            lambda: lambda *_, **__: torch.optim.AdamW(options, trial.lr, weight_decay=decay, fused=True),
            {},
        )
        return trainer

    def _outcome(self, trial: Trial, watch: Watch, init_tokens: int, started: float, between: float) -> Outcome:
        now = time.perf_counter()
        trained = [p for p in self.adapted.parameters() if p.requires_grad]
        is_adapter = self.adapted is not self.task.model
        return Outcome(
            steps=tuple(watch.steps),
            seconds=tuple(watch.seconds),
            losses=tuple(watch.losses),
            metrics=dict(watch.metrics),
            diverged=watch.diverged or not watch.losses or not all(abs(x) < float("inf") for x in watch.losses),
            pruned=watch.pruned,
            init_s=watch.init_s,
            init_tokens=init_tokens,
            step_s=watch.step_s,
            total_s=now - started,
            between_s=between + watch.init_s,
            peak_bytes=torch.cuda.max_memory_allocated() if self.device == "cuda" else 0,
            trainable=sum(p.numel() for p in trained),
            rank=max((factors(s)[0].shape[0] for s in sites(self.adapted)), default=0) if is_adapter else 0,
            note=watch.note,
        )

    def _unload(self) -> None:
        if self.adapted is not self.task.model:
            self.adapted.unload()
        for p in self.task.model.parameters():
            p.grad = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


_NOT_METRICS = frozenset(
    {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    | {"epoch", "eval_num_input_tokens_seen"}
)


class Watch(TrainerCallback):
    """Collects the curve; the clock stops while rows are evaluated."""

    def __init__(self, started: float, report: Report) -> None:
        self.started, self.report = started, report
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.diverged = self.pruned = False
        self.init_s = self.step_s = self.paused = 0.0
        self.note = ""
        self._step_end = self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_end = time.perf_counter()
        taken = self._step_end - self._begin
        self.step_s += (taken - self.step_s) / max(1, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = float(metrics["eval_loss"])
        self.steps.append(state.global_step)
        self.seconds.append(self._step_end - self.started - self.paused)
        self.losses.append(loss)
        self.metrics = {k.removeprefix("eval_"): float(v) for k, v in metrics.items() if k not in _NOT_METRICS}
        self.paused += time.perf_counter() - self._step_end
        if not abs(loss) < float("inf"):
            self.diverged, self.note = True, f"loss {loss} at step {state.global_step}"
            control.should_training_stop = True
        elif self.report(state.global_step, loss):
            self.pruned = control.should_training_stop = True
