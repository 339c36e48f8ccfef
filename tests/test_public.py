"""What a run and a study publish: no path of this machine, however it is spelt, and no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_world import run, world_in
from loralign.io.public import HIDDEN, public, scrub

PATHS = {
    "/home/someone/My Work/base": "base",
    "~/My Work/rows.jsonl": "rows.jsonl",
    "~someone/base": "base",
    "file:///home/someone/base": "base",
    "C:\\Users\\someone\\My Base": "My Base",
    "C:/Users/someone/base": "base",
    "\\\\server\\share\\base": "base",
    "home/someone/data/rows.jsonl": "rows.jsonl",
    "home/someone/My Work/base": "base",
    "../../home/someone/base": "base",
    "./base": "base",
    "$HOME/base": "base",
    "runs/rows.jsonl": "rows.jsonl",
    "/home/someone": "~",
    "~": "~",
    "no file at /home/someone/x/rows.jsonl, line 3": "no file at rows.jsonl, line 3",
    "from C:\\Users\\someone\\base": "from base",
}
KEPT = (
    "org/name", "a share of 1/2", "tokens/s", "https://host/org/name", "and/or", "lora-ga", "/", "", "a / b / c",
    r".*layers\.0\.(self_attn\.(q|v)_proj|mlp\.down_proj)", "rate/lora-ga/0/1", "sweep | ours", "cosine", "1e-2",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_cut_to_its_last_part(path: str) -> None:
    assert public(path) == PATHS[path]
    assert scrub({"x": [path]}) == {"x": [PATHS[path]]}


@pytest.mark.parametrize("text", KEPT)
def test_other_texts_stay(text: str) -> None:
    assert public(text) == text


def test_secrets_are_hidden_by_key_and_by_form() -> None:
    secret = {"hub_token": "x", "token": "x", "WANDB_API_KEY": "x", "apiKey": "x", "password": "x", "auth": ["x"]}
    assert set(scrub(secret).values()) == {HIDDEN}
    plain = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "max_new_tokens": 3,
        "token": None,
        "tokens": "many",
        "key": "x",
    }
    assert scrub(plain) == plain
    assert public("push with hf_abcdefghijklmnopqrstuv now") == f"push with {HIDDEN} now"
    assert public("https://me:secret@host/org") == "https://host/org"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with world_in(tmp_path_factory.mktemp("home") / "some one") as root:
        yield root


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_file_of_a_run_holds_the_machine_or_a_token(world: Path, method: str) -> None:
    out = world / method
    settings = [
        f"model={world / 'base'}", f"data.train={world / 'rows.jsonl'}", f"cache={world / 'cache'}", f"method={method}",
        "options={}", f"train.extra={{run_name: '{world}/hf_abcdefghijklmnopqrstu'}}", f"output={out}", "train.steps=4",
        *(["rank=null", "train.learning_rate=1e-3"] if method == "full" else []),
    ]  # fmt: skip
    done = run("train", "r.yaml", *(word for s in settings for word in ("--set", s)))
    assert done.code == 0, done.err
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {"run.json", "README.md", "begun.json", "loralign.json", "trainer_state.json"} <= {p.name for p in files}
    for path in files:
        held = path.read_bytes()
        for private in (str(world), "some one", "hf_abcdef"):
            assert private.encode() not in held, (path.relative_to(out), private)
    run_json = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run_json["base"] == run_json["source"]["model"] == "base"
    assert run_json["source"]["data"]["train"] == "rows.jsonl"
    assert run_json["source"]["train"]["extra"]["run_name"] == HIDDEN
