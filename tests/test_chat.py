"""Conversations to tokens and labels: lengths, labels as TRL's, rows that a template cannot take."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cached_assets import asset, needs
from data_world import CONVERSATIONS, INST, SMOL, assistant, byte_tokenizer, pieces, rows_of, sft, user
from loralign.data.chat import fit
from loralign.data.prompt import CHATML, give_template
from loralign.data.rows import to_trl
from loralign.types import LoralignError

FEW = settings(max_examples=30, deadline=None)
MARKED = SMOL.replace(
    "+ message['content'] + '<|im_end|>' + '\n'}}",
    "}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}",
)
"""The same, with the marks by which TRL finds the answers."""


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.integers(1, 3))
    contents = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)
    return [{"role": r, "content": draw(contents)} for _ in range(turns) for r in ("user", "assistant")]


@pytest.mark.parametrize(
    "template", [SMOL, INST, CHATML, "\n" + CHATML + "\n\n"], ids=["smol", "inst", "chatml", "lines"]
)
@FEW
@given(turns=conversations())
def test_a_conversation_is_the_template_s_text_with_loss_on_the_answers(
    template: str, turns: list[dict[str, str]]
) -> None:
    assume(any(t["content"].strip() for t in turns if t["role"] == "assistant"))
    tokenizer = byte_tokenizer(template)
    (row,) = fit(rows_of({"messages": turns}), tokenizer, max_length=9999).dataset
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)
    answers = [t["content"] for t in turns if t["role"] == "assistant"]
    wanted = [f" {a.strip()}<|im_end|>" if template == INST else f"{a}<|im_end|>\n" for a in answers]
    assert pieces(tokenizer, row["input_ids"], [int(label != -100) for label in row["labels"]]) == wanted


def test_a_tokenizer_without_template(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(None)
    with caplog.at_level(logging.WARNING, "loralign"):
        assert give_template(tokenizer)
    assert tokenizer.chat_template == CHATML and "ChatML is used" in caplog.text
    mine = byte_tokenizer(INST)
    assert not give_template(mine)
    assert mine.chat_template == INST
    starts = byte_tokenizer(None, starts=True)
    (row,) = fit(rows_of({"messages": [user("q"), assistant("a")]}), starts, max_length=99).dataset
    assert starts.decode(row["input_ids"]).startswith("<s><|im_start|>")
    bare = byte_tokenizer(None, chatml=False)
    with pytest.raises(
        LoralignError, match=r"no chat template: use the instruct model, .*prompt and completion as text"
    ):
        fit(rows_of({"messages": [user("q"), assistant("a")]}), bare, max_length=50)
    assert fit(rows_of({"prompt": "q", "completion": "a"}), bare, max_length=50).supervised == 2


# --------------------------------------------------------------------------------------------------- tokens and lengths


TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
PREPARED: dict[str, list[dict[str, Any]]] = {
    "messages": CONVERSATIONS,
    "prompt-completion messages": [{"prompt": [user("q")], "completion": [assistant("a")]}],
    "prompt-completion text": [{"prompt": "q: ", "completion": "a"}, {"prompt": "p", "completion": ""}],
    "text": [{"text": "once upon"}, {"text": "a time<|im_end|>"}],
    "tools": [{"messages": [user("q"), assistant("a")], "tools": TOOLS}],
}


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("only", [True, False])
def test_tokens_and_labels_are_those_of_trl(name: str, only: bool, tmp_path: Path) -> None:
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    rows, tokenizer = PREPARED[name], byte_tokenizer(tools + SMOL)
    ours = fit(rows_of(*rows), tokenizer, max_length=200, assistant_only=only)
    tokenizer.chat_template = tools + MARKED
    flags = {"assistant_only_loss": only and "messages" in rows[0]}
    if not only:
        flags["completion_only_loss"] = False
    given = [row | ({"tools": json.dumps(row["tools"])} if "tools" in row else {}) for row in rows]
    theirs = sft(tmp_path, Dataset.from_list(given), tokenizer, max_length=200, **flags).train_dataset
    assert [(r["input_ids"], r["labels"]) for r in ours.dataset] == [(r["input_ids"], r["labels"]) for r in theirs]
    assert ours.tokens == sum(map(len, theirs["input_ids"])) and ours.cut == ours.dropped == 0
    assert ours.supervised == sum(label != -100 for row in theirs["labels"] for label in row[1:])


def test_long_rows_are_cut_counted_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(*({"prompt": "p" * n, "completion": "abc"} for n in (1, 6, 9, 10, 20)))
    with caplog.at_level(logging.WARNING, "loralign"):
        found = fit(rows, byte_tokenizer(), max_length=10)
    assert (found.rows, found.cut, found.dropped, len(found.dataset)) == (5, 3, 2, 3)
    assert (found.tokens, found.supervised) == (5 + 10 + 10, 4 + 4 + 1)
    assert max(map(len, found.dataset["input_ids"])) == 10
    assert "3 of 5 rows are longer than max_length 10 and were cut; 2 rows had no answer left" in caplog.text
    with pytest.raises(
        LoralignError, match=r"no row of the data keeps an answer within max_length 1: raise .* least 2"
    ):
        fit(rows, byte_tokenizer(), max_length=1)
    with pytest.raises(LoralignError, match="give longer rows"):
        fit(rows_of({"text": ""}), byte_tokenizer(), max_length=10)


@FEW
@given(turns=st.lists(conversations(), min_size=1, max_size=4), limit=st.integers(20, 120))
def test_what_stays_is_the_beginning_of_the_whole(turns: list[list[dict[str, str]]], limit: int) -> None:
    assume(any(t["content"].strip() for row in turns for t in row if t["role"] == "assistant"))
    rows, tokenizer = rows_of(*({"messages": t} for t in turns)), byte_tokenizer(CHATML)
    whole = fit(rows, tokenizer, max_length=10_000)
    wanted = [
        (r["input_ids"][:limit], r["labels"][:limit])
        for r in whole.dataset
        if any(label != -100 for label in r["labels"][1:limit])
    ]
    if not wanted:
        with pytest.raises(LoralignError, match="raise max_length"):
            fit(rows, tokenizer, max_length=limit)
        return
    cut = fit(rows, tokenizer, max_length=limit)
    assert [(r["input_ids"], r["labels"]) for r in cut.dataset] == wanted
    assert cut.dropped == len(rows) - len(wanted)
    assert cut.cut == sum(len(ids) > limit for ids in whole.dataset["input_ids"])


def test_a_row_that_the_template_refuses_is_named() -> None:
    good = {"messages": [user("q"), assistant("a")]}
    for turns, reason in (
        ([{"role": "system", "content": "s"}, user("q"), assistant("a")], "only user and assistant turns.*: mend or"),
        ([assistant("a")], "it starts with the assistant, which answers nothing: drop that turn or"),
    ):
        with pytest.raises(LoralignError, match=f"the data, row 2: .*{reason}.* the row"):
            fit(rows_of(good, {"messages": turns}), byte_tokenizer(INST), max_length=99)


def test_rows_do_not_mix_text_and_turns() -> None:
    with pytest.raises(LoralignError, match="the data, row 2: rows mix text and turns"):
        fit(rows_of({"prompt": "q", "completion": "a"}, *CONVERSATIONS), byte_tokenizer(), max_length=99)


def test_a_row_shows_its_own_keys_only() -> None:
    """Another row's keys, nulls, order and number types do not reach it."""
    template = (
        "{% for m in messages %}{{ m.role ~ (m.tool_calls | tojson if m.tool_calls else m.content) }}{% endfor %}"
    )
    calls = [
        [{"name": "f", "arguments": {"x": 1, "unit": None}}],
        [{"name": "g", "arguments": {"y": 2, "x": 0.5}}],
        [{"name": "f", "arguments": {"x": "one", "deep": [{"a": 1}, "b", None]}}],
    ]
    turns = [[user("q"), {"role": "assistant", "content": "", "tool_calls": c}] for c in calls]
    rows = to_trl(rows_of(*({"messages": t} for t in turns)), "messages")
    tokenizer = byte_tokenizer(template)
    for only in (True, False):
        texts = [
            tokenizer.decode(row["input_ids"])
            for row in fit(rows, tokenizer, max_length=999, assistant_only=only).dataset
        ]
        assert texts == ["userqassistant" + json.dumps(c) for c in calls]


def test_marks_take_turns_out() -> None:
    turns = [user("q"), assistant("bad") | {"weight": 0}, user("r"), assistant("good")]
    tokenizer = byte_tokenizer()
    (row,) = fit(rows_of({"messages": turns}), tokenizer, max_length=999).dataset
    assert pieces(tokenizer, row["input_ids"], [int(i != -100) for i in row["labels"]]) == ["good<|im_end|>\n"]
    with pytest.raises(LoralignError, match="row 1 marks a turn as not to be learnt, which needs assistant_only: true"):
        fit(rows_of({"messages": turns}), tokenizer, max_length=999, assistant_only=False)


def test_answers_in_a_prompt_are_read_and_not_learnt() -> None:
    row = {"prompt": [user("q"), assistant("of old"), user("r")], "completion": [assistant("new")]}
    tokenizer = byte_tokenizer()
    (made,) = fit(rows_of(row), tokenizer, max_length=999).dataset
    assert "of old<|im_end|>" in tokenizer.decode(made["input_ids"])
    assert pieces(tokenizer, made["input_ids"], [int(i != -100) for i in made["labels"]]) == ["new<|im_end|>\n"]


def test_keys_that_the_template_does_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    template = SMOL.replace("message['content']", "message['content'] + (message.mood or '')")
    turns = [user("q") | {"mood": "!", "stamp": 3}, assistant("a")]
    tokenizer = byte_tokenizer(template)
    with caplog.at_level(logging.INFO, "loralign"):
        (row,) = fit(rows_of({"messages": turns}), tokenizer, max_length=999).dataset
    assert "q!<|im_end|>" in tokenizer.decode(row["input_ids"])
    assert "the data: in turns, not read by the chat template and so not used: stamp" in caplog.text


def test_empty_answers_are_counted_and_nothing_but_them_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    texts = [{"prompt": "One?", "completion": c} for c in ("", " ", "Uno.")]
    turns = [{"messages": [user("One?"), assistant(c)]} for c in ("", "Uno.")]
    for rows, count in ((texts, 2), (turns, 1)):
        assert fit(rows_of(*rows), byte_tokenizer(), max_length=99).empty == count
        assert f"{count} of {len(rows)} answers are empty, only their end is learnt" in caplog.text
        with pytest.raises(LoralignError, match="every answer of the data is empty: give rows whose answers say"):
            fit(rows_of(*rows[:count]), byte_tokenizer(), max_length=99)


def test_a_tokenizer_without_an_end_token_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    fit(rows_of({"prompt": "One?", "completion": " Uno."}), tokenizer, max_length=99)
    assert "the tokenizer has no end token: the model may not learn to stop" in caplog.text


def test_an_answer_without_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{{ 'assistant: ' if add_generation_prompt }}"
    with caplog.at_level(logging.WARNING, "loralign"):
        found = fit(rows_of({"messages": [user("q"), assistant("a")]}), byte_tokenizer(template), max_length=99)
    assert found.supervised == 2 and "may not learn to stop" in caplog.text


# -------------------------------------------------------------------------------------------------- training, real runs


def test_sft_trains_on_marked_messages_and_on_fitted_rows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    fitted = fit(rows_of(*CONVERSATIONS), tokenizer, max_length=200).dataset
    tokenizer.chat_template = MARKED
    losses = []
    for dataset, only in ((Dataset.from_list(CONVERSATIONS), True), (fitted, False)):
        trainer = sft(tmp_path, dataset, tokenizer, assistant_only_loss=only, max_length=200)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
        row = trainer.train_dataset[0]
        mask = [int(label != -100) for label in row["labels"]]
        assert pieces(tokenizer, row["input_ids"], mask) == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]


@pytest.mark.assets
@needs("smollm2-2layer")
def test_smollm2_learns_exactly_the_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("smollm2-2layer"))
    fitted = fit(rows_of(*CONVERSATIONS), tokenizer, max_length=200).dataset
    for row, said, wanted in zip(fitted, CONVERSATIONS, (["one", "two"], ["three"]), strict=True):
        whole = tokenizer.apply_chat_template(said["messages"], return_dict=True)
        assert row["input_ids"] == whole["input_ids"]
        mask = [int(label != -100) for label in row["labels"]]
        assert pieces(tokenizer, row["input_ids"], mask) == [f"{w}<|im_end|>\n" for w in wanted]
