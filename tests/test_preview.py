"""`loralign rows`: what it shows is what `train` trains on, marked where `train` has loss."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import warm
from cli_world import assert_one_sentence, run, world_in
from data_world import CONVERSATIONS, assistant, byte_tokenizer, jsonl, pieces, rows_of, user
from loralign.cli.app import main
from loralign.cli.run import job_of
from loralign.data.chat import fit
from loralign.train.preview import shown
from loralign.train.sft import prepare
from tiny_trl import tokenizer, words

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where the commands run."""
    with world_in(tmp_path_factory.mktemp("rows")) as root:
        yield root


UNLEARNT = [user("w4 w5"), assistant("w6 w7") | {"weight": 0}, user("w8"), assistant("w9 w10 w11")]
LONG = {"prompt": words(40, 1), "completion": " " + words(3, 2)}
CASES: dict[str, list[dict[str, Any]]] = {
    "chat": [{"messages": UNLEARNT}, {"messages": [user("w12"), assistant("w13"), user("w14"), assistant("w15 w16")]}],
    "turns": [{"prompt": [user("w4 w5")], "completion": [assistant("w6")]}] * 2,
    "completion": [{"prompt": words(n, n), "completion": " " + words(6 + n, 9 - n)} for n in (4, 5, 6)],
    "text": [{"text": words(n, n)} for n in (4, 20, 9)],
}


def options(name: str, folder: Path, *more: str) -> list[str]:
    rows = jsonl(folder, CASES[name])
    given = [f"data={{train: {rows}}}", "method=lora", "options={}", f"output={folder / 'out'}", "data.max_length=16"]
    return [word for key in (*given, *more) for word in ("--set", key)]


def trained(words: list[str]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row of the trainer that `train` makes; packed rows are taken apart again."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        made = prepare(job_of(Path("r.yaml"), words[1::2]), resume=False, progress=None).trainer.train_dataset
    found = []
    for row in made:
        start = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            found.append(tuple(row[key][start : start + length] for key in ("input_ids", "labels")))
            start += length
    return found


@pytest.mark.parametrize("more", ["seed=0", "data.assistant_only=false", "data.packing=true"])
@pytest.mark.parametrize("name", CASES)
def test_the_rows_are_those_of_the_trainer_and_the_marks_are_its_labels(name: str, more: str, tmp_path: Path) -> None:
    given = options(name, tmp_path, more)
    if "only" in more and name == "chat":
        assert "needs assistant_only: true" in run("rows", "r.yaml", *given).err
        return
    found = json.loads(run("rows", "r.yaml", *given, "--json", "--count", 9).out)
    theirs, ours = trained(given), [(row["input_ids"], row["labels"]) for row in found["first"]]
    assert Counter(map(str, ours)) == Counter(map(str, theirs)) if "packing" in more else ours == theirs
    coder = tokenizer()
    for row, text in zip(found["first"], marked(run("rows", "r.yaml", *given, "--count", 9).out), strict=True):
        predicted = [-100, *row["labels"][1:]]  # nothing is before the first token
        spoken = [token for part in re.findall("⟦(.*?)⟧", text) for token in coder(part)["input_ids"]]
        assert spoken == [label for label in predicted if label != -100]
        assert coder(re.sub("[⟦⟧]", " ", text))["input_ids"] == row["input_ids"]
        assert (row["tokens"], row["learnt"]) == (len(row["input_ids"]), len(spoken))
    assert found["tokens"] == sum(len(ids) for ids, _ in theirs)
    assert found["learnt"] == sum(label != -100 for _, labels in theirs for label in labels[1:])
    assert found["longest"] == max(len(ids) for ids, _ in theirs)
    assert found["rows"] == len(theirs) and not Path(tmp_path / "out" / "run.json").exists()


def marked(out: str) -> list[str]:
    """The texts of the rows that a call without --json shows."""
    return re.findall(r"^training row \d+ \(.*, row \d+\): .*\n(.*)$", out, flags=re.MULTILINE)


def test_a_turn_of_weight_0_is_not_marked(tmp_path: Path) -> None:
    done = run("rows", "r.yaml", *options("chat", tmp_path))
    first, second = marked(done.out)
    assert re.findall("w[0-9]+", "".join(re.findall("⟦.*?⟧", first))) == ["w9", "w10", "w11"]
    assert re.findall("w[0-9]+", "".join(re.findall("⟦.*?⟧", second))) == ["w13", "w15", "w16"]


def test_cut_and_dropped_rows_and_ends_are_told(tmp_path: Path) -> None:
    """The row that is dropped comes first: a row's number is not its number in the file."""
    rows = [LONG, *({"prompt": words(4, n), "completion": " " + words(n, 50 + n)} for n in (6, 7, 8, 1))]
    given = ["data.train=" + str(jsonl(tmp_path, rows)), "data.eval=null", "data.max_length=12"]
    said = [word for key in given for word in ("--set", key)]
    found = json.loads(run("rows", "r.yaml", *said, "--json", "--count", 9).out)
    assert [(row["tokens"], row["cut"], row["end_learnt"]) for row in found["first"]] == [
        (11, False, True), (12, False, True), (12, True, False), (6, False, True)
    ]  # fmt: skip
    counts = {key: found[key] for key in ("read", "rows", "cut", "dropped", "longest", "max_length")}
    assert counts == {"read": 5, "rows": 4, "cut": 2, "dropped": 1, "longest": 12, "max_length": 12}
    out = run("rows", "r.yaml", *said, "--count", 3).out
    file = tmp_path / "rows.jsonl"
    assert f"training row 3 ({file}, row 4): 12 tokens (cut), 8 learnt, no end token is learnt\n" in out
    assert "training row 4" not in out
    share = f"{found['tokens']} tokens, {found['learnt']} learnt ({100 * found['learnt'] / found['tokens']:.1f} %)"
    assert out.splitlines()[-1] == (
        f"all: 4 rows of 5 that were read, {share}; longest 12 tokens; 2 rows cut at 12 tokens, 1 dropped"
    )


def test_rows_that_a_method_keeps_apart_are_counted() -> None:
    words = ("--set", "method=allocating-lora", "--set", "options={rows: 5}", "--count", 0)
    assert json.loads(run("rows", "r.yaml", *words, "--json").out)["set_apart"] == 5
    assert run("rows", "r.yaml", *words).out.endswith("; 5 kept apart for the method to decide by\n")


def test_a_pipe_gets_plain_text_and_a_terminal_the_same_in_style(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    piped = warm.run([sys.executable, "-m", "loralign", "rows", "r.yaml", "--count", "2"])
    assert piped.returncode == 0, piped.stderr
    assert "⟦" in piped.stdout and "\x1b" not in piped.stdout
    assert piped.stdout == run("rows", "r.yaml", "--count", 2).out
    for setting, style in (("", "\x1b[32m\x1b[1m"), ("1", "\x1b[1m")):
        monkeypatch.setenv("NO_COLOR", setting)
        with redirect_stdout(Terminal()) as shown, redirect_stderr(io.StringIO()):
            assert main(["rows", "r.yaml", "--count", "2"]) == 0
        assert f"{style}⟦" in shown.getvalue() and ("\x1b[32m" in shown.getvalue()) == (not setting)
        assert re.sub(r"\x1b\[\d+m", "", shown.getvalue()) == piped.stdout


def test_characters_that_a_terminal_obeys_are_shown(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads(Path("base/config.json").read_text(encoding="utf-8")) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")  # no weights are there, none are asked
    rows = jsonl(tmp_path, [{"prompt": "a\r\n", "completion": "\x1b[31m\tb"}])
    words = ("--set", f"model={tmp_path}", "--set", f"data={{train: {rows}}}")
    done = run("rows", "r.yaml", *words)
    assert "\na\\x0d\n⟦\\x1b[31m\tb<|im_end|>⟧\n" in done.out, done.err
    assert json.loads(run("rows", "r.yaml", *words, "--json").out)["first"][0]["parts"] == [
        ["a\r\n", False], ["\x1b[31m\tb<|im_end|>", True]
    ]  # fmt: skip


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(prompt=TEXTS, answer=TEXTS, most=st.integers(5, 40))
def test_the_parts_are_the_text_of_the_tokens(prompt: str, answer: str, most: int) -> None:
    coder = byte_tokenizer()
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": prompt, "completion": answer}]
    found = fit(rows_of(*rows), coder, max_length=most)
    for row in shown(found, coder, 9):
        assert "".join(text for text, _ in row.parts) == coder.decode(row.input_ids)
        mask = [int(place > 0 and label != -100) for place, label in enumerate(row.labels)]
        assert [text for text, learnt in row.parts if learnt] == pieces(coder, row.input_ids, mask)


def test_a_conversation_of_bytes_is_marked_answer_by_answer() -> None:
    coder = byte_tokenizer()
    found = fit(rows_of(*CONVERSATIONS), coder, max_length=300)
    for row in shown(found, coder, 99):
        mask = [int(place > 0 and label != -100) for place, label in enumerate(row.labels)]
        assert [text for text, learnt in row.parts if learnt] == pieces(coder, row.input_ids, mask)
        assert row.end_learnt and not row.cut
    turns = [user("q"), assistant("a"), user("a long question")]
    whole = len(coder.apply_chat_template(turns)["input_ids"])
    for most, ended in ((whole - 3, True), (whole + 15, False)):  # in the question; in the second answer's beginning
        (row,) = shown(fit(rows_of({"messages": [*turns, assistant("b" * 20)]}), coder, max_length=most), coder, 9)
        assert row.cut and row.end_learnt == ended


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.yaml"], "no such recipe file: no.yaml"),
        (["r.yaml", "--set", "data.train=no.jsonl"], "no such file: no.jsonl"),
        (["r.yaml", "--set", "model=nowhere/base"], "cannot load the model 'nowhere/base'"),
        (["r.yaml", "--set", "data.max_length=3"], "keeps an answer within max_length 3: raise max_length to at least"),
        (["r.yaml", "--count", "-1"], "greater than or equal to 0"),
        ([str(ROOT / "examples" / "tasks.yaml")], "a classifier's file goes to `loralign tasks`"),
        ([str(ROOT / "examples" / "compare.yaml")], "a study's file goes to `loralign compare`"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(words: list[str], said: str) -> None:
    done = run("rows", *words)
    assert done.code == 2 and said in assert_one_sentence(done) and not done.out
