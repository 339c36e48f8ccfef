"""`loralign tasks`: rows of text with a class each, as files, become tasks and a classifier that learns them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loralign.data.read import read_rows
from loralign.evidence import Progress
from loralign.maths.draws import keyed_generator
from loralign.train.model import described_classifier, load_classifier, loading, read_tokenizer, row_length
from loralign.train.task_rows import Task
from loralign.train.task_trainer import TaskTraining
from loralign.train.tasks import TaskResult, run_tasks
from loralign.types import LoralignError, Recipe

log = logging.getLogger("loralign")

Texts = list[tuple[str, str]]
"""(text, class)."""
USUAL_LENGTH = 128
"""Tokens per row, where nobody says how many."""


@dataclass(frozen=True)
class TextRows:
    """Rows of a task, or of all of them. test: a file, or the share of each class to hold out."""

    name: str
    train: str
    test: str | float


@dataclass(frozen=True)
class TextTasks:
    """A run of `loralign tasks`. split: of one file, labels of each task or how many it has; (): a file per task."""

    model: str
    recipe: Recipe
    training: TaskTraining
    output: Path
    files: tuple[TextRows, ...]
    split: tuple[tuple[str, ...] | int, ...] = ()
    text: str = "text"
    label: str = "label"
    max_length: int | None = None
    """Tokens per row. None: USUAL_LENGTH, or the model's positions where fewer."""
    joint: bool = False
    revision: str | None = None


def run_text(job: TextTasks, *, resume: bool = False, progress: Progress | None = None) -> TaskResult:
    """Read, train, measure, export and verify; `run_tasks` says what comes out."""
    named = read_tasks(job)
    labels = [label for _, labels, _, _ in named for label in labels]
    model, tokenizer, most = _load(job, len(labels))
    at = {label: k for k, label in enumerate(labels)}

    def rows(texts: Texts) -> list[dict[str, Any]]:
        whole = tokenizer([text for text, _ in texts], verbose=False).input_ids
        if long := sum(len(ids) > most for ids in whole):
            log.warning("%d of %d rows are longer than `data.max_length` %d and were cut", long, len(whole), most)
        ids = tokenizer([text for text, _ in texts], truncation=True, max_length=most).input_ids
        return [{"input_ids": torch.tensor(i), "labels": at[c]} for i, (_, c) in zip(ids, texts, strict=True)]

    def collate(batch: list[Any]) -> Mapping[str, Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        pad = tokenizer.pad_token_id or 0
        ids = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in batch], batch_first=True, padding_value=pad)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}

    tasks = [Task(name, rows(train), rows(test)) for name, _, train, test in named]
    return run_tasks(
        model, job.recipe, tasks, job.training, job.output, collate=collate, joint=job.joint, resume=resume,
        base=job.model, revision=job.revision, progress=progress, labels=labels,
        data={"tokens per row at most": most},
    )  # fmt: skip


def _load(job: TextTasks, classes: int) -> tuple[PreTrainedModel, Any, int]:
    """The model, its tokenizer, and tokens of a row at most."""
    folder = Path(job.model).expanduser()
    where = str(folder) if folder.is_dir() else job.model
    with loading(job.model, "a text classifier"):
        tokenizer = read_tokenizer(where, revision=job.revision)
        meta = described_classifier(where, revision=job.revision)
        most = row_length(meta, job.model, job.max_length, "data.max_length", USUAL_LENGTH)
        model, _, lacking = load_classifier(where, classes, job.revision)
        if lacking:
            raise LoralignError(
                f"cannot load the model {job.model!r}: its files lack {lacking[0]}, which would be drawn at random and "
                "be in no adapter; take a base that has it"
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, most


# ---------------------------------------------------------------------------------------------------------------- rows


def read_tasks(job: TextTasks) -> list[tuple[str, list[str], Texts, Texts]]:
    """Per task its name, labels, training and test rows."""
    read = [(file.name, *_read(job, file)) for file in job.files]
    if not job.split:
        return [(name, sorted({c for _, c in train}), train, test) for name, train, test in read]
    ((_, train, test),) = read
    found = []
    for labels in _dealt(sorted({c for _, c in train}), job.split):
        rows = [[(text, c) for text, c in part if c in labels] for part in (train, test)]
        found.append((", ".join(labels), list(labels), *rows))
    return found  # type: ignore[return-value]


def _dealt(labels: Sequence[str], split: Sequence[tuple[str, ...] | int]) -> list[tuple[str, ...]]:
    """The labels of each task."""
    if any(isinstance(part, int) for part in split):
        sizes = [part for part in split if isinstance(part, int)]
        if sum(sizes) != len(labels):
            raise LoralignError(f"`split` has {sum(sizes)} labels, the rows {len(labels)}: {', '.join(labels)[:120]}")
        return [tuple(labels[sum(sizes[:k]) : sum(sizes[: k + 1])]) for k in range(len(sizes))]
    named = [part for part in split if not isinstance(part, int)]
    asked = [label for part in named for label in part]
    for label in asked:
        if label not in labels:
            raise LoralignError(f"`split` names {label!r}, a label of no row; there are {', '.join(labels)[:150]}")
        if asked.count(label) > 1:
            raise LoralignError(f"`split` names {label!r} twice: each label belongs to one task")
    if left := [label for label in labels if label not in asked]:
        log.warning("rows of %d labels are in no task: %s", len(left), ", ".join(left))
    return named


def _read(job: TextTasks, file: TextRows) -> tuple[Texts, Texts]:
    train = _texts(job, file.train)
    if isinstance(file.test, str):
        return train, _texts(job, file.test)
    kept: Texts = []
    held: Texts = []
    for c in sorted({c for _, c in train}):
        rows = [row for row in train if row[1] == c]
        count = max(1, round(file.test * len(rows)))
        if count >= len(rows):
            where = f"class {c!r} of {Path(file.train).name}"
            raise LoralignError(
                f"{where} has {len(rows)} rows, so none is left to train on: lower `test`, or name a file"
            )
        order = torch.randperm(len(rows), generator=keyed_generator(job.recipe.seed, "held out", 0, c)).tolist()
        held += [rows[i] for i in sorted(order[:count])]
        kept += [rows[i] for i in sorted(order[count:])]
    return kept, held


def _texts(job: TextTasks, file: str) -> Texts:
    found: Texts = []
    rows = read_rows(file, also=(job.text, job.label))
    for number, row in enumerate(rows, 1):
        for column in (job.text, job.label):
            if row.get(column) is None:
                raise LoralignError(
                    f"row {number} of {rows.name} has no {column!r} (it has {', '.join(sorted(row))[:80]}): name the "
                    "columns in `data.text` and `data.label`"
                )
        found.append((str(row[job.text]), str(row[job.label])))
    return found
