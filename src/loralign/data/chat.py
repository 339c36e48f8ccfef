"""Rows to token ids and labels, cut at the length limit, with what had to be changed counted and said."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from loralign.data.answers import Sample, last_answer, of_answers, of_completion, of_every_token, of_text
from loralign.data.prompt import REFUSALS, Plain, chat_of, give_template
from loralign.data.read import first_line
from loralign.data.rows import has_turns
from loralign.data.table import Places, Row, Rows, chunks
from loralign.data.turns import KNOWN
from loralign.types import LoralignError

log = logging.getLogger("loralign")

IGNORED = -100
TOKENS = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])


@dataclass(frozen=True)
class Prompts:
    """How the rows ask the model, which whoever uses it does, too.

    form: text as it stands, or turns through the chat template. ends: the tokens that end an answer. options: what
    every row gives the chat template (`chat_template_kwargs`). given: the tokenizer got its template from loralign.
    """

    form: Literal["text", "chat"]
    ends: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False


@dataclass(frozen=True)
class Fit:
    """Rows as `input_ids` and `labels`, and what the length limit and the chat template did.

    rows: how many came in. cut: longer than max_length. dropped: no supervised token left. tokens, supervised: of the
    rows that stay. split: rows that became one for each answer. answers: that are learnt; of them, other_prompt: after
    another prompt than that of inference; no_thoughts: without the thoughts that the row has; joined: whose first token
    reaches into the prompt; empty: that say nothing, of which only the end is learnt. shortened: where in the dataset
    the rows lie that were cut, in order. places: where each row of the dataset comes from.
    """

    dataset: Dataset
    prompts: Prompts
    places: Places
    rows: int
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    supervised: int = 0
    split: int = 0
    answers: int = 0
    other_prompt: int = 0
    no_thoughts: int = 0
    joined: int = 0
    empty: int = 0
    shortened: Sequence[int] = ()


def learnt(labels: Sequence[int]) -> list[int]:
    """The places of the tokens with loss: token 0 is never predicted."""
    return [i for i, label in enumerate(labels) if i and label != IGNORED]


def fit(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, assistant_only: bool = True) -> Fit:
    """Tokens and labels of the rows of `to_trl`, cut at max_length; SFTTrainer takes the result as it is.

    assistant_only: loss on the assistant's turns and on completions; otherwise on every token. Text has loss
    everywhere. Give SFTConfig `assistant_only_loss=False`: the labels already say it.

    Raises:
        LoralignError: the chat template can't take a row or loses a part of it, or no row keeps a supervised token.
    """
    coded = Coder(rows, tokenizer, assistant_only)
    count: Counter[str] = Counter()
    needed: list[int] = []
    shortened, came = array("q"), array("q")

    def kept() -> Iterator[tuple[list[int], list[int]]]:
        for number, sample in coded.samples(count):
            labels = [IGNORED] * len(sample.ids)
            for first, stop in sample.spans:
                labels[first:stop] = sample.ids[first:stop]
            supervised = learnt(labels)
            inside = sum(i < max_length for i in supervised)
            count["cut"] += len(labels) > max_length
            if inside:
                if len(labels) > max_length:
                    shortened.append(len(came))
                came.append(number)
                count["tokens"] += min(len(labels), max_length)
                count["supervised"] += inside
                yield sample.ids[:max_length], labels[:max_length]
            else:
                count["dropped"] += 1
                needed.extend(supervised[:1])

    fitted = _dataset(kept(), rows.name)
    if not len(fitted):
        mend = f"raise max_length to at least {min(needed) + 1}" if needed else "give longer rows"
        raise LoralignError(f"no row of {rows.name} keeps an answer within max_length {max_length}: {mend}")
    places = rows.places.select(came)
    found = Fit(fitted, coded.prompts(), places, len(rows), **count, shortened=shortened)
    if found.answers and found.empty == found.answers:
        raise LoralignError(f"every answer of {rows.name} is empty: give rows whose answers say something")
    _say(found, rows.name, max_length, coded)
    return found


def _dataset(rows: Iterable[tuple[list[int], list[int]]], name: str) -> Dataset:
    tables = [
        pa.Table.from_pydict(dict(zip(TOKENS.names, zip(*part, strict=True), strict=True)), TOKENS)
        for part in chunks(rows)
    ]
    dataset = Dataset(InMemoryTable(pa.concat_tables(tables) if tables else TOKENS.empty_table()))
    dataset.info.dataset_name = name
    return dataset


def _say(found: Fit, name: str, max_length: int, coded: Coder) -> None:
    if found.cut or found.dropped:
        log.warning(
            "%s: %d of %d rows are longer than max_length %d and were cut; %d rows had no answer left and were dropped",
            *(name, found.cut, found.rows, max_length, found.dropped),
        )
    if found.split:
        log.warning(
            "%s: %d rows were split into one for each answer: later on the chat template renders earlier answers "
            "differently, and only so each is learnt after the prompt of inference",
            *(name, found.split),
        )
    if found.other_prompt:
        log.warning(
            "%s: the chat template begins %d of %d answers otherwise than its own prompt ends, so they are learnt "
            "after another prompt than that of inference; where it has a switch (enable_thinking), set it in a column "
            "chat_template_kwargs",
            *(name, found.other_prompt, found.answers),
        )
    if found.joined:
        log.warning(
            "%s: the first token of %d of %d answers reaches into the prompt, which ends otherwise at inference: let "
            "prompts end with a word",
            *(name, found.joined, found.answers),
        )
    if found.empty:
        log.warning(
            "%s: %d of %d answers are empty, only their end is learnt: drop those rows if they are not meant",
            name,
            found.empty,
            found.answers,
        )
    if found.no_thoughts:
        log.warning(
            "%s: the chat template drops the thoughts of %d of %d answers, which are learnt without; give prompt and "
            "completion as text to train them",
            *(name, found.no_thoughts, found.answers),
        )
    if coded.unread:
        keys = ", ".join(sorted(coded.unread))
        log.info("%s: in turns, not read by the chat template and so not used: %s", name, keys)
    if not (coded.chat.ends if coded.chat else coded.plain.tokenizer.eos_token):
        who = "chat template ends an answer without an" if coded.chat else "tokenizer has no"
        log.warning("the %s end token: the model may not learn to stop", who)


# ----------------------------------------------------------------------------------------------------------- row by row


class Coder:
    """Rows to samples, one after the other. chat: the template's form, None where rows are text."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True) -> None:
        self.rows, self.assistant_only = rows, assistant_only
        turns = has_turns(rows[0])
        self.given = turns and give_template(tokenizer)
        self.plain, self.chat = Plain(tokenizer), chat_of(tokenizer) if turns else None
        self.unread: set[str] = set()
        self.options: list[Mapping[str, Any]] = []

    def samples(self, count: Counter[str]) -> Iterator[tuple[int, Sample]]:
        """Every row's samples, each after the row's place among the rows; count: what is not as the row said."""
        for number, (row, where) in enumerate(self._numbered(None)):
            with _refused(where):
                made = self._coded(row, where)
            count["split"] += len(made) > 1
            for sample in made:
                count["answers"] += len(sample.spans)
                count["other_prompt"] += sample.notes.count("prompt")
                count["joined"] += sample.notes.count("tokens")
                count["no_thoughts"] += sample.notes.count("thoughts")
                count["empty"] += sample.notes.count("empty")
                yield number, sample

    def questions(self, limit: int | None = None) -> Iterator[Sample]:
        """The last answer of each row, after its prompt."""
        for row, where in self._numbered(limit):
            if "text" in row:
                raise LoralignError(
                    f"{self.rows.name} has rows without an answer: `eval` needs prompt and completion, or conversations"
                )
            with _refused(where):
                sample = last_answer(self.chat or self.plain, row, where)
            yield sample

    def prompts(self) -> Prompts:
        """How the rows seen so far ask."""
        tokenizer = self.plain.tokenizer
        if self.chat is None:
            return Prompts("text", (tokenizer.eos_token,) if tokenizer.eos_token else ())
        ends = tuple(tokenizer.convert_ids_to_tokens(sorted(self.chat.ends)))
        return Prompts("chat", ends, self.options[0] if len(self.options) == 1 else {}, self.given)

    def _numbered(self, limit: int | None) -> Iterator[tuple[Row, str]]:
        for n, row in enumerate(islice(self.rows, limit)):
            where = self.rows.places.said(n)
            if has_turns(row) != (self.chat is not None):
                raise LoralignError(f"{where}: rows mix text and turns: give one form in a file")
            for turn in (*row.get("messages", ()), *(row["prompt"] if "prompt" in row and self.chat else ())):
                self.unread |= {key for key in turn.keys() - KNOWN if self.chat and key not in self.chat.source}
            if (options := row.get("chat_template_kwargs", {})) not in self.options:
                self.options.append(options)
            yield row, where

    def _coded(self, row: Row, where: str) -> list[Sample]:
        if self.chat is None:
            sample = of_text(self.plain, row) if "text" in row else of_completion(self.plain, row)
        elif self.assistant_only:
            return of_answers(self.chat, row, where)
        else:
            sample = of_every_token(self.chat, row, where)
        return [sample if self.assistant_only else replace(sample, spans=((0, len(sample.ids)),))]


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Within: what the chat template says against a row becomes one sentence with the row's number."""
    try:
        yield
    except LoralignError:
        raise
    except REFUSALS as error:
        raise LoralignError(
            f"{where}: the chat template can't take this conversation ({first_line(error)[:120]}): mend or drop the row"
        ) from error
