"""Rows from files, folders and names."""

from __future__ import annotations

import csv
import json
import logging
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from data_world import jsonl, write
from loralign.data.read import read_rows
from loralign.types import LoralignError

FEW = settings(max_examples=30, deadline=None)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30)


# -------------------------------------------------------------------------------------------------------------- reading


@FEW
@given(rows=st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=5))
def test_every_file_kind_gives_the_rows_back(rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = Dataset.from_list(rows)
        write(folder, "a.json", json.dumps(rows, indent=1))
        write(folder, "b.json", "\n" + "\n\n".join(json.dumps(r) for r in rows))
        jsonl(folder, rows, "a.jsonl")
        with (folder / "a.csv").open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerows([["prompt", "completion"], *([r["prompt"], r["completion"]] for r in rows)])
        table.data.table.to_pandas().to_parquet(folder / "a.parquet")
        for file in ("a.json", "b.json", "a.jsonl", "a.csv", "a.parquet"):
            assert list(read_rows(folder / file)) == rows, file


def test_arrow_files_and_saved_folders(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(6)]
    saved = tmp_path / "saved"
    Dataset.from_list(rows).save_to_disk(saved)
    assert list(read_rows(saved)) == rows
    assert list(read_rows(next(saved.glob("*.arrow")))) == rows
    assert list(read_rows(saved, split="train[2:4]")) == rows[2:4]
    both = tmp_path / "both"
    DatasetDict(train=Dataset.from_list(rows[:4]), test=Dataset.from_list(rows[4:])).save_to_disk(both)
    assert list(read_rows(both)) == rows[:4]
    assert list(read_rows(str(both), split="test")) == rows[4:]
    assert list(read_rows(both, split="test+train[:50%]")) == rows[4:] + rows[:2]


def test_values_keep_their_type_their_order_and_their_nulls(tmp_path: Path) -> None:
    text = write(tmp_path, "n.csv", "text\n007\n")
    assert read_rows(text)[0] == {"text": "007"}
    rows = [
        {"id": 1, "messages": [{"b": 1, "a": None}]},
        {"id": "z", "messages": [{"a": 0.5, "b": [1, "x"]}, {"c": True}]},
        {"messages": "text", "tools": []},
    ]
    for name in ("rows.jsonl", "rows.json"):
        path = jsonl(tmp_path, rows, name) if name == "rows.jsonl" else write(tmp_path, name, json.dumps(rows))
        found = read_rows(path)
        assert list(map(json.dumps, found)) == list(map(json.dumps, rows))
        assert found.columns == ("id", "messages", "tools")
        assert list(read_rows(path, split="train[1:]")) == rows[1:]


def test_typed_tables_say_nothing_that_a_row_did_not(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q", "name": None}], "images": [b"x"], "odd": 1},
        {"messages": [{"role": "user", "content": "q", "name": "n"}], "images": [], "odd": 2},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet")
    assert list(found) == [
        {"messages": [{"role": "user", "content": "q"}], "images": True},
        {"messages": [{"role": "user", "content": "q", "name": "n"}]},
    ]
    assert found.columns == ("messages", "images", "odd")
    Dataset.from_list([{"question": "q"}] * 3).to_parquet(tmp_path / "other.parquet")
    other = read_rows(tmp_path / "other.parquet")
    assert len(other) == 3 and other.columns == ("question",)


GOOD = '{"text": "a"}\n'
BAD_FILES = {
    "empty.jsonl": ("", "is empty: give a file with at least one row"),
    "blank.jsonl": ("\n \n", "has no rows: give a file with at least one"),
    "broken.jsonl": (
        GOOD + '\n{"text": \n',
        r"broken.jsonl, line 3 is not JSON \(Expecting value, column 9\): write one",
    ),
    "list.jsonl": (GOOD + "[1]\n", "list.jsonl, line 2 is no object but list: write one object per line, or one list"),
    "half.jsonl": (GOOD * 1500 + '{"text": "\\ud800"}', "row 1501 holds half a character"),
    "deep.jsonl": ("[" * 100_000, "line 1 is nested too deeply"),
    "broken.json": ('[{"text": "a"},\n {"text" 2}]', r"broken.json, line 2 is not JSON \(Expecting ':' delimiter"),
    "doubled.jsonl": (
        GOOD + '{"prompt": "p", "text": "b", "text": "c"}\n',
        r"doubled.jsonl, line 2: the key 'text' stands twice in the object that begins with 'prompt': \"p\" …; keep",
    ),
    "inside.json": (
        '[{"text": "a"},\n {"messages": [{"role": "user", "role": "user", "content": "q"}]}]',
        r"inside.json: the key 'role' stands twice in the object that begins with 'role': \"user\" …; keep one",
    ),
    "none.json": ("[]", "has no rows"),
    "latin.jsonl": (b'{"text": "\xe9"}', r"is not UTF-8 text \(byte 10\): save it as UTF-8"),
    "wide.csv": ("text\na,b\n", "line 2: 2 fields, the header has 1: put fields with commas or line breaks in quotes"),
    "open.csv": ('text\n"a\n', "line 2 is not csv .*: mend its quotes"),
    "twice.csv": ("a,a\n1,2\n", "line 1: the header names a column twice or not at all"),
    "rows.parquet": ("no", "is no parquet file .*: write it again"),
    "rows.arrow": ("no", "is no arrow file .*: write it again"),
    "rows.txt": ("hello", "ends in .txt, which can't be read: give a .json, .jsonl, .csv, .parquet, .arrow file, or a"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[name]
    path = write(tmp_path, name, text)
    with pytest.raises(LoralignError, match=message) as raised:
        read_rows(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_columns_that_rows_of_text_never_have_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that no format understands are not even read."""
    text = pa.array(["a", "b"])
    odd = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))
    for metadata in (None, {b"huggingface": b"{broken"}, {b"huggingface": b"[]"}):
        table = pa.table({"text": text, "history": odd, "odd": odd})
        path = tmp_path / "rows.parquet"
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, path)
        with caplog.at_level(logging.WARNING, "loralign"):
            assert list(read_rows(path)) == [{"text": "a"}, {"text": "b"}]
    assert "the columns history are of types that cannot be read" in caplog.text


def test_damaged_binary_files_and_folders_are_one_sentence(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"row {i}" * 50} for i in range(2000)])
    rows.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    whole = arrow.read_bytes()
    cut = tmp_path / "cut.arrow"
    for part in (0.01, 0.3, 0.6, 0.99):
        cut.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(LoralignError, match="is no arrow file"):
            read_rows(cut)
    state, info = (tmp_path / "saved" / n for n in ("state.json", "dataset_info.json"))
    for file, text in ((state, "[]"), (state, '{"_data_files": null}'), (info, "[]"), (info, "{")):
        kept = file.read_text(encoding="utf-8")
        file.write_text(text, encoding="utf-8")
        with pytest.raises(LoralignError, match="damaged save_to_disk folder"):
            read_rows(tmp_path / "saved")
        file.write_text(kept, encoding="utf-8")
    with pytest.raises(LoralignError, match="line 1 holds a number of too many digits"):
        read_rows(write(tmp_path, "long.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}"))


@pytest.mark.parametrize("name", ["text", "json", "csv", "imagefolder"])
def test_a_builder_of_datasets_is_no_name_of_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train on every file of the current folder."""
    write(tmp_path, "diary.txt", "secret")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoralignError, match=f"{name} is a kind of file, not a file"):
        read_rows(name)


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("nowhere.jsonl", "/no/where", "two words"):
        with pytest.raises(LoralignError, match=f"no such file: {name}"):
            read_rows(name)
    with pytest.raises(
        LoralignError, match=r"someone/rows is no local file, and the hub gave none .*give a local file"
    ):
        read_rows("someone/rows")
    jsonl(tmp_path, [{"text": "a"}])
    with pytest.raises(LoralignError, match=r"was not written by save_to_disk: give one of its files \(rows.jsonl\)"):
        read_rows(tmp_path)
    write(tmp_path, "state.json", "{}")
    with pytest.raises(LoralignError, match="is a damaged save_to_disk folder"):
        read_rows(tmp_path)
    with pytest.raises(LoralignError, match="has no split 'test': it has train"):
        read_rows(tmp_path / "rows.jsonl", split="test")
    two = tmp_path / "two"
    DatasetDict({name: Dataset.from_list([{"text": name}]) for name in "ab"}).save_to_disk(two)
    with pytest.raises(LoralignError, match="has the splits a, b: name one"):
        read_rows(two)
