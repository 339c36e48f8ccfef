"""Use a finished adapter through plain PEFT: answer prompts, measure loss and exact match on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loralign.carrier.stored import BadInput, Broken, check_loadable, load_adapter, read_config, read_tensors
from loralign.data.read import read_rows
from loralign.data.rows import rows_format, to_trl
from loralign.evidence import Progress
from loralign.train.model import load
from loralign.types import LoralignError, WorkFailed

Conversation = list[dict[str, str]]
Asked = Conversation | str
"""Turns for the chat template, or a prompt as the model shall see it."""


def open_adapter(folder: Path, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The adapted model in evaluation mode and its tokenizer; `base` overrides the base that the adapter names.

    Raises LoralignError for whatever `verify` would refuse in the folder: nothing is filled in, unpickled or fetched.
    """
    with _as_input():
        config = read_config(folder)
        check_loadable(config, folder)
        tensors = read_tensors(folder, config)
    named = config.get("base_model_name_or_path")
    if base is None and not named:
        raise LoralignError(f"{folder.name} does not say which base model it belongs to: name it with --base")
    try:
        model, tokenizer = load(base or str(named), revision=None if base else config.get("revision"))
    except LoralignError as error:
        if base is not None or isinstance(error, WorkFailed):
            raise
        raise LoralignError(f"{error}; where it is not a hub id, name the base model's folder with --base") from error
    with _as_input():
        return load_adapter(model, folder, config, tensors).eval(), tokenizer


@contextmanager
def _as_input() -> Iterator[None]:
    """A folder that cannot be used is bad input."""
    try:
        yield
    except (BadInput, Broken) as error:
        raise LoralignError(str(error)) from error


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Asked],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to conversations that end with a user's turn, or to plain prompts."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    found: list[str] = []
    model.eval()
    for group in _groups(conversations, batch_size):
        texts = [_prompt(tokenizer, c) for c in group]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        found += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if progress:
            progress("generate", len(found), len(conversations))
    tokenizer.padding_side = side
    return [text.strip() for text in found]


def _groups(items: Sequence[Asked], size: int) -> list[Sequence[Asked]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _prompt(tokenizer: PreTrainedTokenizerBase, conversation: Asked) -> str:
    if isinstance(conversation, str):
        return conversation
    if tokenizer.chat_template is None:
        return "\n".join(turn["content"] for turn in conversation)
    text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return text


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> float:
    """Share of conversations whose greedy answer equals the last assistant turn, white space aside."""
    asked, wanted = [row[:-1] for row in rows], [row[-1]["content"] for row in rows]
    return _share_right(model, tokenizer, asked, wanted, max_new_tokens=max_new_tokens, progress=progress)


def _share_right(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    wanted: Sequence[str],
    *,
    max_new_tokens: int,
    progress: Progress | None,
) -> float:
    given = answer(model, tokenizer, asked, max_new_tokens=max_new_tokens, progress=progress)
    return sum(a == b.strip() for a, b in zip(given, wanted, strict=True)) / max(1, len(wanted))


def generate(
    folder: Path,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
) -> list[str]:
    """One greedy answer per prompt, each asked as a user's turn."""
    model, tokenizer = open_adapter(folder, base)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return answer(model, tokenizer, asked, max_new_tokens=max_new_tokens, progress=progress)


def evaluate(
    folder: Path,
    data: str,
    *,
    base: str | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Exact match of the adapter and of its base on rows with answers; `limit` takes the first so many rows."""
    rows = read_rows(data)
    questions = [_question(row, Path(data).name) for row in islice(to_trl(rows, rows_format(rows)), limit)]
    asked, wanted = [q for q, _ in questions], [a for _, a in questions]
    model, tokenizer = open_adapter(folder, base)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    tuned = _share_right(model, tokenizer, asked, wanted, **settings)
    with model.disable_adapter():
        before = _share_right(model, tokenizer, asked, wanted, **settings)
    return {"exact_match": tuned, "exact_match_base": before, "rows": float(len(questions))}


def _question(row: Mapping[str, Any], name: str) -> tuple[Asked, str]:
    """What a row asks, and the answer it wants: the last turn, or the completion."""
    if "messages" in row and row["messages"][-1]["role"] == "assistant":
        return list(row["messages"][:-1]), row["messages"][-1]["content"]
    if "completion" not in row:
        raise LoralignError(f"{name} has rows without an answer: `eval` needs prompt and completion, or conversations")
    if isinstance(row["completion"], str):
        return row["prompt"], row["completion"]
    return [*row["prompt"], *row["completion"][:-1]], row["completion"][-1]["content"]
