"""What a finished run says about itself: the model card and run.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralign.carrier.quantise import KINDS
from loralign.data.chat import Prompts
from loralign.data.mix import Part
from loralign.io.card import Card, write_card
from loralign.io.provenance import write_run
from loralign.train.job import Job
from loralign.types import Full


def describe(folder: Path, card: Card, seconds: dict[str, float]) -> None:
    """Write both."""
    write_card(folder, card)
    write_run(folder, card, seconds=seconds)


def card_of(
    job: Job, rows: tuple[int, int], read: Sequence[tuple[Part, str]], fingerprint: str, prompts: Prompts
) -> Card:
    """What is known before the first step. rows: for training and held out; read: what was taken of each source, and
    the hash of its content; fingerprint: of the training tokens."""
    return Card(
        base=job.model,
        revision=job.revision,
        method=job.recipe.name,
        options=_options(job),
        data=_data(job, rows, read, fingerprint),
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
    chosen = {"method chosen by": job.chosen_by} if job.chosen_by else {}
    how = f"quantised to {job.quantize} while it was loaded ({KINDS[job.quantize].package})" if job.quantize else ""
    base = {"base": how} if how else {}
    return {**chosen, **base, **adapter, "targets": r.targets, "weight decay": r.weight_decay, **said}


def _data(job: Job, rows: tuple[int, int], read: Sequence[tuple[Part, str]], fingerprint: str) -> dict[str, Any]:
    names = [_name(part.source.name) for part, _ in read]
    return {
        "name": names[0] if len(names) == 1 else names,
        "sources": [_source(part, content) for part, content in read],
        "rows": rows[0],
        "held-out rows": rows[1],
        "tokens per row at most": job.data.max_length,
        "loss on": "answers only" if job.data.assistant_only else "every token",
        "fingerprint": fingerprint,
    }


def _name(source: str) -> str:
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def _source(part: Part, content: str) -> dict[str, Any]:
    """One source, what it does not have left out."""
    source = part.source
    found = {
        "name": _name(source.name),
        "rows": part.rows,
        "taken": part.taken,
        "share": source.share,
        "split": source.split,
        "columns": dict(source.columns),
        "content": content,
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def metrics_of(trainer: Any, before: float | None) -> dict[str, float]:
    """Of a run that ended; the held-out loss is measured where its log has none of the last step. before: that loss
    before the first step."""
    state, history = trainer.state, trainer.state.log_history
    found = {key: float(e[key]) for e in history for key in ("train_loss",) if key in e}
    if trainer.eval_dataset is not None:
        ends = [e["eval_loss"] for e in history if "eval_loss" in e and e["step"] == state.global_step]
        fresh = ends if not trainer.args.load_best_model_at_end else []
        found["eval_loss"] = float(fresh[-1] if fresh else trainer.evaluate()["eval_loss"])
        if before is not None:
            found["eval_loss_before"] = before
    if state.best_metric is not None and trainer.args.load_best_model_at_end:
        found["best_eval_loss"] = float(state.best_metric)
    return {**found, "steps": float(state.global_step)}
