"""Rows longer than a model has positions: found from its config, refused by every command before weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    NystromformerConfig,
    NystromformerForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.models.bart.modeling_bart import BartForCausalLM

import toy
import warm
from cli_world import assert_one_sentence, run
from loralign.carrier.abilities import positions
from loralign.compare.tasks import prepare_task
from loralign.types import LoralignError
from tiny_study import load, write_study
from tiny_trl import tokenizer, words

COUNT = 24
SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    **{"max_position_embeddings": COUNT, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
}
DECODER: dict[str, Any] = {
    **{"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
    **{"encoder_layers": 1, "max_position_embeddings": COUNT},
}
OPT = OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16)
KINDS: dict[str, tuple[Any, Any, int | None]] = {  # class, config, tokens of a row at most
    "wpe": (GPTNeoForCausalLM, GPTNeoConfig(**SIZES, num_layers=1, attention_types=[[["global"], 1]]), COUNT),
    "offset of two": (OPTForCausalLM, OPT, COUNT),
    "offset of a decoder": (BartForCausalLM, BartConfig(**DECODER), COUNT),
    "two more rows": (NystromformerForSequenceClassification, NystromformerConfig(**SIZES), COUNT),
    "buffered ids": (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True), COUNT),
    "after the padding": (RobertaForSequenceClassification, RobertaConfig(**SIZES), COUNT - 2),
    "table of sines": (GPTJForCausalLM, GPTJConfig(**SIZES, rotary_dim=4), COUNT),
    "sines that grow": (XGLMForCausalLM, XGLMConfig(**DECODER, num_layers=1, attention_heads=2, ffn_dim=16), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_as_many_as_a_forward_takes(kind: str) -> None:
    make, config, most = KINDS[kind]
    with torch.device("meta"):
        assert positions(make(config)) == most
    model = make(config).eval()
    assert positions(model) == most

    def forward(tokens: int) -> None:
        model(input_ids=torch.full((1, tokens), 5))

    forward(most or 2 * COUNT)
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            forward(most + 1)


def test_rotary_positions_end_nowhere_and_a_vocabulary_is_no_table_of_positions() -> None:
    assert positions(toy.llama(vocab_size=64, max_position_embeddings=64)) is None


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a tokenizer and no weights, and rows."""
    folder = tmp_path_factory.mktemp("positions")
    tokenizer().save_pretrained(folder)
    toy.gpt2().config.save_pretrained(folder)
    (folder / "rows.jsonl").write_text(json.dumps({"text": "w1 w2"}), encoding="utf-8")
    (folder / "r.yaml").write_text(
        f"model: {folder}\ndata: {{train: {folder}/rows.jsonl, max_length: 65}}\noutput: {folder}/out\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.parametrize(
    ("command", "key"), [("plan", "data.max_length"), ("train", "data.max_length"), ("suggest", "--length")]
)
def test_commands_refuse_longer_rows_alike(command: str, key: str, weightless: Path) -> None:
    words = [weightless, "--length", 65, "--device", "cpu"] if command == "suggest" else [weightless / "r.yaml"]
    done = run(command, *words)
    said = assert_one_sentence(done)
    assert done.code == 2
    assert said == f"loralign: rows of 65 tokens are more than the 64 positions of {str(weightless)!r}: lower `{key}`"


SAID = "rows of at most 64 tokens: {!r} has no more positions (`{}` is not given)"


def test_rows_of_as_many_tokens_as_positions_are_taken(weightless: Path) -> None:
    done = run("plan", weightless / "r.yaml", "--set", "data.max_length=64")
    assert done.code == 0 and "of up to 64 tokens" in done.out and "positions" not in done.err
    done = run("train", weightless / "r.yaml", "--set", "data.max_length=64")
    assert done.code == 2 and "no safetensors weights" in assert_one_sentence(done)


def test_the_default_is_what_the_model_takes(weightless: Path) -> None:
    """With one line; a model that computes its positions, or has more, takes the usual number."""
    given = (weightless / "r.yaml", "--set", f"data={{train: {weightless}/rows.jsonl}}")
    done = run("plan", *given)
    assert done.code == 0 and "of up to 64 tokens" in done.out
    assert done.err.splitlines().count(SAID.format(str(weightless), "data.max_length")) == 1
    done = run("suggest", weightless, "--device", "cpu", "--json")
    assert json.loads(done.out)["recipe"]["data"]["max_length"] == 64
    assert done.err.splitlines().count(SAID.format(str(weightless), "--length")) == 1
    toy.llama().config.save_pretrained(weightless / "llama")
    done = run("plan", *given, "--set", f"model={weightless}/llama")
    assert "of up to 1024 tokens" in done.out and "rows of at most" not in done.err


def test_a_recommended_run_says_it_once(weightless: Path) -> None:
    config = toy.gpt2().config
    config.n_embd = 128
    config.save_pretrained(weightless / "wide")
    given = (f"model={weightless}/wide", "method=recommended", f"data={{train: {weightless}/rows.jsonl}}")
    done = run("plan", weightless / "r.yaml", *(word for pair in given for word in ("--set", pair)))
    assert done.code == 0 and "of up to 64 tokens" in done.out
    assert done.err.splitlines().count(SAID.format(f"{weightless}/wide", "data.max_length")) == 1


@pytest.mark.parametrize("command", ["train", "init"])
def test_a_run_of_the_default_cuts_there_and_its_record_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.verification(monkeypatch)
    toy.gpt2().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": words(80, 1)}) + "\n", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        f"model: {tmp_path}/base\ndata: {{train: {tmp_path}/rows.jsonl}}\nmethod: lora-ga\n"
        f"options: {{micro_batches: 1}}\nrank: 2\noutput: {tmp_path}/out\n"
        "train: {steps: 1, batch_size: 1, warmup: 0.0}\n",
        encoding="utf-8",
    )
    done = run(command, tmp_path / "r.yaml")
    assert done.code == 0, done.err
    assert done.err.count("rows of at most 64 tokens") == 1 and "1 rows cut at 64 tokens" in done.err
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"tokens per row at most \| 64 ", card)
    if command == "train":
        begun = json.loads((tmp_path / "out" / "checkpoints" / "begun.json").read_text(encoding="utf-8"))
        assert begun["settings"]["data.max_length"] == "64"


def test_studies_refuse_them_too(weightless: Path, tmp_path: Path) -> None:
    for kind in ("text", "classify", "sft"):
        spec = load(write_study(tmp_path / kind, kind, model=str(weightless)), "task.length=65")
        with pytest.raises(LoralignError, match=r"positions of .*: lower `task.length`"):
            prepare_task(spec, "cpu")
