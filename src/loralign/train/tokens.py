"""The rows of a job as tokens, and what is said about them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralign.data.chat import Fit, Prompts, fit
from loralign.data.mix import Part
from loralign.data.sources import read_sources
from loralign.data.split import split_eval
from loralign.data.table import Rows
from loralign.train.job import USUAL_LENGTH, Job
from loralign.train.model import described, row_length
from loralign.train.use import stops
from loralign.types import LoralignError

log = logging.getLogger("loralign")


@dataclass(frozen=True)
class Tokens:
    """Rows as tokens, for training and held out. parts: what was taken of each source, before any was held out."""

    train: Fit
    held_out: Fit | None
    parts: tuple[Part, ...]


def place(job: Job) -> dict[str, Any]:
    """What finds the job's model, beside its name."""
    return {"revision": job.revision, "trust_remote_code": job.trust_remote_code}


def measured(job: Job) -> tuple[Job, PreTrainedModel]:
    """The job with `data.max_length` settled, and its model on the meta device."""
    model = described(job.model, **place(job))
    length = row_length(model, job.model, job.data.max_length, "data.max_length", USUAL_LENGTH)
    return replace(job, data=replace(job.data, max_length=length)), model


def _rows(job: Job) -> tuple[Rows, Rows | None, tuple[Part, ...]]:
    rows, parts = read_sources(job.data.train, mix=job.data.mix, seed=job.seed)
    if job.data.eval is None:
        return rows, None, parts
    return *split_eval(rows, job.data.eval, seed=job.seed), parts


def tokens(job: Job, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tokens:
    """The rows of a job as tokens of the model, for training and held out.

    job: with `data.max_length` settled. model: may be on the meta device.
    """
    most = job.data.max_length
    assert most is not None

    def one(rows: Rows, what: str) -> Fit:
        found: Fit = fit(rows, tokenizer, max_length=most, assistant_only=job.data.assistant_only)
        log.info(
            "%s: %d rows, %d tokens, %d with loss; %d rows cut at %d tokens, %d dropped because no answer was left",
            *(what, len(found.dataset), found.tokens, found.supervised, found.cut, most, found.dropped),
        )
        return found

    train, held_out, parts = _rows(job)
    fitted = one(train, "training")
    judged = None if held_out is None else one(held_out, "evaluation")
    filler = None if job.data.packing else tokenizer.pad_token_id  # packed rows are not padded with it
    _check_vocabulary(model, tokenizer, filler, fitted, judged)
    return Tokens(fitted, judged, parts)


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, filler: int | None, *fits: Fit | None
) -> None:
    """Raise where a row, or the token that rows are padded with, has no embedding in the model."""
    largest = [pc.max(pc.list_flatten(f.dataset.data.column("input_ids"))).as_py() for f in fits if f is not None]
    token = max([*largest, filler or 0])
    known = model.get_input_embeddings().weight.shape[0]
    if token >= known:
        raise LoralignError(
            f"the tokenizer has {tokenizer.convert_ids_to_tokens(token)!r} as token {token}, the model embeds {known}: "
            "take the tokenizer of this model, or resize_token_embeddings in Python and save the model"
        )


def name_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """Say where answers end, if whoever generates with the base's own settings would not stop there."""
    found = tokenizer.convert_tokens_to_ids(list(prompts.ends))
    if found and not set(found) & set(stops(model, tokenizer, ())):
        log.warning(
            "answers end with %s, where the base model's own settings do not stop: `loralign eval` and `generate` do; "
            "elsewhere pass eos_token_id=%s",
            *(" or ".join(prompts.ends), found),
        )
