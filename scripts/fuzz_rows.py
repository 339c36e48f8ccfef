"""Files of rows that people write: broken, of odd values, of odd types, or cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fuzz_world import CASE, Input, Kind, sentence, write

PAIR = {"prompt": "w5 w6", "completion": " w7"}
LINES: list[str | bytes] = [
    b"", b"\n\n", b"\xff\xfe{", b"{", b"[]", b"[1]", b"3", b"null", b'"a"', b"{}", b'{"a": NaN}', b"{'prompt': 'a'}",
    b"[" * 3000,
    json.dumps({"prompt": "w5"}), json.dumps({"completion": "w5"}), json.dumps({"prompt": None, "completion": None}),
    json.dumps({"prompt": 3, "completion": 4}), json.dumps({"prompt": ["w5"], "completion": "w6"}),
    json.dumps({"prompt": {"a": 1}, "completion": "w6"}), json.dumps({"text": 3}), json.dumps({"text": None}),
    json.dumps({"text": ["w5"]}), json.dumps({"messages": "w5"}), json.dumps({"messages": []}),
    json.dumps({"messages": [3]}),
    json.dumps({"messages": [{"role": "user"}]}), json.dumps({"messages": [{"content": "w5"}]}),
    json.dumps({"messages": [{"role": 3, "content": "w5"}]}),
    json.dumps({"messages": [{"role": "user", "content": 3}]}),
    json.dumps({"messages": [{"role": "king", "content": "w5"}, {"role": "assistant", "content": "w6"}]}),
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]}),
    json.dumps({"messages": {"role": "user", "content": "w5"}}), json.dumps({"messages": None}),
    json.dumps({"conversations": [{"from": "human", "value": 3}]}), json.dumps({"conversations": [{"from": "human"}]}),
    json.dumps({"conversations": "x"}), json.dumps({"instruction": 3, "output": "w5"}),
    json.dumps({"instruction": "w5"}),
    json.dumps({"x": "w5"}), json.dumps({**PAIR, "n": 0}).replace('"n": 0', '"n": ' + "9" * 5000),
    json.dumps(PAIR) + "\n{\n" + json.dumps(PAIR), json.dumps(PAIR) + "\n" + json.dumps({"text": "w5"}),
    json.dumps(PAIR) + "\n" + json.dumps({"prompt": 3, "completion": "w5"}), json.dumps(PAIR) + "\n[]",
    json.dumps({"prompt": [{"role": "user", "content": "w5"}], "completion": "w6"}), json.dumps({"": "w5"}),
    json.dumps({"text": ""}), json.dumps({"prompt": "w5", "completion": ""}), json.dumps({"text": "\ud800"}),
]  # fmt: skip
MAYBE = ('"type": "text"', '"text": ""', '"completion": ""', '"king"', '"prompt": [{')
EITHER = {i for i, line in enumerate(LINES) if any(part in str(line) for part in MAYBE)}


def rows(draw: random.Random, number: int) -> Input:
    """A file of rows: broken, of odd values, of odd types, or cut."""
    makers: tuple[Callable[[random.Random, int], tuple[str, bool | None]], ...] = (_lines, _lines, _csv, _binary)
    name, bad = makers[number % len(makers)](draw, number // len(makers))
    where = draw.choice(["data.train", "data.eval"]) if bad else "data.train"
    return Input(["init", "r.yaml", "--set", f"{where}={CASE / name}"], bad)


def _lines(draw: random.Random, number: int) -> tuple[str, bool | None]:
    i = draw.randrange(len(LINES))
    name = draw.choice(["t.jsonl", "t.json"])
    write(CASE / name, LINES[i])
    return name, None if i in EITHER else True


def _csv(draw: random.Random, number: int) -> tuple[str, bool | None]:
    text = draw.choice([
        "", "text", "text\n", "prompt,completion\nw5\n", "prompt,completion\nw5,w6,w7\n", 'text\n"w5\n',
        "a,a\nw5,w6\n", ",a\nw5,w6\n",
        'text\nw"5"w\n"a"b,c\n', "x\nw5\n", "\0", "prompt;completion\nw5;w6\n", "\udcff\n",
    ])  # fmt: skip
    write(CASE / "t.csv", text.encode("utf-8", "surrogateescape"))
    return "t.csv", None if 'w"5"w' in text else True


def _table(draw: random.Random) -> tuple[pa.Table, bool | None]:
    text = pa.array([sentence(i) for i in range(8)])
    odd: list[Any] = [
        pa.array([[("k", 1)]] * 8, pa.map_(pa.string(), pa.int64())), pa.array([None] * 8), pa.array([b"x"] * 8),
        pa.array([[1]] * 8, pa.list_view(pa.int64())), pa.array([1] * 8, pa.duration("s")),
        pa.array([1] * 8, pa.decimal128(9, 2)),
        pa.array(["w5"] * 8, pa.string_view()), pa.array(["w5"] * 8).dictionary_encode(),
        pa.array([[1, 2]] * 8, pa.list_(pa.int8(), 2)),
    ]  # fmt: skip
    column = draw.choice(odd)
    if draw.random() < 0.5:
        return pa.table({"text": text, "odd": column}), None
    return pa.table({"text": column}), None if pa.types.is_string_view(column.type) or pa.types.is_dictionary(
        column.type
    ) else True


def _binary(draw: random.Random, number: int) -> tuple[str, bool | None]:
    table, bad = _table(draw)
    name = draw.choice(["t.parquet", "t.arrow"])
    try:
        if name == "t.parquet":
            pq.write_table(table, CASE / name)
        else:
            with pa.ipc.new_stream(str(CASE / name), table.schema) as f:
                f.write_table(table)
    except pa.ArrowException:  # a type that the format does not have
        return _csv(draw, number)
    if draw.random() < 0.5:
        whole = (CASE / name).read_bytes()
        if draw.random() < 0.5:
            whole, bad = whole[: draw.randrange(len(whole))], True
        else:
            at = draw.randrange(len(whole))
            whole, bad = whole[:at] + draw.randbytes(8) + whole[at + 8 :], None
        write(CASE / name, whole)
    return name, bad


ROWS = (Kind("rows", 240, rows),)
