"""What a finished run says about itself: the model card and run.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralign.data.chat import Prompts
from loralign.io.card import Card, write_card
from loralign.io.provenance import write_run
from loralign.train.job import Job
from loralign.types import Full


def describe(folder: Path, card: Card, seconds: dict[str, float]) -> None:
    """Write both."""
    write_card(folder, card)
    write_run(folder, card, seconds=seconds)


def card_of(job: Job, rows: tuple[int, int], fingerprint: str, prompts: Prompts) -> Card:
    """What is known before the first step. rows: for training and held out; fingerprint: of the training tokens."""
    return Card(
        base=job.model,
        revision=job.revision,
        method=job.recipe.name,
        options=_options(job),
        data=_data(job, rows, fingerprint),
        prompts=asdict(prompts),
        learning_rate=job.training.learning_rate,
        lr_source=job.training.lr_source,
        source=job.source,
    )


def _options(job: Job) -> dict[str, Any]:
    t, r = job.training, job.recipe
    adapter = {} if isinstance(r, Full) else {
        "rank": r.r, "alpha": r.r if r.alpha is None else r.alpha, "scale": r.s(), "dropout": r.dropout
    }  # fmt: skip
    said = {"batch size": t.batch_size, "schedule": t.schedule, "warm-up": t.warmup, "seed": job.seed}
    return {**adapter, "targets": r.targets, "weight decay": r.weight_decay, **said}


def _data(job: Job, rows: tuple[int, int], fingerprint: str) -> dict[str, Any]:
    train = job.data.train
    return {
        "name": Path(train).name if Path(train).exists() else train,
        "rows": rows[0],
        "held-out rows": rows[1],
        "tokens per row at most": job.data.max_length,
        "loss on": "answers only" if job.data.assistant_only else "every token",
        "fingerprint": fingerprint,
    }
