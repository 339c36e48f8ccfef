"""Class-incremental learning: one task after the other, each with its own classes and its own rows, none comes back.

    for every task: the schedule from its beginning, a fresh optimizer → train on its rows alone → accuracy on the test
    rows of every task seen → the adapter and the head of this moment → the outer loop's knot

One Trainer runs through all tasks, its rows laid out one task after the other, so checkpoints, resume and several
processes are those of every run. A recipe whose outer loop has links gets one per task (sd-lora: a direction for each);
one without trains a single adapter in sequence, the baseline. The head has all classes from the start; the loss sees
those of the row's own task (`mask: task`), decisions are among the classes seen so far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, default_data_collator, set_seed

from loralign.carrier.abilities import fresh_heads
from loralign.carrier.sites import put_in
from loralign.evidence import Progress
from loralign.io.card import Card
from loralign.io.content import tensors_print
from loralign.io.described import described
from loralign.io.export import base_name, export
from loralign.io.json_file import read_json
from loralign.io.lock import locked
from loralign.io.matrix import accuracy_picture
from loralign.io.provenance import remove_left, write_json
from loralign.train.accuracy import Scores, accuracies, scores
from loralign.train.attach import attach
from loralign.train.begun import check_output, check_settings, clear_way, note_beginning, resume_point
from loralign.train.callback import RecipeCallback
from loralign.train.checkpoint import step_of
from loralign.train.ending import check_moved, proven, train_to_the_end
from loralign.train.heads import draw_head, linears
from loralign.train.journal import Journal
from loralign.train.saves import reopen
from loralign.train.start import check_start
from loralign.train.task_rows import (
    Ordered,
    Task,
    check_choices,
    check_tasks,
    fingerprint,
    joined,
    masked_loss,
    visible,
)
from loralign.train.task_trainer import TasksTrainer, TaskTraining, arguments, by_task, settings, steps_of
from loralign.types import LoralignError, Recipe

log = logging.getLogger("loralign")

Collate = Callable[[list[Any]], Mapping[str, Tensor]]
MATRIX = "accuracy.json"


@dataclass(frozen=True)
class TaskResult:
    """matrix: accuracies by moment and task (`train/accuracy.py`). moments: folders of plain adapters with heads."""

    matrix: list[list[float]]
    scores: Scores
    moments: tuple[Path, ...]
    verified: bool


def run_tasks(
    model: PreTrainedModel,
    recipe: Recipe,
    tasks: Sequence[Task],
    training: TaskTraining,
    output: Path | str,
    *,
    collate: Collate = default_data_collator,
    joint: bool = False,
    resume: bool = False,
    export_moments: bool = True,
    base: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Train a classifier on tasks in sequence, measure after each, write results and plain adapters to `output`.

    Args:
        model: with a head of all classes, which is drawn afresh by the recipe's seed; it is adapted in place.
        collate: rows to a batch of the model's inputs and "labels".
        joint: all tasks at once, in as many steps: the upper bound.
        resume: go on from the last complete checkpoint in `output`; on a CPU the result is the same to the last bit.
        export_moments: write the plain adapter and head of every moment, verified where `base` is a folder or hub id.
        base: what to load for the verification; its name goes into the adapters.
        labels: names of the classes, for the results and the cards.
        data: what else these say of the rows.
    Raises:
        LoralignError: bad input, one sentence. VerificationFailed: a written adapter computes something else.
    """
    with locked(Path(output)):
        run = _Run(model, recipe, tasks, training, Path(output), collate, joint, labels, data or {})
        return run.go(resume, export_moments, base, revision, progress)


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        tasks: Sequence[Task],
        training: TaskTraining,
        output: Path,
        collate: Collate,
        joint: bool,
        labels: Sequence[str] | None,
        data: Mapping[str, Any],
    ) -> None:
        classes = int(model.config.num_labels)
        check_tasks(tasks, classes)
        self.parts = [joined(tasks)] if joint else list(tasks)
        allowed = visible(self.parts, classes, training.mask)
        check_choices(self.parts, allowed)
        self.labels = list(labels) if labels is not None else [str(c) for c in range(classes)]
        self.model, self.tasks, self.training, self.output, self.collate = model, list(tasks), training, output, collate
        self.data = dict(data)
        steps = [steps_of(len(task.train), training) for task in tasks]
        self.lengths = [sum(steps)] if joint else steps
        self.ends = [sum(self.lengths[: k + 1]) for k in range(len(self.lengths))]
        self.recipe = by_task(recipe, self.lengths)
        self.loss = masked_loss(allowed)
        self.matrix: list[list[float]] = []

    def seen(self, moment: int) -> list[Task]:
        """The tasks that moment `moment`, 0-based, is measured on."""
        return self.tasks if len(self.parts) == 1 else self.tasks[: moment + 1]

    def go(
        self,
        resume: bool,
        export_moments: bool,
        base: str | None,
        revision: str | None,
        progress: Progress | None,
    ) -> TaskResult:
        set_seed(self.recipe.seed)
        remove_left(self.output)
        point = resume_point(self.output) if resume else None
        if not resume:
            check_output(self.output)
        settings = self.settings()
        if point is not None:
            begun = check_settings(self.output, settings, [k for k in settings if k.startswith("task ")])
            clear_way(point, begun.run, 2)
            self.matrix = self._measured(step_of(point))
        trainer = self._trainer()
        callback = attach(
            trainer,
            self.recipe,
            resume_from=point,
            rest_lr=self.training.head_lr,
            rows=trainer.rows_of,
            progress=progress,
        )
        if point is None:
            check_start(trainer.model, self._inputs(self.parts[0].train[:2], trainer))
        write = (lambda moment: self._export(trainer, moment, base, revision)) if export_moments else None
        trainer.add_callback(_Moments(self, trainer, callback, write))
        trainer.add_callback(Journal(self.output / "log.jsonl", step_of(point) if point else None, progress))
        trainer.remove_callback(PrinterCallback)
        if point is None and trainer.is_world_process_zero():
            note_beginning(self.output, settings)
        train_to_the_end(trainer, point)
        check_moved(trainer, trainer.model, self.recipe, [])
        return self._finish(trainer, base if export_moments else None, export_moments)

    def settings(self) -> dict[str, str]:
        """What the result depends on."""
        rows = {f"task {t.name}": fingerprint(t.train) + fingerprint(t.test) for t in self.tasks}
        free = {
            k: v for k, v in asdict(self.training).items() if k not in ("lr_source", "save_every", "eval_batch_size")
        }
        recipe = dict(described(self.recipe))
        made = {**free, **recipe, "seed": self.recipe.seed, "joint": len(self.parts) == 1, "recipe": sorted(recipe)}
        return {**{k: repr(v) for k, v in made.items()}, **rows, "model": tensors_print(self.model)}

    def _trainer(self) -> TasksTrainer:
        t = self.training
        args = arguments(t, self.output / "checkpoints", self.ends[-1], self.recipe.seed)
        names = fresh_heads(self.model)
        if not names:
            raise LoralignError(f"{type(self.model).__name__} has no classification head: load it with one")
        draw_head(linears(self.model, names), self.recipe.seed)
        model = put_in(self.model, self.recipe)
        counts = [n * t.batch_size * args.world_size for n in self.lengths]
        order = Ordered([part.train for part in self.parts], counts, self.recipe.seed)
        trainer = TasksTrainer(
            model=model, args=args, train_dataset=order, data_collator=self.collate, compute_loss_func=self.loss
        )
        trainer.lengths, trainer.ends, trainer.course = self.lengths, self.ends, (t.schedule, t.warmup)
        if trainer.is_fsdp_enabled:
            raise LoralignError("tasks are measured and exported from whole weights, which FSDP splits: use DDP")
        return trainer

    # --------------------------------------------------------------------------------------------------------- moments

    def _inputs(self, rows: Sequence[Any], trainer: Any) -> dict[str, Tensor]:
        batch = trainer._prepare_inputs(dict(self.collate(list(rows))))
        return {k: v for k, v in batch.items() if k != "labels"}

    def measure(self, trainer: Any, model: Any, moment: int) -> list[float]:
        """Accuracy on every task seen, among the classes seen."""

        def logits(rows: Sequence[Any]) -> Tensor:
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                found: Tensor = model(**self._inputs(rows, trainer)).logits
            return found

        training = model.training
        model.eval()
        found = accuracies(self.seen(moment), logits, self.training.eval_batch_size)
        model.train(training)
        return found

    def note(self, moment: int, row: list[float]) -> None:
        self.matrix = [*self.matrix[:moment], row]
        write_json(self.output / MATRIX, {"ends": self.ends[: moment + 1], "matrix": self.matrix})

    def _measured(self, step: int) -> list[list[float]]:
        """Rows of moments up to a checkpoint."""
        done = sum(end <= step for end in self.ends)
        try:
            kept = read_json(self.output / MATRIX)["matrix"] if done else []
            rows = [[float(v) for v in row] for row in kept[:done]]
        except (OSError, ValueError, KeyError, TypeError):
            rows = []
        if len(rows) < done:
            raise LoralignError(f"{MATRIX} of {self.output.name} is missing or damaged: begin the run elsewhere")
        return rows

    def folder(self, moment: int) -> Path:
        return self.output / f"after-{moment + 1}"

    def _export(self, trainer: Any, moment: int, base: str | None, revision: str | None) -> None:
        done = [task.name for task in self.seen(moment)]
        classes = sorted(c for task in self.seen(moment) for c in task.classes)
        named = ", ".join(f"{c} = {self.labels[c]}" for c in classes)
        known = base or self.model.name_or_path
        name = base_name(trainer.model, base, revision)[0] if known else str(self.model.config.model_type)
        card = Card(
            name, method=self.recipe.name, options=settings(self.recipe, self.training),
            learning_rate=self.training.learning_rate, lr_source=self.training.lr_source,
            data={"tasks seen": ", ".join(done), "classes seen": named, **self.data},
            metrics={f"accuracy on {n}": a for n, a in zip(done, self.matrix[moment], strict=True)},
        )  # fmt: skip
        probes = self._inputs(self.parts[min(moment, len(self.parts) - 1)].train[:2], trainer)
        export(
            trainer.model, self.folder(moment), base_id=name, revision=revision, probes=probes, card=card,
            overwrite=True,
        )  # fmt: skip

    def _finish(self, trainer: Any, base: str | None, exported: bool) -> TaskResult:
        result = scores(self.matrix)
        moments = tuple(self.folder(k) for k in range(len(self.ends))) if exported else ()
        if not trainer.is_world_process_zero():
            return TaskResult(self.matrix, result, moments, False)
        verified = bool(base and moments) and proven(moments, str(base))
        names = [task.name for task in self.tasks]
        title = f"{self.recipe.name}: {100 * result.average:.1f} % at the end, forgetting {100 * result.forgetting:.1f}"
        accuracy_picture({"joint" if len(self.parts) == 1 and len(names) > 1 else "in sequence": self.matrix}, names,
                         self.output / "accuracy.png", title=title)  # fmt: skip
        facts_of: dict[str, Any] = {"method": self.recipe.name, "tasks": {t.name: list(t.classes) for t in self.tasks}}
        facts_of |= {"labels": self.labels, "data": self.data, "matrix": self.matrix}
        facts_of |= {**asdict(result), "verified": verified}
        write_json(self.output / "results.json", facts_of)
        return TaskResult(self.matrix, result, moments, verified)


class _Moments(TrainerCallback):
    """After every task, the knot being tied: measure, export, a fresh optimizer, a checkpoint."""

    def __init__(self, run: _Run, trainer: Any, recipe: RecipeCallback, write: Callable[[int], None] | None) -> None:
        self.run, self.trainer, self.recipe, self.write = run, trainer, recipe, write

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.run.ends:
            return
        moment = self.run.ends.index(state.global_step)
        row = self.run.measure(self.trainer, self.recipe.model, moment)
        if state.is_world_process_zero:
            self.run.note(moment, row)
            if self.write is not None:
                self.write(moment)
        self.run.matrix = [*self.run.matrix[:moment], row]
        said = ", ".join(f"{100 * a:.1f}" for a in row)
        log.info("after task %d: accuracy %s %%", moment + 1, said)
        if self.recipe.optimizer is not None:
            self.recipe.optimizer.state.clear()
        control.should_save = True
        reopen(args, state, control)
