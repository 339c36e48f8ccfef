"""What the model is asked, in training and afterwards alike: the stock chat template, or text with its start token."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loralign.data.table import Row
from loralign.data.turns import Turn
from loralign.maths.deadline import within
from loralign.types import LoralignError

log = logging.getLogger("loralign")

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template, or the interpreter under it, raises for turns that it can't take."""

RENDERING_S = 10.0  # for one conversation
_ENDLESS = (
    f"the chat template takes more than {RENDERING_S:.0f} s for one conversation: put one that ends into the tokenizer "
    "(chat_template.jinja)"
)

_ASKED = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Uno."}]
_CALLED = {"name": "look", "arguments": {"what": "house"}}
_WHAT = {"type": "object", "properties": {"what": {"type": "string", "description": "What."}}}
_TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": _WHAT}}]


def give_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """A tokenizer without a chat template gets ChatML, in place, if it has ChatML's tokens (many base models do).

    Returns whether it was changed: the tokenizer then travels with the adapter. Without ChatML's tokens it is refused:
    the marks would be spelt in pieces, and no end token would be learnt.
    """
    if tokenizer.chat_template:
        return False
    known = tokenizer.get_vocab()
    if not all(token in known for token in CHATML_TOKENS):
        raise LoralignError(
            "the tokenizer has no chat template: use the instruct model, put a chat_template.jinja beside the "
            "tokenizer, or give rows with prompt and completion as text"
        )
    starts = bool(Plain(tokenizer).start)
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + CHATML
    log.warning("the tokenizer has no chat template but ChatML's tokens: ChatML is used, answers end with <|im_end|>")
    return True


# ----------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Plain:
    """Text as it stands, after the start token that the tokenizer itself adds, once."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def start(self) -> list[int]:
        """The tokens that the tokenizer puts before a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        found = (n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare)
        return list(full[: next(found, 0)])

    def encode(self, text: str) -> list[int]:
        """Text that begins with the start token keeps that one. No end token is added."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if self.start and ids[: len(self.start)] == self.start else self.start + ids

    def ended(self, text: str) -> str:
        """The text with the end token after it, once."""
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end


# ---------------------------------------------------------------------------------------------------------------- turns


@dataclass(frozen=True)
class Chat:
    """A tokenizer's own chat template, given turns in the form that it renders.

    parts: contents as lists of text parts, for templates that render nothing of plain text (SmolVLM, Idefics).
    json_arguments: arguments of tool calls as JSON text, for templates that take no objects (DeepSeek).
    """

    tokenizer: PreTrainedTokenizerBase
    parts: bool = False
    json_arguments: bool = False

    def prompt(self, turns: Sequence[Turn], row: Row) -> str:
        """What the model sees before it answers; row: tools and options of the template."""
        return self._rendered(turns, row, add_generation_prompt=True)

    def text(self, turns: Sequence[Turn], row: Row) -> str:
        return self._rendered(turns, row, add_generation_prompt=False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text, which holds its start token itself."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def ends(self) -> frozenset[int]:
        """The token that ends an answer, and the one that ends a tool call; none where answers have no end."""
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        answer = self._tried(_ASKED, "Uno.").rpartition("Uno.")[2]
        call = self._tried(_calling(_CALLED), "house", tools=_TOOLS).rpartition("house")[2]
        first = [i for i in self.encode(answer) if i in marks][:1]
        last = [i for i in self.encode(call) if i in marks][-1:]
        return frozenset([*first, *last] if first else ())

    @cached_property
    def source(self) -> str:
        """The text of the template, or of all named ones."""
        own = self.tokenizer.chat_template
        return "\n".join(own.values()) if isinstance(own, dict) else str(own)

    def _rendered(self, turns: Sequence[Turn], row: Row, **options: Any) -> str:
        extra = row.get("chat_template_kwargs") or {}
        if extra and (clash := sorted(extra.keys() & signature(self.tokenizer.apply_chat_template).parameters.keys())):
            raise ValueError(f"`chat_template_kwargs` may not hold {clash[0]}")
        shown = [self._shown(turn) for turn in turns]
        tools = row.get("tools") or None
        with within(RENDERING_S, LoralignError(_ENDLESS)):
            text: str = self.tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, **options, **extra)
        return text

    def _shown(self, turn: Turn) -> Turn:
        shown = {k: v for k, v in turn.items() if k != "weight"}
        if self.parts:
            shown["content"] = [{"type": "text", "text": turn["content"]}]
        if self.json_arguments and "tool_calls" in turn:
            shown["tool_calls"] = [_with_json(call) for call in turn["tool_calls"]]
        return shown

    def _tried(self, turns: list[Turn], needed: str, **row: Any) -> str:
        """The text of turns, "" where the template refuses them or loses what is needed."""
        try:
            text = self.text(turns, row)
        except REFUSALS:
            return ""
        return text if needed in text else ""


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat template with the form of turns that it renders, found by trying."""
    chat = Chat(tokenizer)
    if not chat._tried(_ASKED, "Uno."):
        text = replace(chat, parts=True)._tried(_ASKED, "Uno.")
        chat = replace(chat, parts=bool(text) and "'type'" not in text)  # a list of Python is no rendering
    for json_arguments in (False, True):
        tried = replace(chat, json_arguments=json_arguments)
        text = tried._tried(_calling(_CALLED), "house", tools=_TOOLS)
        if text and not any(odd in text for odd in ("{'what'", '\\"what')):  # a dict of Python; a quoted string
            return tried
    return chat


def _calling(called: dict[str, Any]) -> list[Turn]:
    return [_ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}]


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _with_json(call["function"])}
    return call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else call
