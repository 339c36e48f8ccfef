"""What a study trains on: a base model in memory, tokenised rows in three splits, a collator, a metric, a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralign.compare.spec import Spec
from loralign.data.chat import IGNORED, fit
from loralign.data.read import read_rows
from loralign.data.rows import named, read_trl
from loralign.train.heads import draw_head, linears
from loralign.train.model import (
    check_length,
    described,
    described_classifier,
    load,
    load_classifier,
    loading,
    read_tokenizer,
)
from loralign.types import LoralignError

Rows = list[dict[str, Any]]


@dataclass
class Prepared:
    """A task in memory. head: modules that are drawn afresh for every seed, or none."""

    model: PreTrainedModel
    train: Rows
    valid: Rows
    test: Rows
    collate: Callable[[Rows], dict[str, Tensor]]
    metrics: Callable[[Any], dict[str, float]] | None
    head: tuple[str, ...] = ()

    @property
    def tokens_per_row(self) -> float:
        """Mean over the training rows, padding not counted: the unit in which starts and steps are charged."""
        return sum(len(row["input_ids"]) for row in self.train) / len(self.train)

    def head_modules(self) -> list[nn.Linear]:
        return linears(self.model, self.head)

    def head_parameters(self) -> list[nn.Parameter]:
        return [p for m in self.head_modules() for p in m.parameters()]

    def fresh_head(self, seed: int) -> None:
        """Every arm starts a seed with the same head."""
        draw_head(self.head_modules(), seed)


def prepare_task(spec: Spec, device: str) -> Prepared:
    """Load the base in fp32 and tokenise the three splits."""
    kinds: dict[str, Callable[[Spec, str], Prepared]] = {"text": _text, "classify": _classify, "sft": _sft}
    made = kinds[spec.task.kind](spec, device)
    if len(made.train) < spec.batch_size:
        what = f"blocks of {spec.task.length} tokens" if spec.task.kind == "text" else "rows"
        raise LoralignError(
            f"`task.train` makes {len(made.train)} {what}, less than one step of {spec.batch_size}: give more rows, or "
            "lower `train.batch_size`"
        )
    return made


def rows_with(path: str, needed: Sequence[str], columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of a file, which all have these columns, `text` among them. columns: our names to those in the file."""
    columns = columns or {}
    rows = named(read_rows(path, also=(*needed, *columns.values())), columns, needed)
    for number, row in enumerate(rows, 1):
        if missing := [c for c in needed if row.get(c) is None]:
            has = ", ".join(sorted(row))[:80]
            raise LoralignError(
                f"row {number} of {rows.name} has no {missing[0]!r} (it has {has}): add the column, or say which it is "
                f"in `task.columns`"
            )
        if not isinstance(row["text"], str):
            kind = type(row["text"]).__name__
            raise LoralignError(f"`text` in row {number} of {rows.name} is no text but {kind}: put it in quotes")
    return list(rows)


def _text(spec: Spec, device: str) -> Prepared:
    model, tokenizer = _causal(spec, device)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def blocks(path: str) -> Rows:
        rows = rows_with(path, ["text"], spec.task.columns)
        ids = [t for row in rows for t in [*tokenizer(row["text"]).input_ids, *end]]
        n = spec.task.length
        cut = [torch.tensor(ids[i : i + n]) for i in range(0, len(ids) - n + 1, n)]
        if not cut:
            raise LoralignError(f"{Path(path).name} holds less than one block of {n} tokens: lower `length`")
        return [{"input_ids": block, "labels": block} for block in cut]

    # Transformers makes no mask for such rows, but one while a step is recorded, which would be compiled then
    given = spec.compile and spec.capture and device == "cuda"
    mask = torch.ones((spec.task.length,) * 2, dtype=torch.bool).tril()[None, None] if given else None

    def collate(rows: Rows) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        batch = {"input_ids": ids, "labels": ids.clone()}
        return batch if mask is None else {**batch, "attention_mask": mask.expand(len(rows), 1, -1, -1).contiguous()}

    train, valid, test = (blocks(p) for p in (spec.task.train, spec.task.valid, spec.task.test))
    return Prepared(model, train, valid, test, collate, None)


def _causal(spec: Spec, device: str) -> tuple[PreTrainedModel, Any]:
    check_length(described(spec.model), spec.model, spec.task.length, "task.length")
    model, tokenizer = load(spec.model, precision="fp32")
    model.config.use_cache = False
    model.to(torch.device(device))
    return model, tokenizer


def _classify(spec: Spec, device: str) -> Prepared:
    where = str(folder) if (folder := Path(spec.model).expanduser()).is_dir() else spec.model
    with loading(spec.model, "a text classifier"):
        tokenizer = read_tokenizer(where)
    files = (spec.task.train, spec.task.valid, spec.task.test)
    raw = [rows_with(p, ["text", "label"], spec.task.columns) for p in files]
    names = sorted({str(row["label"]) for row in raw[0]})
    unknown = sorted({str(row["label"]) for rows in raw[1:] for row in rows} - set(names))
    if unknown:
        raise LoralignError(f"label {unknown[0]!r} occurs in validation or test rows only: give training rows of it")
    splits = []
    for rows in raw:
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=spec.task.length).input_ids
        splits.append(
            [{"input_ids": i, "labels": names.index(str(r["label"]))} for i, r in zip(ids, rows, strict=True)]
        )
    with loading(spec.model, "a text classifier"):
        check_length(described_classifier(where), where, spec.task.length, "task.length")
        model, head, _ = load_classifier(where, len(names))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id

    def collate(rows: Rows) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        width = common_width(max(map(len, ids)), spec.task.length, device)
        batch = tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=width, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    train, valid, test = splits
    return Prepared(model.to(device), train, valid, test, collate, accuracy, head)


def common_width(longest: int, most: int, device: str) -> int:
    """What a batch is padded to. On a GPU one of four widths, so that few shapes of a step are recorded."""
    part = 1 if device == "cpu" else -(-most // 4)
    return max(longest, min(most, -(-longest // part) * part))


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of rows whose largest logit is at the label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _sft(spec: Spec, device: str) -> Prepared:
    model, tokenizer = _causal(spec, device)

    def rows(path: str) -> Rows:
        return list(fit(read_trl(path, spec.task.columns), tokenizer, max_length=spec.task.length).dataset)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(batch: Rows) -> dict[str, Tensor]:
        def padded(key: str, fill: int) -> Tensor:
            parts = [torch.tensor([*row[key], *[fill] * (width - len(row[key]))]) for row in batch]
            return torch.stack(parts)

        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        width = common_width(int(lengths.max()), spec.task.length, device)
        ids = padded("input_ids", pad or 0)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", IGNORED)}

    train, valid, test = (rows(p) for p in (spec.task.train, spec.task.valid, spec.task.test))
    return Prepared(model, train, valid, test, collate, None)
