"""Base models that are not what they say, and chat templates without an end: one sentence, before anything trains."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli_world import assert_one_sentence, run, world_in
from data_world import byte_tokenizer, rows_of, user
from loralign.data import prompt
from loralign.data.chat import fit
from loralign.io.verify import VerifyJob, verify_many
from loralign.maths.deadline import within
from loralign.train.model import load
from loralign.types import LoralignError

ENDLESS = "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers without end": ({"num_hidden_layers": 10**7}, r"its config\.json says `num_hidden_layers` 10000000, which"),
    "more layers than weights": (
        {"num_hidden_layers": 3},
        r"its files lack model\.layers\.2\.input_layernorm\.weight and 8 more, which its config\.json asks for",
    ),
    "another width": ({"hidden_size": 64}, r"its weights have other shapes than its config\.json says"),
    "a width without end": ({"hidden_size": 10**9}, r"its weights have other shapes than its config\.json says"),
    "no heads": ({"num_attention_heads": 0}, "cannot load the model"),
    "no width": ({"hidden_size": 0}, r"its config\.json says `hidden_size` 0, which no model has"),
    "a wrong type": ({"rms_norm_eps": "x"}, r"Validation error for field 'rms_norm_eps': .*expected float"),
    "an unknown word": ({"hidden_act": "foo"}, r"Transformers does not know 'foo'; check its config\.json"),
    "a dropout of 2": ({"attention_dropout": 2.0}, r"says `attention_dropout` 2\.0, which no model has"),
    "words without end": ({"vocab_size": 10**12}, r"says `vocab_size` 1000000000000, which no model has"),
    "heads that do not fit": ({"num_key_value_heads": 3}, "other shapes than its config"),
    "an encoder": ({"is_encoder_decoder": True}, "says that it is no causal language model"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("bases")) as root:
        yield root


def changed(world: Path, name: str, **fields: Any) -> Path:
    """A copy of the base whose config says other things."""
    folder = Path(shutil.copytree(world / "base", world / name))
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("what", CONFIGS)
def test_a_base_that_is_not_what_it_says_is_refused(what: str, world: Path, tmp_path: Path) -> None:
    fields, said = CONFIGS[what]
    base = changed(world, what, **fields)
    began = time.process_time()
    for call in ("train", "plan"):
        done = run(call, "r.yaml", "--set", f"model='{base}'", "--set", f"output={tmp_path / 'out'}")
        if done.code == 0 and call == "plan":  # reads no weights, so this config is as good as another
            assert "width " in what or what == "another width" or "weights" in what, what
            continue
        line = assert_one_sentence(done)
        assert done.code == 2 and len(line) < 300
        if call == "train":
            assert re.search(said, line), line
    assert time.process_time() - began < 20
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    base = changed(world, "mute")
    for file in base.glob("tokenizer*"):
        file.unlink()
    done = run("train", "r.yaml", "--set", f"model='{base}'", "--set", f"output={tmp_path / 'out'}")
    assert done.code == 2
    assert "it has no tokenizer; copy tokenizer.json and tokenizer_config.json beside it" in assert_one_sentence(done)


def test_verify_waits_for_no_base_without_end(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("train", "r.yaml", "--set", "method=lora", "--set", "options={}", "--set", f"output={out}")
    assert done.code == 0, done.err
    deep = changed(world, "deep", num_hidden_layers=10**7)
    (found,) = verify_many([VerifyJob(out, deep)])
    assert found.kind == "input" and "10000000" in found.failure and len(found.failure) < 300


def test_weights_that_nothing_asks_for_are_said(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = changed(world, "more")
    weights = load_file(base / "model.safetensors")
    extra = {"model.layers.7.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"].clone()}
    save_file({**weights, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    load(str(base))
    assert "1 weights of the model's files are not asked for by its config.json: model.layers.7" in caplog.text


def test_a_template_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "RENDERING_S", 0.2)
    rows = rows_of({"messages": [user("Hi."), {"role": "assistant", "content": "Ho."}]})
    with pytest.raises(LoralignError, match=r"the chat template takes more than .* for one conversation: put one") as e:
        fit(rows, byte_tokenizer(ENDLESS), max_length=64)
    assert len(str(e.value)) < 300


def test_time_limits_are_put_back() -> None:
    """One inside another: the outer one rings at its own time."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="outer"), within(0.3, TimeoutError("outer")):
        with within(5.0, TimeoutError("inner")):
            pass
        with pytest.raises(TimeoutError, match="inner"), within(0.05, TimeoutError("inner")):
            while True:
                pass
        while True:
            pass
    assert time.monotonic() - began < 2
