"""Rows of supervised fine-tuning: reading, formats, splits, templates, the assistant mask, lengths and packing."""

from __future__ import annotations

import csv
import json
import logging
import string
import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import (
    is_chat_template_stop_token_trained,
    qwen2_5_chat_template,
    qwen2_5_training_chat_template,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from assets import asset, needs
from loralign.data.chat import CHATML, fit, give_template, with_generation_markers
from loralign.data.packing import check_packing
from loralign.data.read import read_rows
from loralign.data.rows import fingerprint, rows_format, split_eval, to_trl
from loralign.types import LoralignError
from toy import gpt2, llama

VOCAB = 300
FEW = settings(max_examples=30, deadline=None)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30)

SMOL = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
INST = """
{%- set ns = namespace(n=0) %}
{% for m in messages %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
{%- else %}{{ raise_exception('only user and assistant turns') }}{% endif %}
{%- endfor %}
"""
FORGETS = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{{ m['content'] if loop.last else m['content'] | upper }}{{ '<|im_end|>\\n' }}{% endfor %}"""


def byte_tokenizer(template: str | None = SMOL, *, chatml: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, plus the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if chatml else [])]
    core.add_special_tokens([AddedToken(t, special=True) for t in special])
    end = "<|im_end|>" if chatml else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(folder: Path, rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(rows))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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
            assert read_rows(folder / file).to_list() == rows, file


def test_arrow_files_and_saved_folders(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(6)]
    saved = tmp_path / "saved"
    Dataset.from_list(rows).save_to_disk(saved)
    assert read_rows(saved).to_list() == rows
    assert read_rows(next(saved.glob("*.arrow"))).to_list() == rows
    assert read_rows(saved, split="train[2:4]").to_list() == rows[2:4]
    both = tmp_path / "both"
    DatasetDict(train=Dataset.from_list(rows[:4]), test=Dataset.from_list(rows[4:])).save_to_disk(both)
    assert read_rows(both).to_list() == rows[:4]
    assert read_rows(str(both), split="test").to_list() == rows[4:]
    assert read_rows(both, split="test+train[:50%]").to_list() == rows[4:] + rows[:2]


def test_values_keep_their_type_and_optional_columns_may_be_missing(tmp_path: Path) -> None:
    text = write(tmp_path, "n.csv", "text\n007\n")
    assert read_rows(text)[0] == {"text": "007"}
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    assert read_rows(jsonl(tmp_path, rows))["input"][:] == [None, "d"]
    many = [{"text": "x", "tools": None if i < 2500 else "t"} for i in range(2600)]
    assert read_rows(jsonl(tmp_path, many)).to_list() == many


GOOD = '{"text": "a"}\n'
BAD_FILES = {
    "empty.jsonl": ("", "is empty: give a file with at least one row"),
    "blank.jsonl": ("\n \n", "has no rows: give a file with at least one"),
    "broken.jsonl": (
        GOOD + '\n{"text": \n',
        r"broken.jsonl, line 3 is not JSON \(Expecting value, column 9\): write one",
    ),
    "list.jsonl": (GOOD + "[1]\n", "list.jsonl, line 2 is no object but list: write one object per line, or one list"),
    "columns.jsonl": (GOOD + '{"txt": "b"}\n', "line 2 has the columns txt, the rows before have text: give every row"),
    "types.jsonl": (
        GOOD * 1500 + '{"text": 1}\n',
        "row 1501 doesn't fit the rows before .*: give each column one type",
    ),
    "half.jsonl": ('{"text": "\\ud800"}', "row 1 doesn't fit the rows before .*surrogates not allowed"),
    "deep.jsonl": ("[" * 100_000, "line 1 is nested too deeply"),
    "broken.json": ('[{"text": "a"},\n {"text" 2}]', r"broken.json, line 2 is not JSON \(Expecting ':' delimiter"),
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
    text = pa.array(["a", "b"])
    odd = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))
    for metadata in (None, {b"huggingface": b"{broken"}, {b"huggingface": b"[]"}):
        table = pa.table({"text": text, "odd": odd})
        path = tmp_path / "rows.parquet"
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, path)
        with caplog.at_level(logging.WARNING, "loralign"):
            assert read_rows(path)["text"][:] == ["a", "b"]
    assert "the columns odd are of types that cannot be read" in caplog.text


def test_damaged_binary_files_and_folders_are_one_sentence(tmp_path: Path) -> None:
    rows = rows_of(*({"text": f"row {i}" * 50} for i in range(2000)))
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
    DatasetDict(a=rows_of({"text": "a"}), b=rows_of({"text": "b"})).save_to_disk(two)
    with pytest.raises(LoralignError, match="has the splits a, b: name one"):
        read_rows(two)


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
    assert to_trl(dataset, rows_format(dataset)).to_list() == [wanted]


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
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert converted(messages=[call], tools=[{"name": "f"}]) == {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        "tools": '[{"name":"f"}]',
    }


BAD_ROWS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"question": "q", "answer": "a"}], "row 1 has the columns question, answer: rename them to one of: messages; p"),
    ([{"prompt": "p", "chosen": "c", "rejected": "r"}], r"preference rows \(prompt, chosen, rejected\), .*DPOTrainer"),
    (
        [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}],
        "row 2 has no `output`, only instruction: alpaca rows need instruction and output",
    ),
    ([{"text": "t"}, {"text": None}], "row 2 has no `text`, only nothing: text rows need text"),
    ([{"text": 3}], "row 1: `text` is of type int: write it as text"),
    ([{"prompt": "p", "completion": 3}], "row 1: `completion` is no list of turns: write"),
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
    dataset = read_rows(path)
    with pytest.raises(LoralignError, match=message) as raised:
        to_trl(dataset, rows_format(dataset))
    assert str(path) in str(raised.value)


# ------------------------------------------------------------------------------------------------- split and provenance


@FEW
@given(texts=st.lists(st.text(string.ascii_letters, max_size=2), min_size=2, max_size=40), seed=st.integers(0, 5))
def test_a_share_splits_by_content(texts: list[str], seed: int) -> None:
    rows = Dataset.from_dict({"text": texts})
    try:
        train, held = split_eval(rows, 0.3, seed=seed)
    except LoralignError as error:
        assert "leaves no evaluation row" in str(error)
        assert min(map(texts.count, texts)) > round(0.3 * len(texts))
        return
    assert 0 < len(held) <= round(0.3 * len(texts))
    assert sorted([*train["text"], *held["text"]]) == sorted(texts)
    assert not set(train["text"]) & set(held["text"])
    assert list(train["text"]) == [t for t in texts if t in set(train["text"])]
    again = split_eval(Dataset.from_dict({"text": texts[::-1]}), 0.3, seed=seed)[1]
    assert set(again["text"]) == set(held["text"])


def test_split_sizes_seeds_and_refusals(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": [str(i) for i in range(200)]})
    first, second = split_eval(rows, 0.1, seed=0)[1], split_eval(rows, 0.1, seed=1)[1]
    assert len(first) == len(second) == 20 and set(first["text"]) != set(second["text"])
    train, held = split_eval(rows, jsonl(tmp_path, [{"prompt": "q", "completion": "a"}]), seed=0)
    assert train is rows and held.to_list() == [{"prompt": "q", "completion": "a"}]
    for share in (0.0, 1.0, 3, -1):
        with pytest.raises(LoralignError, match="is no share: give a number between 0 and 1, or a file"):
            split_eval(rows, share, seed=0)
    with pytest.raises(LoralignError, match=r"eval 0.001 of the 200 rows of the data leaves no evaluation row"):
        split_eval(rows, 0.001, seed=0)
    with pytest.raises(LoralignError, match=r"leaves no evaluation row \(1 of them differ\)"):
        split_eval(Dataset.from_dict({"text": ["same"] * 4}), 0.5, seed=0)
    with pytest.raises(LoralignError, match="leaves no training row"):
        split_eval(Dataset.from_dict({"text": ["a", "b", "c"]}), 0.9, seed=0)


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


# ------------------------------------------------------------------------------------------------------------ templates


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
def test_the_wrapped_template_is_the_same_text(template: str, turns: list[dict[str, str]]) -> None:
    tokenizer = byte_tokenizer(template)
    marked = with_generation_markers(tokenizer)
    for shown, prompt in ((turns, False), (turns[:-1], True)):
        texts = [
            tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt, chat_template=t)
            for t in (template, marked)
        ]
        assert texts[0] == texts[1]
    out = tokenizer.apply_chat_template(
        turns, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [t["content"] for t in turns if t["role"] == "assistant"]
    wanted = [f" {a.strip()}<|im_end|>" if template == INST else f"{a}<|im_end|>\n" for a in answers]
    assert pieces(tokenizer, out["input_ids"], out["assistant_masks"]) == wanted
    assert is_chat_template_stop_token_trained(tokenizer, marked)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the runs of ones."""
    found: list[list[int]] = []
    before = 0
    for token, m in zip(ids, mask, strict=True):
        if m and not before:
            found.append([])
        if m:
            found[-1].append(token)
        before = m
    return [tokenizer.decode(run) for run in found]


def test_templates_that_are_marked_known_or_hopeless() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = marked = with_generation_markers(tokenizer)
    assert with_generation_markers(tokenizer) == marked
    tokenizer.chat_template = {"default": qwen2_5_chat_template}
    assert with_generation_markers(tokenizer) == qwen2_5_training_chat_template
    tokenizer.chat_template = FORGETS
    with pytest.raises(
        LoralignError, match=r"which tokens are the answers .*turn 2 differently.*assistant_only: false"
    ):
        with_generation_markers(tokenizer)
    with pytest.raises(LoralignError, match="the tokenizer has no chat template: call give_template"):
        with_generation_markers(byte_tokenizer(None))


def test_a_tokenizer_without_template(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(None)
    with caplog.at_level(logging.WARNING, "loralign"):
        give_template(tokenizer)
    assert tokenizer.chat_template == CHATML and "ChatML is used" in caplog.text
    mine = byte_tokenizer(INST)
    give_template(mine)
    assert mine.chat_template == INST
    bare = byte_tokenizer(None, chatml=False)
    with pytest.raises(
        LoralignError, match=r"no chat template: use the instruct model, .*prompt and completion as text"
    ):
        fit(rows_of({"messages": [user("q"), assistant("a")]}), bare, max_length=50)
    assert fit(rows_of({"prompt": "q", "completion": "a"}), bare, max_length=50).supervised == 2


# --------------------------------------------------------------------------------------------------- tokens and lengths


TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}])
PREPARED: dict[str, Dataset] = {
    "messages": rows_of(
        {"messages": [user("q"), assistant("one"), user("r"), assistant("two")]},
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("three")]},
    ),
    "prompt-completion messages": rows_of({"prompt": [user("q")], "completion": [assistant("a")]}),
    "prompt-completion text": rows_of({"prompt": "q: ", "completion": "a"}, {"prompt": "p", "completion": ""}),
    "text": rows_of({"text": "once upon"}, {"text": "a time<|im_end|>"}),
    "tools": rows_of({"messages": [user("q"), assistant("a")], "tools": TOOLS}),
}


def sft(folder: Path, rows: Dataset, tokenizer: PreTrainedTokenizerBase, **config: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "shuffle_dataset": False,
        "max_length": 64,
    }
    return SFTTrainer(
        llama(vocab_size=len(tokenizer), max_position_embeddings=128),
        args=SFTConfig(**{**settings, **config}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("only", [True, False])
def test_tokens_and_labels_are_those_of_trl(name: str, only: bool, tmp_path: Path) -> None:
    rows, tokenizer = PREPARED[name], byte_tokenizer(max_template(name))
    ours = fit(rows, tokenizer, max_length=200, assistant_only=only)
    tokenizer.chat_template = with_generation_markers(tokenizer)
    flags = {"assistant_only_loss": only and "messages" in rows.column_names}
    if not only:
        flags["completion_only_loss"] = False
    theirs = sft(tmp_path, rows, tokenizer, max_length=200, **flags).train_dataset
    assert [(r["input_ids"], r["labels"]) for r in ours.dataset] == [(r["input_ids"], r["labels"]) for r in theirs]
    assert ours.tokens == sum(map(len, theirs["input_ids"])) and ours.cut == ours.dropped == 0
    assert ours.supervised == sum(label != -100 for row in theirs["labels"] for label in row[1:])


def max_template(name: str) -> str:
    """SmolLM2's, with the tools in front where there are any."""
    return "{% if tools %}{{ tools | tojson }}{% endif %}" + SMOL if name == "tools" else SMOL


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
    rows, tokenizer = Dataset.from_dict({"messages": turns}), byte_tokenizer(CHATML)
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
        ([{"role": "system", "content": "s"}, user("q"), assistant("a")], "only user and assistant turns"),
        ([assistant("a")], "it starts with the assistant"),
    ):
        with pytest.raises(LoralignError, match=f"the data, row 2: .*{reason}.*: mend or drop the row"):
            fit(rows_of(good, {"messages": turns}), byte_tokenizer(INST), max_length=99)


def test_tool_calls_lose_what_arrow_added() -> None:
    template = (
        "{% for m in messages %}{{ m.role ~ (m.tool_calls | tojson if m.tool_calls else m.content) }}{% endfor %}"
    )
    calls = [{"name": "f", "arguments": {"x": 1}}], [{"name": "g", "arguments": {"y": 2}}]
    turns = [{"role": "assistant", "content": "", "tool_calls": c} for c in calls]
    rows = to_trl(rows_of({"messages": turns}), "messages")
    tokenizer = byte_tokenizer(template)
    text = tokenizer.decode(fit(rows, tokenizer, max_length=999, assistant_only=False).dataset[0]["input_ids"])
    assert text == "".join("assistant" + json.dumps(c) for c in calls)


def test_an_answer_without_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{{ 'assistant: ' if add_generation_prompt }}"
    with caplog.at_level(logging.WARNING, "loralign"):
        found = fit(rows_of({"messages": [user("q"), assistant("a")]}), byte_tokenizer(template), max_length=99)
    assert found.supervised == 2 and "may not learn to stop" in caplog.text


# -------------------------------------------------------------------------------------------------- training, real runs


def test_sft_trains_on_marked_messages_and_on_fitted_rows(tmp_path: Path) -> None:
    rows, tokenizer = PREPARED["messages"], byte_tokenizer()
    fitted = fit(rows, tokenizer, max_length=200).dataset
    tokenizer.chat_template = with_generation_markers(tokenizer)
    losses = []
    for dataset, only in ((rows, True), (fitted, False)):
        trainer = sft(tmp_path, dataset, tokenizer, assistant_only_loss=only, max_length=200)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
        row = trainer.train_dataset[0]
        mask = [int(label != -100) for label in row["labels"]]
        assert pieces(tokenizer, row["input_ids"], mask) == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]


@pytest.mark.assets
@needs("smollm2-2layer")
def test_smollm2_masks_exactly_the_answers(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("smollm2-2layer"))
    rows = PREPARED["messages"]
    fitted = fit(rows, tokenizer, max_length=200).dataset
    tokenizer.chat_template = with_generation_markers(tokenizer)
    trainer = sft(tmp_path, rows, tokenizer, assistant_only_loss=True, max_length=200)
    trainer.train()
    for row, own, wanted in zip(trainer.train_dataset, fitted, (["one", "two"], ["three"]), strict=True):
        assert (row["input_ids"], row["labels"]) == (own["input_ids"], own["labels"])
        mask = [int(label != -100) for label in row["labels"]]
        assert pieces(tokenizer, row["input_ids"], mask) == [f"{w}<|im_end|>\n" for w in wanted]


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_compute_what_separate_rows_do(attention: str) -> None:
    model = llama()
    model.set_attn_implementation(attention)
    rows = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1)).tolist()
    rows[1] = rows[1][:4]
    example = {"input_ids": list(chain(*rows)), "seq_lengths": [len(r) for r in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([r])).logits[0] for r in rows])
        cached = model(**batch, use_cache=True).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (cached - alone).abs().max() > 0.1  # the trap that packing.py names: a cache switches the block mask off


def test_packing_is_refused_where_rows_see_each_other() -> None:
    for model in (llama(), llama().to(torch.bfloat16), gpt2()):
        model.train()
        check_packing(model)
        check_packing(model, "bfd_split")
        assert model.training
    with pytest.raises(LoralignError, match="strategy 'wrapped' lets rows see each other: use bfd, or packing: false"):
        check_packing(llama(), "wrapped")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.15))
    with pytest.raises(
        LoralignError, match=r"BloomForCausalLM with .* attention lets packed rows see each other: set pac"
    ):
        check_packing(bloom)
    broken = llama()
    broken.forward = lambda input_ids: None  # type: ignore[assignment]
    with pytest.raises(LoralignError, match=r"can't run packed rows .*: set packing: false"):
        check_packing(broken)


def test_packed_training_has_the_loss_of_separate_rows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    fitted = fit(PREPARED["messages"], tokenizer, max_length=256).dataset
    losses = []
    for packing in (False, True):
        trainer = sft(tmp_path, fitted, tokenizer, packing=packing, max_length=512, max_steps=1)
        trainer.train()
        assert len(trainer.train_dataset) == (1 if packing else 2)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
