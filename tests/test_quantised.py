"""A base stored in int8 by torchao, from rows to a verified adapter, on the CPU. Skipped where torchao is not installed
(`pip install -e .[quantised]`, 3.4 MB)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_world import Done, assert_one_sentence, run, world_in
from loralign.train.model import load

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: .[quantised]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    with world_in(tmp_path_factory.mktemp("int8")) as root:
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        AutoModelForCausalLM.from_pretrained("base", quantization_config=config, dtype=torch.float32).save_pretrained(
            "q"
        )
        for file in Path("base").iterdir():
            if not (Path("q") / file.name).exists() and not file.name.endswith(".safetensors"):
                shutil.copy(file, "q")
        yield root


@pytest.fixture(scope="module")
def trained(world: Path) -> Done:
    return run("train", "r.yaml", "--set", "model=q", "--set", "output=out")


def test_it_trains_and_verifies_itself(trained: Done) -> None:
    assert trained.code == 0, trained.err
    assert trained.out.splitlines()[-1] == "Verified: out"
    assert "applied to 14/14 pairs" in trained.err


def test_the_proof_is_bound_to_the_quantised_base(trained: Done) -> None:
    assert run("verify", "out", "--base", "q").code == 0
    other = run("verify", "out", "--base", "base")
    assert other.code == 3
    assert "another base" in assert_one_sentence(other)


def test_the_proof_is_the_adapters_effect(trained: Done, world: Path) -> None:
    """Another scale computes something else by far less than int8 rounds."""
    shutil.copytree("out", "scaled", dirs_exist_ok=True)
    path = Path("scaled/adapter_config.json")
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**body, "lora_alpha": 1.01 * body["lora_alpha"]}), encoding="utf-8")
    assert run("verify", "scaled", "--base", "q").code == 3


def test_eval_and_plan(trained: Done) -> None:
    evaluated = run("eval", "out", "--data", "rows.jsonl", "--base", "q", "--limit", 2)
    assert evaluated.code == 0, evaluated.err
    planned = json.loads(run("plan", "r.yaml", "--set", "model=q", "--json").out)
    model: Any = load("q")[0]
    there = 0
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None:
                parts = [getattr(t, name) for name in getattr(t, "tensor_data_names", ())]
                there += sum(p.numel() * p.element_size() for p in parts or [t])
    assert planned["weights_bytes"] == pytest.approx(there, rel=0.02)


def test_a_stopped_run_goes_on_bit_by_bit(trained: Done) -> None:
    shutil.copytree("out", "again")
    shutil.rmtree("again/checkpoints/checkpoint-6")
    again = run("train", "r.yaml", "--set", "model=q", "--set", "output=again", "--resume")
    assert again.code == 0, again.err
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in ("again", "out"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_base_that_bitsandbytes_stored_is_loaded_by_its_own_settings(world: Path) -> None:
    """Without the settings that the proof remembers: Transformers refuses them beside the config's."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loralign.io.clean_process import load_base
    from loralign.io.probes import is_quantised

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained("base", quantization_config=config).save_pretrained("nf4")
    settings = json.loads(Path("nf4/config.json").read_text(encoding="utf-8"))["quantization_config"]
    how = {"model_class": "LlamaForCausalLM", "labels": None, "attention": "sdpa", "quantization": settings}
    assert is_quantised(load_base("nf4", None, {**how, "base_dtype": "float32", "dtype": "float32"}, "cpu"))
