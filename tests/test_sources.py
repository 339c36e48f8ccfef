"""Rows under other names of columns, and rows of several sources: what is taken, held out, shown and recorded."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_world import assert_one_sentence, run, world_in
from data_world import assistant, jsonl, user, write
from loralign.cli.run import job_of
from loralign.compare.identity import settings as study_settings
from loralign.compare.spec import Spec, TaskSpec
from loralign.config.sections import DataSection
from loralign.config.sources import to_data
from loralign.data.columns import NAMES, faults, likely
from loralign.data.mix import Source, taken
from loralign.data.rows import read_trl
from loralign.data.sources import read_sources
from loralign.data.split import split_eval
from loralign.methods.build import build
from loralign.train.begun import settings_of
from loralign.train.task_text import TextRows, TextTasks, read_tasks
from loralign.train.task_trainer import TaskTraining
from loralign.types import LoralignError
from tiny_trl import words

FEW = settings(max_examples=60, deadline=None)
PAIR = {"prompt": "question", "completion": "answer"}
ASKED = [{"question": f"q{i}", "answer": f"a{i}", "id": i} for i in range(3)]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where the commands run, with files of three kinds."""
    with world_in(tmp_path_factory.mktemp("sources")) as root:
        lines = [f"{words(4, i)},{words(3, 50 + i)}" for i in range(40)]
        write(root, "faq.csv", "\n".join(["Question,Answer", *lines]) + "\n")
        jsonl(root, ({"instruction": words(4, 90 + i), "output": words(3, i)} for i in range(20)), "alpaca.jsonl")
        chats = ({"messages": [user(words(4, 150 + i)), assistant(words(3, i))]} for i in range(10))
        jsonl(root, chats, "chat.jsonl")
        jsonl(root, [{"text": "w1 w2 w3"}] * 4, "text.jsonl")
        write(root, "empty.jsonl", "")
        yield root


# -------------------------------------------------------------------------------------------------------------- columns


def written(folder: Path, kind: str) -> Path:
    """ASKED as a file of some kind."""
    table = Dataset.from_list(ASKED)
    if kind == "saved":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "arrow":
        return next(written(folder, "saved").glob("*.arrow"))
    if kind == "parquet":
        table.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    text = {
        "csv": "question,answer,id\n" + "".join(f"q{i},a{i},{i}\n" for i in range(3)),
        "json": json.dumps(ASKED),
        "jsonl": "".join(json.dumps(row) + "\n" for row in ASKED),
    }
    return write(folder, f"rows.{kind}", text[kind])


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "arrow", "saved"])
def test_columns_of_other_names_are_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    rows = read_trl(written(tmp_path, kind), PAIR)
    assert list(rows) == [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
    chat = read_trl(written(tmp_path, kind), {"instruction": "question", "output": "answer"})
    assert list(chat) == [{"prompt": [user(f"q{i}")], "completion": [assistant(f"a{i}")]} for i in range(3)]


def test_names_may_be_exchanged_and_what_is_mapped_decides_the_format(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "messages": [user("u"), assistant("v")], "text": "t"}
    file = jsonl(tmp_path, [row])
    assert read_trl(file)[0].keys() == {"messages"}
    turned = read_trl(file, {"prompt": "completion", "completion": "prompt"})
    assert list(turned) == [{"prompt": "c", "completion": "p"}]
    assert list(read_trl(file, {"text": "text"})) == [{"messages": row["messages"]}]  # a name of its own maps nothing


BAD_MAPS: list[tuple[dict[str, str], str]] = [
    ({"promt": "question"}, "maps 'promt', which is no column here; did you mean 'prompt'?"),
    ({"xyz": "question"}, "maps 'xyz', which is no column here; the columns here are messages, prompt, completion, "),
    ({"question": "prompt", "answer": "completion"}, "the other way round, {prompt: question, completion: answer}"),
    ({"prompt": "id", "completion": "id"}, "maps both 'prompt' and 'completion' to 'id': a column has one meaning"),
    (
        {"prompt": "questions"},
        "no column 'questions', which `columns` names for `prompt`; did you mean 'question'? They",
    ),
    ({"prompt": "nothing"}, "no column 'nothing', which `columns` names for `prompt`; they are question, answer, id"),
    ({"system": "id", **PAIR, "text": "text"}, "no column 'text', which `columns` names for `text`"),
    (
        {"history": "id", **PAIR},
        "`columns` names a `history`, which prompt-completion rows don't use: leave it out, or",
    ),
    ({"prompt": "question"}, "has the columns question (as `prompt`), answer, id: rename them to one of: messages; "),
]


@pytest.mark.parametrize(("columns", "said"), BAD_MAPS)
def test_wrong_names_are_one_sentence(columns: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(LoralignError) as caught:
        read_trl(jsonl(tmp_path, ASKED), columns)
    assert said in str(caught.value) and "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_the_rows_have_already_is_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"prompt": "p", "question": "q", "completion": "c"}])
    with pytest.raises(
        LoralignError, match=r"has a column 'prompt' of its own beside 'question', which `columns` names"
    ):
        read_trl(file, {"prompt": "question"})
    with pytest.raises(LoralignError, match=r"they are prompt, question, completion, which need no other names: \{sou"):
        read_trl(file, {"output": "answer"})


def test_a_row_that_lacks_a_column_is_told_in_its_own_names(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [*ASKED, {"question": "q", "reply": "r"}])
    with pytest.raises(
        LoralignError, match=r"row 4 has no `answer`, only question, reply: .* need question and answer"
    ):
        read_trl(file, PAIR)


@pytest.mark.parametrize(
    ("there", "mend"),
    [
        (["id", "Question", "Answer"], {"instruction": "Question", "output": "Answer"}),
        (["instruction", "response"], {"output": "response"}),
        (["prompt", "chosen"], {"instruction": "prompt", "output": "chosen"}),
        (["conversation", "id"], {"messages": "conversation"}),
        (["body"], {"text": "body"}),
        (["x", "y"], {}),
    ],
)
def test_the_refusal_of_unknown_columns_has_a_mend_that_works(there: list[str], mend: dict[str, str]) -> None:
    assert likely(there) == mend
    turns = [user("u"), assistant("v")]
    file = jsonl(Path(), [{c: turns if c == "conversation" else c for c in there}], "odd.jsonl")
    with pytest.raises(LoralignError, match=r"or map them by `data.columns`"):
        read_trl(file)
    assert not mend or len(read_trl(file, mend)) == 1


@given(st.dictionaries(st.sampled_from([*NAMES, "x"]), st.sampled_from(["a", "b", "prompt", "text"]), max_size=4))
@FEW
def test_a_map_is_taken_where_its_names_are_ours_and_its_columns_differ(columns: dict[str, str]) -> None:
    assert (faults(columns) == "") == ("x" not in columns and len({*columns.values()}) == len(columns))


# ---------------------------------------------------------------------------------------------------------------- a mix


SHARES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(lambda ns: [n / sum(ns) for n in ns])


@given(SHARES, st.lists(st.integers(1, 300), min_size=4, max_size=4))
@FEW
def test_shares_are_those_of_the_mix_to_half_a_row(shares: list[float], rows: list[int]) -> None:
    rows = rows[: len(shares)]
    once, repeated = taken(rows, shares, "once"), taken(rows, shares, "all")
    assert all(n <= have for n, have in zip(once, rows, strict=True)) and any(map(int.__eq__, once, rows))
    assert all(n >= have for n, have in zip(repeated, rows, strict=True)) and any(map(int.__eq__, repeated, rows))
    for counts, size in ((once, min), (repeated, max)):
        whole = size(n / share for n, share in zip(rows, shares, strict=True))
        assert all(abs(n - share * whole) <= 0.5 + 1e-6 for n, share in zip(counts, shares, strict=True))
    assert taken(rows, [None] * len(rows), "once") == rows


CHAT = {"instruction": "Question", "output": "Answer"}
FILES = {"faq.csv": CHAT, "alpaca.jsonl": {}, "chat.jsonl": {}}


def three(*shares: float) -> list[Source]:
    """The files of the world, with shares or without."""
    given = shares or (None,) * len(FILES)
    return [Source(name, columns, share=n) for (name, columns), n in zip(FILES.items(), given, strict=True)]


def lines(rows: Any) -> list[str]:
    return [json.dumps(row) for row in rows]


def test_without_shares_every_row_of_every_source_is_there_once_and_spread() -> None:
    rows, parts = read_sources(three())
    alone = [row for source in three() for row in lines(read_sources(source)[0])]
    assert sorted(lines(rows)) == sorted(alone) and [(p.rows, p.taken) for p in parts] == [(40, 40), (20, 20), (10, 10)]
    for n in range(len(rows) + 1):  # every beginning holds each source at about its part
        seen = Counter(rows.places[i][0] for i in range(n))
        assert all(abs(seen[p.source.name] - n * p.rows / 70) < 1 for p in parts)
    assert [rows.places[i][1] for i in range(70) if rows.places[i][0] == "faq.csv"] == [*range(1, 41)]


def test_a_row_knows_where_it_stands() -> None:
    rows, _ = read_sources(three(0.5, 0.3, 0.2), mix="all", seed=3)
    own = {source.name: list(read_sources(source)[0]) for source in three()}
    for i, row in enumerate(rows):
        name, number = rows.places[i]
        assert own[name][number - 1] == row and rows.places.said(i) == f"{name}, row {number}"


def test_rows_of_a_split_keep_their_numbers(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [*({"text": f"w{i}"} for i in range(5)), {"text": 3}])
    rows = read_trl(file, split="train[2:5]")
    assert [rows.places[i] for i in range(3)] == [(str(file), n) for n in (3, 4, 5)]
    with pytest.raises(LoralignError, match=r"row 6: `text` is of type int"):
        read_trl(file, split="train[4:]")
    both = DatasetDict({name: Dataset.from_list([{"text": f"{name} w{i}"} for i in range(3)]) for name in ("a", "b")})
    both.save_to_disk(tmp_path / "saved")
    entries = {
        "train": {"source": f"{tmp_path}/saved", "split": "a"},
        "eval": {"source": f"{tmp_path}/saved", "split": "b"},
    }
    made = to_data(DataSection.model_validate(entries))
    train, held_out = split_eval(read_sources(made.train)[0], made.eval or 0, seed=0)
    assert [row["text"][0] for rows in (train, held_out) for row in rows] == [*"aaabbb"]


def test_a_mix_is_drawn_by_the_seed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loralign"):
        rows, _ = read_sources(three(0.5, 0.3, 0.2), seed=1)
    assert "20 of 40 rows" not in caplog.text and len(rows) == 50
    assert (
        "training rows: 25 of 40 rows of faq.csv (50.0 %); 15 of 20 rows of alpaca.jsonl (30.0 %); 10 of 10 rows of "
        "chat.jsonl (20.0 %); 50 in all; `data.mix: all` leaves none out and repeats rows instead" in caplog.text
    )
    assert len({*lines(rows)}) == 50
    assert lines(rows) == lines(read_sources(three(0.5, 0.3, 0.2), seed=1)[0])
    assert sorted(lines(rows)) != sorted(lines(read_sources(three(0.5, 0.3, 0.2), seed=2)[0]))
    caplog.clear()
    with caplog.at_level(logging.INFO, "loralign"):
        rows, parts = read_sources(three(0.5, 0.3, 0.2), mix="all", seed=1)
    assert [(p.taken, p.times) for p in parts] == [(40, 1), (24, 2), (16, 2)] and "all` leaves" not in caplog.text
    assert "24 of 20 rows of alpaca.jsonl (30.0 %, each up to 2 times); 16 of 10 rows of chat.jsonl" in caplog.text
    often = Counter(Counter(lines(rows)).values())
    assert often == {1: 40 + 16 + 4, 2: 4 + 6}


BAD_SOURCES: list[tuple[str, str]] = [
    ("[]", "`data.train` is empty: name a file"),
    ("[alpaca.jsonl, ./alpaca.jsonl]", "`data.train` names ./alpaca.jsonl twice: name it once"),
    ("[{source: a, share: 0.5}, {source: b, share: 0.7}]", "has shares that sum to 1.2, not to 1: 0.417, 0.583 would"),
    ("[{source: a, share: 0.5}, b]", "has sources with a share, and b without: give one to each, or to none"),
    ("[{source: a, share: 70}, b]", "`data.train`, source 1: `share` must be less than 1, not 70"),
    ("[a, {source: b, share: 0}]", "`data.train`, source 2: `share` must be greater than 0"),
    ("{source: a, share: 0.5}", "has one source, a, and a share of it: leave `share` out"),
    ("[{path: a, type: alpaca}, b]", "source 1: `path` is no key of a source; it is called `source` here"),
    ("{a.jsonl: 0.7, b.jsonl: 0.3}", "is no key of a source; the keys there are source, share, columns, split"),
    ("{source: a, columns: {prompt: ''}}", "`data.train`: `columns.prompt` is empty: leave it out, or say what it is"),
    ("[{source: a, columns: {promt: q}}]", "source 1: `columns` maps 'promt', which is no column here; did you mean"),
    ("a.jsonl,b.jsonl", "no such file: a.jsonl,b.jsonl; paths count from … several sources are a list"),
    ("[alpaca.jsonl, empty.jsonl]", "empty.jsonl is empty: give a file with at least one row"),
    ("[alpaca.jsonl, nowhere.jsonl]", "no such file: nowhere.jsonl"),
    ("[alpaca.jsonl, faq.csv]", "faq.csv, row 1 has the columns Question, Answer:  … data.columns … output: Answer"),
    ("[alpaca.jsonl, rows.jsonl]", "alpaca.jsonl has rows of turns, rows.jsonl of text: give all in one form"),
    ("[{source: alpaca.jsonl, split: test}]", "alpaca.jsonl has no split 'test': it has train"),
    ("[{source: alpaca.jsonl, share: 0.99}, {source: chat.jsonl, share: 0.01}]", "less than a row of so small a mix"),
]


@pytest.mark.parametrize(("train", "said"), BAD_SOURCES)
def test_wrong_sources_are_one_sentence(train: str, said: str) -> None:
    done = run("rows", "r.yaml", "--set", f"data.train={train}", "--set", "data.eval=null")
    text = assert_one_sentence(done)
    assert done.code == 2 and all(part in text for part in said.split(" … ")), text


def test_a_row_that_is_repeated_too_often_is_refused(tmp_path: Path) -> None:
    one = jsonl(tmp_path, [{"messages": [user("w1"), assistant("w2")]}], "one.jsonl")
    sources = [Source("faq.csv", CHAT, share=0.25), Source(str(one), share=0.75)]
    with pytest.raises(
        LoralignError, match=r"each of the 1 rows of .*one.jsonl would be taken 120 times \(at most 100\)"
    ):
        read_sources(sources, mix="all")


def test_what_goes_with_a_mix_and_what_does_not() -> None:
    with pytest.raises(LoralignError, match=r"`data.mix: all` repeats rows where shares ask for it"):
        job_of(Path("r.yaml"), ["data.mix=all"])
    with pytest.raises(LoralignError, match=r"`data.eval` has a share of a mix"):
        job_of(Path("r.yaml"), ["data.eval={source: rows.jsonl, share: 0.5}"])
    said = f"data={json.dumps({'train': ENTRIES, 'mix': 'all'})}"
    with pytest.raises(
        LoralignError, match=r"`method: recommended` is for rows that are gone .* `data.mix: all` repeats"
    ):
        job_of(Path("r.yaml"), [said, "method=recommended", "options={}", "rank=null"])


# ------------------------------------------------------------------------------------------------------------- held out


def test_rows_that_say_the_same_in_two_formats_are_held_out_together(tmp_path: Path) -> None:
    turns = [(words(4, i), words(3, 90 + i)) for i in range(30)]
    one = jsonl(tmp_path, ({"instruction": q, "output": a} for q, a in turns), "one.jsonl")
    two = jsonl(tmp_path, ({"messages": [user(q), assistant(a)]} for q, a in turns), "two.jsonl")
    train, held = split_eval(read_sources([Source(str(one)), Source(str(two))])[0], 0.2, seed=0)
    assert len(train) + len(held) == 60 and len(held) == 12
    assert not {*map(questions, train)} & {*map(questions, held)}
    alone, other = split_eval(read_sources(str(one))[0], 0.2, seed=0)
    assert len(alone) + len(other) == 30 and train.places.counts() == (24, 24)


def questions(row: dict[str, Any]) -> str:
    return str((row.get("messages") or row["prompt"])[0]["content"])


def test_a_bad_row_keeps_its_number_after_others_were_held_out(tmp_path: Path) -> None:
    """Text among turns is found when rows become tokens, after the split."""
    rows = [{"prompt": [user(words(3, i))], "completion": "w5"} for i in range(9)] + [
        {"prompt": "w1", "completion": "w"}
    ]
    file = jsonl(tmp_path, rows)
    done = run("rows", "r.yaml", "--set", f"data={{train: {file}, eval: 0.3}}", "--set", "seed=1")
    assert f"{file}, row 10: rows mix text and turns" in assert_one_sentence(done)


# ------------------------------------------------------------------------------------------------------ a run, a record


ENTRIES = [
    {"source": "faq.csv", "share": 0.5, "columns": CHAT},
    {"source": "alpaca.jsonl", "share": 0.3},
    {"source": "chat.jsonl", "share": 0.2},
]
MIXED = ("--set", f"data={json.dumps({'train': ENTRIES, 'eval': 0.2, 'max_length': 32})}", "--set", "method=lora",
         "--set", "options={}")  # fmt: skip


def test_rows_names_the_source_of_each_row_and_counts_as_train_does() -> None:
    done = run("rows", "r.yaml", *MIXED, "--count", 9)
    found = json.loads(run("rows", "r.yaml", *MIXED, "--json", "--count", 99).out)
    heads = [line for line in done.out.splitlines() if line.startswith("training row ")]
    shown = [f"training row {n} ({row['source']}, row {row['number']}): " for n, row in enumerate(found["first"], 1)]
    assert (
        len(heads) == 9 and all(map(str.startswith, heads, shown)) and {r["source"] for r in found["first"]} == {*FILES}
    )
    seen = Counter(row["source"] for row in found["first"])
    assert found["sources"] == [
        {"source": name, "read": read, "taken": count, "rows": seen[name]}
        for name, read, count in zip(FILES, (40, 20, 10), (25, 15, 10), strict=True)
    ]
    assert done.out.splitlines()[-1].endswith("; " + ", ".join(f"{seen[name]} of {name}" for name in FILES))


def test_a_mixed_run_is_recorded_resumed_and_asked_by_its_names(caplog: pytest.LogCaptureFixture) -> None:
    done = run("train", "r.yaml", *MIXED, "--set", "output=mixed")
    assert done.code == 0, done.err
    data = json.loads(Path("mixed/run.json").read_text(encoding="utf-8"))["data"]
    counted = json.loads(run("rows", "r.yaml", *MIXED, "--json").out)
    assert data["name"] == [*FILES] and data["rows"] == counted["rows"]
    assert [(s["rows"], s["taken"], s["share"]) for s in data["sources"]] == [
        (40, 25, 0.5),
        (20, 15, 0.3),
        (10, 10, 0.2),
    ]
    assert data["sources"][0]["columns"] == CHAT and len({s["content"] for s in data["sources"]}) == 3
    card = Path("mixed/README.md").read_text(encoding="utf-8")
    assert "| data: source 1 | name faq.csv; rows 40; taken 25; share 0.5; columns instruction: Question, " in card

    stopped = Path("stopped")
    shutil.copytree("mixed", stopped)
    shutil.rmtree(stopped / "checkpoints/checkpoint-6")
    for file in [p for p in stopped.iterdir() if p.is_file()]:
        file.unlink()
    other = run("train", "r.yaml", *MIXED, "--set", "output=stopped", "--set", "data.mix=all", "--resume")
    assert other.code == 2 and "the rows of `data.train` are not those that the run began with" in other.err
    again = run("train", "r.yaml", *MIXED, "--set", "output=stopped", "--resume")
    assert again.code == 0, again.err
    name = "adapter_model.safetensors"
    assert (stopped / name).read_bytes() == Path("mixed", name).read_bytes()

    asked = ("eval", "mixed", "--base", "base", "--limit", 2, "--max-new-tokens", 2, "--data")
    done = run(*asked, "faq.csv")
    assert done.code == 0 and "faq.csv: columns as in the adapter's training: `instruction` is Question, " in done.err
    done = run(*asked, "alpaca.jsonl")
    assert done.code == 0 and "columns as in" not in done.err
    assert run(*asked, "faq.csv", "--columns", json.dumps(CHAT)).code == 0
    for columns, said in (("{}", "has the columns Question, Answer"), ("prompt=Question", "write our names and those")):
        assert said in assert_one_sentence(run(*asked, "faq.csv", "--columns", columns))


def test_runs_of_before_there_were_sources_resume() -> None:
    """What a run began with names neither sources nor the mix: their content is in the fingerprint of the rows."""
    keys = settings_of(job_of(Path("r.yaml"), MIXED[1::2]), {"data.train": "x"})
    assert {key for key in keys if key.startswith("data.")} == {
        "data.train", "data.max_length", "data.assistant_only", "data.packing"
    }  # fmt: skip


def test_a_study_is_bound_to_its_names_of_columns() -> None:
    task = TaskSpec("sft", "a", "b", "c")
    spec = Spec("m", task, (), Path("out"))
    assert "task.columns" not in study_settings(spec)  # studies of before there were names go on
    assert study_settings(replace(spec, task=replace(task, columns=PAIR)))["task.columns"] == PAIR


def test_a_tasks_file_reads_its_columns_from_a_typed_file(tmp_path: Path) -> None:
    rows = [{"sentence": f"w{i}", "topic": i % 2, "text": "odd"} for i in range(8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    files = (TextRows("", str(tmp_path / "rows.parquet"), 0.25),)
    recipe, training = build("lora"), TaskTraining(1e-3)
    job = TextTasks("m", recipe, training, tmp_path, files, split=(1, 1), text="sentence", label="topic")
    assert {text for _, _, train, test in read_tasks(job) for text, _ in (*train, *test)} == {f"w{i}" for i in range(8)}


def test_suggest_takes_names_of_columns_and_writes_them() -> None:
    asked = ("suggest", "base", "--rows", "faq.csv", "--length", 32, "--device", "cpu", "--memory", 4)
    assert "`--columns`" in assert_one_sentence(run(*asked))
    done = run(*asked, "--columns", json.dumps(CHAT), "--json")
    assert json.loads(done.out)["recipe"]["data"] == {"train": "faq.csv", "columns": CHAT, "max_length": 32}, done.err
    assert "name them with --rows" in assert_one_sentence(run("suggest", "base", "--columns", "{prompt: a}"))
