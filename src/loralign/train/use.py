"""Use a finished adapter through plain PEFT: answer prompts, measure exact match on held-out rows.

The model is asked as it was trained: text after the tokenizer's start token, or turns through the chat template; it
stops at the tokens that end an answer in training.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loralign.carrier.stored import BadInput, Broken, check_loadable, load_adapter, read_config, read_tensors
from loralign.data.chat import Coder
from loralign.data.columns import faults
from loralign.data.prompt import Chat, Plain, chat_of
from loralign.data.read import read_rows
from loralign.data.rows import named, read_trl, rows_format, to_trl
from loralign.data.table import Rows
from loralign.evidence import Progress
from loralign.io.adalora import is_adalora, write_plain
from loralign.io.card import read_card
from loralign.train.model import load, loading
from loralign.train.recorded import kind_for
from loralign.types import LoralignError, WorkFailed

log = logging.getLogger("loralign")

Conversation = list[dict[str, str]]
Asked = Conversation | str
"""Turns for the chat template, or a prompt as the model shall see it."""


def open_adapter(
    folder: Path, base: str | None = None, quantize: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The adapted model in evaluation mode and its tokenizer; `base` overrides the base that the adapter names.

    quantize: how the base is quantised while it is loaded, "none": not; None: as in training.
    A tokenizer, or a chat template, beside the adapter goes before the base's own.
    Raises LoralignError for whatever `verify` would refuse in the folder: nothing is filled in, unpickled or fetched.
    """
    if is_adalora(folder):
        with tempfile.TemporaryDirectory() as plain:
            write_plain(folder, Path(plain))
            model, tokenizer = open_adapter(Path(plain), base, quantize)
        return model, _own(folder, tokenizer)
    with _as_input():
        config = read_config(folder)
        check_loadable(config, folder)
        tensors = read_tensors(folder, config)
    named = config.get("base_model_name_or_path")
    if base is None and not named:
        raise LoralignError(f"{folder} does not say which base model it belongs to: name it with --base")
    name, revision = base or str(named), None if base else config.get("revision")
    try:
        kind = kind_for(folder, name, revision, quantize)
        model, tokenizer = load(name, revision=revision, quantize=kind)
    except LoralignError as error:
        if base is not None or isinstance(error, WorkFailed):
            raise
        raise LoralignError(f"{error}; where it is not a hub id, name the base model's folder with --base") from error
    with _as_input():
        return load_adapter(model, folder, config, tensors).eval(), _own(folder, tokenizer)


@contextmanager
def _as_input() -> Iterator[None]:
    """A folder that cannot be used is bad input."""
    try:
        yield
    except (BadInput, Broken) as error:
        raise LoralignError(str(error)) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter came with a tokenizer of its own."""
    return (folder / "tokenizer_config.json").is_file()


def _own(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    template = folder / "chat_template.jinja"
    if has_tokenizer(folder):
        with loading(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
    elif template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- answers


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Asked],
    *,
    options: Mapping[str, Any] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to conversations that end with a user's turn, or to plain prompts; options: of the template."""
    plain = Plain(tokenizer)
    chat = chat_of(tokenizer) if tokenizer.chat_template else Chat(tokenizer)
    row = {"chat_template_kwargs": options}
    prompts = [
        plain.encode(asked) if isinstance(asked, str) else chat.encode(chat.prompt(asked, row))
        for asked in conversations
    ]
    if (empty := next((i for i, ids in enumerate(prompts) if not ids), None)) is not None:
        raise LoralignError(f"prompt {empty + 1} has no tokens: write what the model is to answer")
    asks_turns = any(not isinstance(asked, str) for asked in conversations)
    ends = stops(model, tokenizer, chat.ends if asks_turns else ())
    found = _generated(
        model, tokenizer, prompts, ends, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return [_decoded(tokenizer, ids, ends) for ids in found]


def stops(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] | frozenset[int]) -> list[int]:
    """Where generation stops: at the tokens that end an answer in training, and at the model's own."""
    own = model.generation_config.eos_token_id
    said = own if isinstance(own, list) else [own]
    return sorted({i for i in (*said, tokenizer.eos_token_id, *ends) if i is not None})


@torch.no_grad()
def _generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    ends: list[int],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Progress | None,
) -> list[list[int]]:
    """The tokens that follow each prompt."""
    model.eval()
    found: list[list[int]] = []
    for first in range(0, len(prompts), batch_size):
        group = prompts[first : first + batch_size]
        longest = max(map(len, group))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in group], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=ends or None,
        )
        found += out[:, longest:].tolist()
        if progress:
            progress("generate", len(found), len(prompts))
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: list[int]) -> str:
    """The text up to the first token that ends an answer."""
    stop = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    text: str = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return text.strip()


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
    given = answer(model, tokenizer, asked, max_new_tokens=max_new_tokens, progress=progress)
    return _share(given, wanted)


def _share(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b.strip() for a, b in zip(given, wanted, strict=True)) / max(1, len(wanted))


# ------------------------------------------------------------------------------------------------------------- commands


def generate(
    folder: Path,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    quantize: str | None = None,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
) -> list[str]:
    """One greedy answer per prompt, each asked as the training rows asked: as text, or as a user's turn.

    An adapter that doesn't say how it was trained is asked through the chat template where there is one.
    """
    model, tokenizer = open_adapter(folder, base, quantize)
    said = read_card(folder, "").prompts
    asked: list[Asked] = list(prompts)
    if tokenizer.chat_template and said.get("form") != "text":
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = said.get("options") or {}
    return answer(model, tokenizer, asked, options=options, max_new_tokens=max_new_tokens, progress=progress)


def evaluate(
    folder: Path,
    data: str,
    *,
    base: str | None = None,
    columns: Mapping[str, str] | None = None,
    quantize: str | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Exact match of the adapter and of its base on rows with answers; `limit` takes the first so many rows.

    Every row's last answer is asked for by the tokens that training has before it, and compared with the text of those
    that training has there, white space aside. columns: our names to those in the rows; None: the names that the
    adapter's training rows had, where these have them, too.
    """
    rows = _asked_as_trained(folder, data) if columns is None else read_trl(data, columns)
    model, tokenizer = open_adapter(folder, base, quantize)
    coder = Coder(rows, tokenizer)
    samples = list(coder.questions(limit))
    ends = stops(model, tokenizer, coder.chat.ends if coder.chat else ())
    asked = [sample.ids[: sample.spans[0][0]] for sample in samples]
    wanted = [_decoded(tokenizer, sample.ids[sample.spans[0][0] :], ends) for sample in samples]

    def share() -> float:
        found = _generated(model, tokenizer, asked, ends, max_new_tokens=max_new_tokens, progress=progress)
        return _share([_decoded(tokenizer, ids, ends) for ids in found], wanted)

    tuned = share()
    with model.disable_adapter():
        before = share()
    return {"exact_match": tuned, "exact_match_base": before, "rows": float(len(samples))}


def _asked_as_trained(folder: Path, data: str) -> Rows:
    """The rows under the first names of the run's record whose columns they all have; else as they are."""
    known = _recorded(read_card(folder, "").source)
    rows = read_rows(data, also={theirs for columns in known for theirs in columns.values()})
    columns = next((columns for columns in known if {*columns.values()} <= {*rows.columns}), None)
    if columns:
        said = ", ".join(f"`{ours}` is {theirs}" for ours, theirs in columns.items())
        log.info("%s: columns as in the adapter's training: %s", rows.name, said)
        rows = named(rows, columns)
    return to_trl(rows, rows_format(rows))


def _recorded(recipe: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The names of columns in a recipe file: those of all rows, then of its sources."""
    data = recipe.get("data")
    if not isinstance(data, dict):
        return []
    train = data.get("train")
    entries = [data, *(train if isinstance(train, list) else [train]), data.get("eval")]
    found = [entry.get("columns") for entry in entries if isinstance(entry, dict)]
    return [columns for columns in found if isinstance(columns, dict) and columns and not faults(columns)]
