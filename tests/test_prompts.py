"""`eval` and `generate` ask and stop as training did; a changed tokenizer travels with the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import warm
from cli_world import Done, run
from data_world import SMOL, assistant, byte_tokenizer, jsonl, pieces, rows_of, user
from loralign.data.chat import Coder, fit
from loralign.data.prompt import CHATML, Plain, chat_of
from loralign.train.use import open_adapter, stops
from toy import llama

SETTINGS = "{steps: 60, batch_size: 4, learning_rate: 1e-2, schedule: constant, warmup: 0.0, log_every: 60}"
PAIRS = [("A", "so"), ("B", "no"), ("C", "if"), ("D", "up")]


# ------------------------------------------------------------------------------------------------------ start and end


def learnt(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[str]]]:
    found = fit(rows_of(*rows), tokenizer, max_length=9999).dataset
    masks = [[int(label != -100) for label in row["labels"]] for row in found]
    ids = [row["input_ids"] for row in found]
    return [(tokenizer.decode(i), pieces(tokenizer, i, m)) for i, m in zip(ids, masks, strict=True)]


def test_the_start_token_stands_once_and_the_end_token_is_learnt() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML, starts=True)
    turns = [user("hi"), assistant("yo")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    rows = [{"text": text}, {"text": "hi"}, {"text": "<s>hi<|im_end|>"}]
    assert [t for t, _ in learnt(rows, tokenizer)] == [text + "<|im_end|>", "<s>hi<|im_end|>", "<s>hi<|im_end|>"]
    asked = [{"prompt": prompt, "completion": "yo<|im_end|>"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    assert learnt(asked, tokenizer) == [
        (prompt + "yo<|im_end|>", ["yo<|im_end|>"]),
        ("<s>2 + 2 = 4<|im_end|>", [" 4<|im_end|>"]),
    ]
    assert learnt([{"messages": turns}], tokenizer) == [(text, ["yo<|im_end|>\n"])]
    assert Plain(byte_tokenizer()).start == []


def merging(*merges: tuple[str, str], words: bool = False) -> PreTrainedTokenizerFast:
    """A byte (or word-piece) tokenizer that joins some pairs."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "▁"]
    tokens = [*alphabet, *("".join(pair) for pair in merges), "</s>"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.Metaspace() if words else pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.Metaspace() if words else decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_the_prompt_is_tokenised_as_at_inference(caplog: pytest.LogCaptureFixture) -> None:
    """A token that would span the prompt's end and the answer is taken apart, as the model sees them."""
    row = {"prompt": "q: ", "completion": "a"}
    tokenizer = merging(("Ġ", "a"))
    assert len(tokenizer("q: a")["input_ids"]) == 3
    found = fit(rows_of(row), tokenizer, max_length=99)
    (ids,) = found.dataset["input_ids"]
    assert ids[:3] == tokenizer("q: ")["input_ids"] and tokenizer.decode(ids) == "q: a</s>"
    assert found.joined == 0 and found.supervised == 2
    wordy = merging((":", "a"), words=True)  # where the answer alone would begin with a space
    assert fit(rows_of({"prompt": "q:", "completion": "ab"}), wordy, max_length=99).joined == 1
    assert "the first token of 1 of 1 answers reaches into the prompt" in caplog.text


def test_conversations_whose_tokens_join_are_learnt_answer_by_answer() -> None:
    """A template without special tokens, whose prompt ends in a space."""
    template = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{{ 'a: ' if add_generation_prompt }}"
    tokenizer = merging(("Ġ", "a"))
    tokenizer.chat_template = template
    turns = [user("q"), assistant("ab"), user("r"), assistant("ac")]
    found = fit(rows_of({"messages": turns}), tokenizer, max_length=99)
    for i, row in zip((1, 3), found.dataset, strict=True):
        prompt = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
        assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
    assert found.split == 1 and found.joined == 0


def test_what_is_asked_is_what_training_has_before_the_answer() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    template = "{{ tools | tojson }}" + SMOL.replace(
        "message['content'] ", "(message.tool_calls or message.content) | string "
    )
    conversation = [user("q"), assistant("one"), user("r"), assistant("") | {"tool_calls": [call]}]
    chats = [
        {"messages": conversation, "tools": [{"name": "f"}]},
        {"prompt": [user("q")], "completion": [assistant("a")]},
    ]
    for rows, tokenizer in (
        (chats, byte_tokenizer(template)),
        ([{"prompt": "q: ", "completion": "a"}], byte_tokenizer()),
    ):
        trained = fit(rows_of(*rows), tokenizer, max_length=9999).dataset
        asked = list(Coder(rows_of(*rows), tokenizer).questions())
        for row, sample in zip(trained, asked, strict=True):
            ((first, last),) = sample.spans
            assert row["input_ids"] == sample.ids and last == len(sample.ids)
            assert row["labels"][first:] == sample.ids[first:] and row["labels"][first - 1] == -100


def test_the_end_of_an_answer_is_found() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.eos_token = "</s>"
    model = llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = 7
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat_of(tokenizer).ends == {end}
    assert stops(model, tokenizer, chat_of(tokenizer).ends) == sorted({7, tokenizer.eos_token_id, end})
    assert stops(model, tokenizer, ()) == sorted({7, tokenizer.eos_token_id})


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        warm.verification(patch)
        yield tmp_path_factory.mktemp("prompts")


def base_in(room: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base model whose own settings stop at </s>."""
    tokenizer.eos_token = "</s>"
    model = llama(vocab_size=len(tokenizer), hidden_size=48, max_position_embeddings=128)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(room / name)
    tokenizer.save_pretrained(room / name)
    return room / name


def trained(room: Path, name: str, base: Path, rows: list[dict[str, Any]]) -> tuple[Path, Path, Done]:
    """(adapter, rows, what `train` said)."""
    file, recipe = jsonl(room, rows, f"{name}.jsonl"), room / f"{name}.yaml"
    recipe.write_text(
        f"model: {base}\nmethod: lora\nrank: 16\nalpha: 32\noutput: {room / name}\n"
        f"data: {{train: {file}, max_length: 128}}\ntrain: {SETTINGS}\n"
    )
    done = run("train", recipe)
    assert done.code == 0, done.err
    return room / name, file, done


def matches(*words: object) -> float:
    done = run("eval", *words, "--max-new-tokens", 12, "--json")
    assert done.code == 0, done.err
    return float(json.loads(done.out.splitlines()[-1])["exact_match"])


@pytest.fixture(scope="module")
def chat_run(room: Path) -> tuple[Path, Path, Done]:
    """A base without a template that has ChatML's tokens, as many base models."""
    base = base_in(room, "bare", byte_tokenizer(None))
    return trained(room, "chat", base, [{"messages": [user(q), assistant(a)]} for q, a in PAIRS])


def test_a_template_that_training_gave_travels_with_the_adapter(
    chat_run: tuple[Path, Path, Done], room: Path, tmp_path: Path
) -> None:
    out, rows, done = chat_run
    assert (
        "ChatML is used" in done.err and "answers end with <|im_end|>, where the base model's own settings" in done.err
    )
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == CHATML
    assert matches(out, "--base", room / "bare", "--data", rows) == 1.0
    said = run("generate", out, "--base", room / "bare", "--prompt", PAIRS[0][0], "--max-new-tokens", 12)
    assert said.out.splitlines()[-1] == PAIRS[0][1]
    card = (out / "README.md").read_text()
    assert "through the chat template of the tokenizer, which is not the base's: it is in this folder" in card
    assert "Answers end with `<|im_end|>`." in card
    assert json.loads((out / "run.json").read_text())["prompts"]["form"] == "chat"

    moved = run("export", out, "--base", room / "bare", "--out", tmp_path / "p", "--profile", "portable")
    assert moved.code == 0 and matches(tmp_path / "p", "--base", room / "bare", "--data", rows) == 1.0
    assert "it is in this folder" in (tmp_path / "p" / "README.md").read_text()
    shutil.copytree(out, tmp_path / "template")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "template" / name).unlink()
    _, tokenizer = open_adapter(tmp_path / "template", str(room / "bare"))
    assert tokenizer.chat_template == CHATML


def test_text_rows_are_asked_as_text(room: Path) -> None:
    """The base has a chat template and a start token; the rows are text, so eval and generate ask with text."""
    base = base_in(room, "starts", byte_tokenizer("{{ bos_token }}" + CHATML, starts=True))
    out, rows, done = trained(room, "text", base, [{"prompt": f"{q} = ", "completion": a} for q, a in PAIRS])
    assert "answers end with" not in done.err
    assert not (out / "tokenizer_config.json").exists()
    assert matches(out, "--base", base, "--data", rows) == 1.0
    said = run("generate", out, "--base", base, "--prompt", f"{PAIRS[1][0]} = ", "--max-new-tokens", 12)
    assert said.out.splitlines()[-1] == PAIRS[1][1]
    card = (out / "README.md").read_text()
    assert "with text as it stands, after the start token of the tokenizer. Answers end with `</s>`." in card
