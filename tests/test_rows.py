"""The formats of rows, what their keys mean, and rows held out."""

from __future__ import annotations

import json
import logging
import string
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_world import assistant, jsonl, rows_of, user
from loralign.data.read import read_rows
from loralign.data.rows import rows_format, to_trl
from loralign.data.split import fingerprint, split_eval
from loralign.data.table import Rows
from loralign.types import LoralignError

FEW = settings(max_examples=30, deadline=None)


# -------------------------------------------------------------------------------------------------------------- formats


CONVERTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}),
    "prompt-completion": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "id": 1},
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]},
    ),
    "alpaca": (
        {"instruction": "do", "input": "this", "output": "a", "system": "s", "history": [["x", "y"]], "text": "t"},
        {
            "prompt": [{"role": "system", "content": "s"}, user("x"), assistant("y"), user("do\nthis")],
            "completion": [assistant("a")],
        },
    ),
    "text": ({"text": "t", "label": 3}, {"text": "t"}),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_each_format_is_found_and_converted(name: str) -> None:
    row, wanted = CONVERTED[name]
    dataset = rows_of(row)
    assert rows_format(dataset) == name
    assert list(to_trl(dataset, rows_format(dataset))) == [wanted]


def converted(**row: Any) -> dict[str, Any]:
    dataset = rows_of(row)
    found: dict[str, Any] = to_trl(dataset, rows_format(dataset))[0]
    return found


def test_the_small_rules_of_the_formats() -> None:
    assert converted(instruction="do", input="", output="a", system=None)["prompt"] == [user("do")]
    assert converted(prompt="q", completion=[assistant("a")]) == converted(prompt=[user("q")], completion="a")
    named = [{"from": "system", "value": "s"}, {"from": "tool", "value": "t"}, {"from": "model", "value": "a"}]
    assert [t["role"] for t in converted(conversations=named, system="other")["messages"]] == [
        *("system", "tool", "assistant")
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert converted(messages=[{"role": "assistant", "content": parts}])["messages"] == [assistant("ab")]
    row = {"system": "s", "messages": [user("q"), assistant("a")]}
    assert converted(**row)["messages"] == [{"role": "system", "content": "s"}, *row["messages"]]
    asked = converted(system="s", prompt=[user("q")], completion="a")["prompt"]
    assert asked == [{"role": "system", "content": "s"}, user("q")]
    assert converted(messages=json.dumps([user("q"), assistant("a")]))["messages"] == [user("q"), assistant("a")]


def called(**arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_tool_calls_in_every_spelling_are_one_call() -> None:
    """Arguments as an object or as JSON text; whole lists as JSON text; the old `function_call`; sharegpt's role."""
    wanted = [{"role": "assistant", "content": "", "tool_calls": [called(b=1, a=None)]}]
    text = {"name": "f", "arguments": '{"b": 1, "a": null}'}
    for calls in ([called(b=1, a=None)], [called() | {"function": text}], json.dumps([called(b=1, a=None)])):
        for content in (None, ""):
            turn = {"role": "assistant", "content": content, "tool_calls": calls}
            assert json.dumps(converted(messages=[turn])["messages"]) == json.dumps(wanted)
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"b": 1}}]}
    said = {"from": "function_call", "value": '{"name": "f", "arguments": {"b": 1}}'}
    assert converted(conversations=[said])["messages"] == [bare]
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"b": 1}'}}
    (call,) = converted(messages=[old])["messages"][0]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {"b": 1}}}
    empty = converted(messages=[bare | {"tool_calls": [{"name": "f", "arguments": ""}]}])
    assert empty["messages"][0]["tool_calls"] == [{"name": "f", "arguments": {}}]


def test_tools_stay_as_they_were_written() -> None:
    tools = [{"function": {"parameters": {}, "name": "f"}, "type": "function"}]
    for said in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        found = converted(messages=[assistant("a")], tools=said, chat_template_kwargs='{"a": 1}')
        assert json.dumps(found["tools"]) == json.dumps(tools) and found["chat_template_kwargs"] == {"a": 1}
    assert "tools" not in converted(messages=[assistant("a")], tools=[])


@pytest.mark.parametrize("mark", ["weight", "train", "loss", "trainable"])
def test_a_marked_turn_is_not_learnt(mark: str) -> None:
    turns = [user("q") | {mark: 0}, assistant("a") | {mark: False}, user("r"), assistant("b") | {mark: 1}]
    found = converted(messages=turns)["messages"]
    assert found == [user("q"), assistant("a") | {"weight": 0}, user("r"), assistant("b")]
    for value, turn in ((0.5, assistant("a")), ("no", assistant("a")), (True, user("q"))):
        with pytest.raises(LoralignError, match=f"`{mark}` is|a mark says that the user's turn is learnt"):
            converted(messages=[turn | {mark: value}, assistant("a")])
    with pytest.raises(LoralignError, match=f"row 1: `{mark}` says that the row is not to be learnt: drop the row"):
        converted(**{"messages": turns, mark: False})
    assert "messages" in converted(**{"messages": turns, mark: 1})
    for other in {"weight", "train", "loss", "trainable"} - {mark}:  # one that takes it out is enough
        both = [user("q"), assistant("a") | {mark: 0, other: 1}, user("r"), assistant("b")]
        assert converted(messages=both)["messages"][1] == assistant("a") | {"weight": 0}


def test_every_column_is_used_refused_or_named(caplog: pytest.LogCaptureFixture) -> None:
    for column in ("images", "image", "audio", "videos", "documents"):
        with pytest.raises(LoralignError, match=f"row 1: `{column}` can't be used here, only text is trained: drop"):
            converted(**{"messages": [user("q"), assistant("a")], column: ["x"]})
        assert converted(**{"text": "t", column: []}) == {"text": "t"}
    with pytest.raises(LoralignError, match="row 1: `tools` goes through the chat template, which prompt and"):
        converted(prompt="q", completion="a", tools=[{"name": "f"}])
    with pytest.raises(LoralignError, match="the user's turn holds a part of type image: only text is trained"):
        converted(messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}])
    with caplog.at_level(logging.INFO, "loralign"):
        rows = rows_of({"id": 1, "text": "t"}, {"id": "z", "text": "u", "source": {"a": 1}})
        assert list(to_trl(rows, "text")) == [{"text": "t"}, {"text": "u"}]
    assert "the data: not used: the columns id, source" in caplog.text


BAD_ROWS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"question": "q", "answer": "a"}], "row 1 has the columns question, answer: rename them to one of: messages; p"),
    ([{"prompt": "p", "chosen": "c", "rejected": "r"}], r"preference rows \(prompt, chosen, rejected\), .*DPOTrainer"),
    (
        [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}],
        "row 2 has no `output`, only instruction: alpaca rows need instruction and output",
    ),
    ([{"text": "t"}, {"text": None}], "row 2 has no `text`, only nothing: text rows need text"),
    ([{"text": "t"}, {"txt": "u"}], "row 2 has no `text`, only txt: text rows need text"),
    (
        [{"messages": [assistant("a") | {"tool_calls": [{"name": "f", "arguments": "x=1"}]}]}],
        "row 1: the `arguments` of the call of f are no object: write one, or its JSON text",
    ),
    (
        [{"messages": [assistant("a") | {"tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}]}],
        "row 1: the key 'x' stands twice in the object that begins with 'x': 1 …; keep one",
    ),
    ([{"messages": '[{"role": "user", "role": "gpt", "content": "q"}]'}], "row 1: the key 'role' stands twice"),
    (
        [{"messages": [assistant("a") | {"tool_calls": [{"arguments": {}}]}]}],
        "row 1: a tool call is no object with a name",
    ),
    ([{"messages": [assistant("a")], "tools": "look"}], "row 1: `tools` is no list of objects"),
    ([{"messages": [assistant("a")], "chat_template_kwargs": [1]}], "row 1: `chat_template_kwargs` is no object"),
    ([{"messages": [user("q"), assistant("a") | {"weight": 0}]}], "row 1 has no assistant turn, so nothing to learn"),
    ([{"text": 3}], "row 1: `text` is of type int: write it as text"),
    ([{"prompt": "p", "completion": 3}], "row 1: `completion` is no list of turns: write text in quotes, or"),
    ([{"instruction": "i", "output": 3}], "row 1: the assistant's turn is of type int: write it as text"),
    (
        [{"instruction": "i", "output": "o", "history": [["x"]]}],
        r"row 1: `history` isn't a list of \[question, answer\]",
    ),
    ([{"messages": [user("q"), assistant("a")]}, {"messages": []}], "row 2: the conversation is no list of turns"),
    ([{"messages": [user("q")]}], "row 1 has no assistant turn, so nothing to learn from: add the answer or drop"),
    ([{"messages": [{"role": "boss", "content": "q"}]}], "row 1: a turn has the role 'boss': use one of system, "),
    ([{"messages": [{"role": "user", "content": None}]}], "row 1: the user's turn is missing: write it as text"),
    ([{"prompt": "p", "completion": [user("q")]}], "row 1: `completion` holds a turn that isn't the assistant's: give"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_a_bad_row_is_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows)
    with pytest.raises(LoralignError, match=message) as raised:
        rows = read_rows(path)
        to_trl(rows, rows_format(rows))
    assert str(path) in str(raised.value) and len(str(raised.value)) < 300 + len(str(path))


# ------------------------------------------------------------------------------------------------- split and provenance


def texts_of(texts: list[str]) -> Rows:
    return rows_of(*({"text": text} for text in texts))


def plain(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


@FEW
@given(texts=st.lists(st.text(string.ascii_letters, max_size=2), min_size=2, max_size=40), seed=st.integers(0, 5))
def test_a_share_splits_by_content(texts: list[str], seed: int) -> None:
    rows = texts_of(texts)
    try:
        train, held = split_eval(rows, 0.3, seed=seed)
    except LoralignError as error:
        assert "leaves no evaluation row" in str(error)
        assert min(map(texts.count, texts)) > round(0.3 * len(texts))
        return
    assert 0 < len(held) <= round(0.3 * len(texts))
    assert held.name == f"the held-out rows of {rows.name}" and train.name == rows.name
    assert sorted([*plain(train), *plain(held)]) == sorted(texts)
    assert not set(plain(train)) & set(plain(held))
    assert list(plain(train)) == [t for t in texts if t in set(plain(train))]
    again = split_eval(texts_of(texts[::-1]), 0.3, seed=seed)[1]
    assert set(plain(again)) == set(plain(held))


def test_split_sizes_seeds_and_refusals(tmp_path: Path) -> None:
    rows = texts_of([str(i) for i in range(200)])
    first, second = split_eval(rows, 0.1, seed=0)[1], split_eval(rows, 0.1, seed=1)[1]
    assert len(first) == len(second) == 20 and set(plain(first)) != set(plain(second))
    train, held = split_eval(rows, jsonl(tmp_path, [{"prompt": "q", "completion": "a"}]), seed=0)
    assert train is rows and list(held) == [{"prompt": "q", "completion": "a"}]
    for share in (0.0, 1.0, 3, -1):
        with pytest.raises(LoralignError, match="is no share: give a number between 0 and 1, or a file"):
            split_eval(rows, share, seed=0)
    with pytest.raises(LoralignError, match=r"eval 0.001 of the 200 rows of the data leaves no evaluation row"):
        split_eval(rows, 0.001, seed=0)
    with pytest.raises(LoralignError, match=r"leaves no evaluation row \(1 of them differ\)"):
        split_eval(texts_of(["same"] * 4), 0.5, seed=0)
    with pytest.raises(LoralignError, match="leaves no training row"):
        split_eval(texts_of(["a", "b", "c"]), 0.9, seed=0)


def test_the_fingerprint_sees_rows_order_and_settings() -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    base = fingerprint(rows_of(*rows))
    assert base == fingerprint(rows_of(*rows)) == fingerprint(rows_of({"text": "0"}, *rows).select([1, 2]))
    other = [fingerprint(rows_of(*rows[::-1])), fingerprint(rows_of(*rows), 1), fingerprint(rows_of(*rows), "1", None)]
    other += [fingerprint(rows_of({"text": "ab"})), fingerprint(rows_of(*rows), Path("x")), fingerprint(rows_of())]
    assert len({base, *other}) == 7
    parts = [b"2", b'{"text":"a"}', b'{"text":"b"}']
    assert base == blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16).hexdigest()
    with pytest.raises(TypeError, match="no stable fingerprint"):
        fingerprint(rows_of(*rows), object())
