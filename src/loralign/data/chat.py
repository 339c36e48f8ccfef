"""From rows to tokens and labels: chat templates, the assistant mask, the length limit.

Loss on the answers only needs `{% generation %}` marks in the chat template. In this order: marks of the template's
own; TRL's training template where it knows the model; otherwise the template is wrapped (`MARKED`): the whole text is
rendered once by the template itself and cut at the ends of the texts of its first i and first i+1 turns. The text is
the template's by construction; a template that renders earlier turns differently later on (one that strips the
thoughts, say) is refused, row by row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from loralign.data.read import Row, as_dataset, first_line, name_of
from loralign.types import LoralignError

log = logging.getLogger("loralign")

IGNORED = -100
TOKENS = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

MARKED = """\
{%%- macro rendered(messages, add_generation_prompt) +%%}%s{%%+ endmacro -%%}
{%%- set whole = rendered(messages, add_generation_prompt) -%%}
{%%- set done = namespace(end=0) -%%}
{%%- for i in range(messages | length) -%%}
    {%%- if messages[i]['role'] == 'assistant' -%%}
        {%%- if i == 0 -%%}{{ raise_exception('it starts with the assistant') }}{%%- endif -%%}
        {%%- set before = rendered(messages[:i], true) -%%}
        {%%- set after = rendered(messages[:i + 1], false) -%%}
        {%%- if not (whole.startswith(after) and after.startswith(before)) -%%}
            {{ raise_exception('it renders turn ' ~ (i + 1) ~ ' differently in a longer conversation') }}
        {%%- endif -%%}
        {{- whole[done.end:before | length] -}}
        {%%- generation -%%}{{- whole[before | length:after | length] -}}{%%- endgeneration -%%}
        {%%- set done.end = after | length -%%}
    {%%- endif -%%}
{%%- endfor -%%}
{{- whole[done.end:] -}}"""

PROBE = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]


# ------------------------------------------------------------------------------------------------------------ templates


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer without a chat template gets ChatML, in place, if it has ChatML's tokens (many base models do).

    Otherwise it is refused: the marks would be spelt in pieces, no end token would be learnt, and a format of our own
    would have to travel with the adapter.
    """
    if tokenizer.chat_template:
        return
    known = tokenizer.get_vocab()
    if not all(token in known for token in CHATML_TOKENS):
        raise LoralignError(
            "the tokenizer has no chat template: use the instruct model, put a chat_template.jinja beside the "
            "tokenizer, or give rows with prompt and completion as text"
        )
    tokenizer.chat_template = CHATML
    log.warning("the tokenizer has no chat template but ChatML's tokens: ChatML is used, answers end with <|im_end|>")


def with_generation_markers(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template with `{% generation %}` around what the assistant says, its end token included.

    Raises:
        LoralignError: there is no template, or the answers can't be told from the rest of the text.
    """
    own = tokenizer.chat_template
    template = own.get("default") if isinstance(own, dict) else own
    if not template:
        raise LoralignError("the tokenizer has no chat template: call give_template, or use the instruct model")
    if has_generation_markers(template):
        return str(template)
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:  # TRL doesn't know it
        marked = MARKED % template.removesuffix("\n")
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False, chat_template=template)
        found = tokenizer.apply_chat_template(PROBE, tokenize=False, chat_template=marked)
    except (TemplateError, TypeError, ValueError) as error:
        raise LoralignError(
            f"the chat template doesn't tell which tokens are the answers ({first_line(error)}): add "
            "{% generation %} marks to it, set assistant_only: false, or give rows with prompt and completion"
        ) from error
    assert text == found, "the wrapped template renders another text"
    return marked


# --------------------------------------------------------------------------------------------------- tokens and lengths


@dataclass(frozen=True)
class Fit:
    """Rows as `input_ids` and `labels`, and what the length limit did.

    rows: how many came in. cut: longer than max_length. dropped: no supervised token left. tokens, supervised: of the
    rows that stay.
    """

    dataset: Dataset
    rows: int
    cut: int
    dropped: int
    tokens: int
    supervised: int


def fit(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, assistant_only: bool = True) -> Fit:
    """Tokens and labels of TRL-style rows, cut at max_length; SFTTrainer takes the result as it is.

    assistant_only: loss on the assistant's turns and on completions; otherwise on every token. Text has loss
    everywhere. Give SFTConfig `assistant_only_loss=False`: the labels already say it.

    Raises:
        LoralignError: the chat template refuses a row (with its number), or no row keeps a supervised token.
    """
    coded = _Coder(dataset, tokenizer, assistant_only)
    count = {"cut": 0, "dropped": 0, "tokens": 0, "supervised": 0}
    needed: list[int] = []

    def kept() -> Iterator[Row]:
        for ids, labels in coded.rows():
            count["cut"] += len(ids) > max_length
            supervised = [i for i, label in enumerate(labels) if i and label != IGNORED]  # token 0 is never predicted
            inside = sum(i < max_length for i in supervised)
            if not inside:
                count["dropped"] += 1
                needed.extend(supervised[:1])
                continue
            count["tokens"] += min(len(ids), max_length)
            count["supervised"] += inside
            yield {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    fitted = as_dataset(kept(), name_of(dataset), TOKENS)
    found = Fit(fitted, rows=len(dataset), **count)
    if not len(fitted):
        mend = f"raise max_length to at least {min(needed) + 1}" if needed else "give longer rows"
        raise LoralignError(f"no row of {name_of(dataset)} keeps an answer within max_length {max_length}: {mend}")
    if found.cut or found.dropped:
        log.warning(
            "%s: %d of %d rows are longer than max_length %d and were cut; %d rows had no answer left and were dropped",
            *(name_of(dataset), found.cut, found.rows, max_length, found.dropped),
        )
    return found


class _Coder:
    """Rows to (input_ids, labels), one after the other."""

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> None:
        self.dataset, self.tokenizer, self.assistant_only = dataset, tokenizer, assistant_only
        self.template: str | None = None
        first = dataset[0]
        if "messages" in first or isinstance(first.get("prompt"), list):
            give_template(tokenizer)
        if "messages" in first and assistant_only:
            if not tokenizer.is_fast:
                raise LoralignError(
                    "the tokenizer doesn't tell where its tokens lie in the text, so answers can't be marked: set "
                    "assistant_only: false, or give rows with prompt and completion"
                )
            self.template = with_generation_markers(tokenizer)
            if not is_chat_template_stop_token_trained(tokenizer, self.template):
                log.warning("the chat template ends an answer without an end token: the model may not learn to stop")

    def rows(self) -> Iterator[tuple[list[int], list[int]]]:
        for n, row in enumerate(self.dataset, 1):
            try:
                ids, mask = self._coded(row)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                raise LoralignError(
                    f"{name_of(self.dataset)}, row {n}: the chat template can't take this conversation "
                    f"({first_line(error)}): mend or drop the row"
                ) from error
            yield ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]

    def _coded(self, row: Row) -> tuple[list[int], list[int]]:
        if "text" in row:
            ids = self._plain(self._ended(row["text"]))
            return ids, [1] * len(ids)
        if "messages" in row:
            out = self._chat(row["messages"], row, return_assistant_tokens_mask=self.template is not None)
            return out["input_ids"], out.get("assistant_masks", [1] * len(out["input_ids"]))
        if isinstance(row["prompt"], str):
            prompt, ids = self._plain(row["prompt"]), self._plain(row["prompt"] + self._ended(row["completion"]))
        else:
            prompt = self._chat(row["prompt"], row, add_generation_prompt=True)["input_ids"]
            ids = self._chat(row["prompt"] + row["completion"], row)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        return ids, [int(i >= shared or not self.assistant_only) for i in range(len(ids))]

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _chat(self, turns: list[Row], row: Row, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            [_without_none(turn) for turn in turns],
            tools=_tools(row.get("tools")),
            chat_template=self.template,
            return_dict=True,
            **options,
        )


def _tools(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _without_none(value: Any) -> Any:
    """Arrow gives every struct the keys of all others; what a row didn't say goes away again."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
