"""Every answer is learnt after the prompt of inference, with all chat templates that TRL ships."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from data_world import SMOL, assistant, byte_tokenizer, rows_of, user
from loralign.data.chat import Fit, fit
from loralign.data.prompt import chat_of
from loralign.types import LoralignError

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
MARK = re.compile(r"<\|[^|<>'{}]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|<turn\|>")

OPENS_A_THOUGHT = {
    *("deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
    "nemotron_3_ultra",
}
"""Their prompt ends in an open thought, and an answer without thoughts doesn't begin so."""
THOUGHTS_CLOSED = {"deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink"}
"""The same for an answer with thoughts: dropped, or after a prompt that has closed them."""
PARTS = {"idefics3", "llava_next", "smolvlm"}
"""Render nothing of content that is text."""
NO_END = {"glm4moe"}
NO_SYSTEM = {"gemma"}
NO_TOOLS = {
    *(
        "cohere",
        "cohere2",
        "deepseek_r1_distill",
        "deepseekv3",
        "gemma",
        "gemma3",
        "idefics3",
        "lfm2",
        "llama3",
        "llava_next",
        "phi3",
    ),
    *("phi3_5", "qwen2_5_vl", "smolvlm"),
}
"""Render no tools, or no tool calls."""

TOOL = {
    "type": "function",
    "function": {
        "name": "north",
        "description": "Go.",
        "parameters": {"type": "object", "properties": {"steps": {"type": "integer", "description": "How many."}}},
    },
}
CALL = {"type": "function", "function": {"name": "north", "arguments": {"steps": 3, "why": 'x"y'}}}
TWO = [user("q1"), assistant("r1"), user("q2"), assistant("r2")]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    template = (FOLDER / f"{name}.jinja").read_text()
    return byte_tokenizer(template, special=sorted({*MARK.findall(template), "<|end|>", "<|user|>"}))


def shown(name: str, turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as a user of this template writes it."""
    found = dict(turn)
    if name in PARTS:
        found["content"] = [{"type": "text", "text": turn["content"]}]
    return found


def inexact(name: str, turns: list[dict[str, Any]], found: Fit, **options: Any) -> int:
    """How many answers no trained row has after the stock prompt of inference, with their text and their end."""
    tokenizer, missing = tokenizer_of(name), 0
    ends = set(tokenizer.convert_tokens_to_ids(list(found.prompts.ends)))
    assert bool(ends) == (name not in NO_END)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = [shown(name, t) for t in turns[:i]]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)["input_ids"]
        rows = [row for row in found.dataset if row["input_ids"][: len(prompt)] == prompt]
        learnt = [learnt_after(row["labels"], len(prompt)) for row in rows]
        whole = [ids for ids in learnt if turn["content"] in tokenizer.decode(ids)]
        missing += not any(not ends or ends & set(ids) for ids in whole)
    return missing


def learnt_after(labels: list[int], start: int) -> list[int]:
    """The run of tokens with loss that begins there, and not before."""
    if labels[start - 1] != -100:
        return []
    stop = next((i for i in range(start, len(labels)) if labels[i] == -100), len(labels))
    return labels[start:stop]


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_follows_the_prompt_of_inference(name: str) -> None:
    tokenizer = tokenizer_of(name)
    found = fit(rows_of({"messages": TWO}), tokenizer, max_length=99999)
    assert found.other_prompt == inexact(name, TWO, found) == (2 if name in OPENS_A_THOUGHT else 0)
    assert len(found.dataset) == (2 if found.split else 1)
    supervised = sum(label != -100 for row in found.dataset for label in row["labels"][1:])
    assert supervised == found.supervised

    system = [{"role": "system", "content": "SYS"}, *TWO[:2]]
    if name in NO_SYSTEM:
        with pytest.raises(LoralignError, match="row 1: the chat template can't take this conversation"):
            fit(rows_of({"messages": system}), tokenizer, max_length=99999)
    else:
        found = fit(rows_of({"messages": system}), tokenizer, max_length=99999)
        assert "SYS" in tokenizer.decode(found.dataset[0]["input_ids"])
        assert found.other_prompt == inexact(name, system, found) == (name in OPENS_A_THOUGHT)


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_are_learnt_or_counted(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = [t | ({"reasoning_content": f"T{i}"} if i % 2 else {}) for i, t in enumerate(TWO)]
    found = fit(rows_of({"messages": turns}), tokenizer, max_length=99999)
    assert found.other_prompt == inexact(name, turns, found) == (2 if name in THOUGHTS_CLOSED else 0)
    learnt = "".join(tokenizer.decode([i for i in row["labels"] if i != -100]) for row in found.dataset)
    assert found.no_thoughts == sum(t not in learnt for t in ("T1", "T3"))


@pytest.mark.parametrize("name", NAMES)
def test_tool_calls_are_learnt_or_refused(name: str) -> None:
    turns = [
        user("go"),
        assistant("") | {"tool_calls": [CALL]},
        {"role": "tool", "name": "north", "content": "seven"},
        assistant("done"),
    ]
    tokenizer = tokenizer_of(name)
    if name in NO_TOOLS:
        with pytest.raises(LoralignError, match="row 1: the chat template doesn't render the tool") as raised:
            fit(rows_of({"messages": turns, "tools": [TOOL]}), tokenizer, max_length=99999)
        assert len(str(raised.value)) < 300
        return
    found = fit(rows_of({"messages": turns, "tools": [TOOL]}), tokenizer, max_length=99999)
    texts = [tokenizer.decode(row["input_ids"]) for row in found.dataset]
    learnt = "".join(tokenizer.decode([i for i in row["labels"] if i != -100]) for row in found.dataset)
    assert "north" in learnt and '"y' in learnt and "done" in learnt and "seven" not in learnt
    assert "{'steps'" not in learnt and '\\"steps' not in learnt
    assert all("Go." in text or "north" in text.partition("go")[0] for text in texts)
    assert any("seven" in text for text in texts)


def test_a_switch_of_the_template_makes_answers_exact(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("nemotron_3_nano")
    with caplog.at_level(logging.WARNING, "loralign"):
        fit(rows_of({"messages": TWO}), tokenizer, max_length=99999)
    assert "begins 2 of 2 answers otherwise than its own prompt ends" in caplog.text
    assert "set it in a column chat_template_kwargs" in caplog.text
    row = {"messages": TWO, "chat_template_kwargs": {"enable_thinking": False}}
    found = fit(rows_of(row), tokenizer, max_length=99999)
    assert found.other_prompt == inexact("nemotron_3_nano", TWO, found, enable_thinking=False) == 0
    assert found.prompts.options == {"enable_thinking": False}
    clash = {"messages": TWO, "chat_template_kwargs": {"tokenize": True}}
    with pytest.raises(LoralignError, match="`chat_template_kwargs` may not hold tokenize"):
        fit(rows_of(clash), tokenizer, max_length=99999)


def test_the_form_of_turns_that_a_template_renders_is_found() -> None:
    assert {name for name in NAMES if chat_of(tokenizer_of(name)).parts} == PARTS
    assert {name for name in NAMES if chat_of(tokenizer_of(name)).json_arguments} == {"deepseekv3"}
    turns = [user("go"), assistant("") | {"tool_calls": [CALL]}]
    (row,) = fit(rows_of({"messages": turns}), tokenizer_of("deepseekv3"), max_length=9999).dataset
    assert '{"steps": 3, "why": "x\\"y"}' in tokenizer_of("deepseekv3").decode(row["input_ids"])


def test_dropped_thoughts_and_split_rows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    turns = [t | ({"reasoning_content": "T"} if i % 2 else {}) for i, t in enumerate(TWO)]
    with caplog.at_level(logging.WARNING, "loralign"):
        fit(rows_of({"messages": turns}), tokenizer_of("qwen2_5"), max_length=9999)
        fit(rows_of({"messages": TWO}, {"messages": TWO[:2]}), tokenizer_of("qwen3"), max_length=9999)
    assert "the chat template drops the thoughts of 2 of 2 answers" in caplog.text
    assert "the data: 1 rows were split into one for each answer" in caplog.text


def test_named_templates_are_chosen_as_inference_does() -> None:
    tools = "{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}"
    tokenizer = byte_tokenizer({"default": SMOL, "tool_use": tools + SMOL})
    rows = [{"messages": TWO}, {"messages": TWO, "tools": [TOOL]}]
    found = [tokenizer.decode(row["input_ids"]) for row in fit(rows_of(*rows), tokenizer, max_length=9999).dataset]
    assert found == [tokenizer.apply_chat_template(**as_keywords(row), tokenize=False) for row in rows]
    with pytest.raises(LoralignError, match="row 1: the chat template doesn't render the tool north"):
        fit(rows_of(rows[1]), byte_tokenizer(SMOL), max_length=9999)


def as_keywords(row: dict[str, Any]) -> dict[str, Any]:
    return {"conversation": row["messages"], **{k: v for k, v in row.items() if k != "messages"}}


def test_a_template_that_loses_a_turn_is_refused() -> None:
    for lost, what in (("user", "the user's turn"), ("assistant", "the assistant's turn")):
        template = SMOL.replace("message['content']", f"(message['content'] if message['role'] != '{lost}' else '')")
        with pytest.raises(LoralignError, match=f"row 1: the chat template doesn't render {what}"):
            fit(rows_of({"messages": TWO}), byte_tokenizer(template), max_length=9999)
