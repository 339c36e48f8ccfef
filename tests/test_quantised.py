"""A base in int8 by torchao, stored so or quantised while it is loaded, from rows to a verified adapter, on the CPU.
Skipped where torchao is not installed (`pip install torchao==0.18.0`, 3.4 MB)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cli_world import Done, assert_one_sentence, run, world_in
from loralign.io.clean_process import load_base
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


# ----------------------------------------------------------------------------------------- quantised while it is loaded


@pytest.fixture(scope="module")
def by_key(trained: Done) -> Done:
    """The same run on the base as it is, quantised by the recipe."""
    return run("train", "r.yaml", "--set", "quantize=int8", "--set", "output=key")


def same(one: str, other: str) -> bool:
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_the_key_trains_as_a_base_that_is_stored_so(by_key: Done) -> None:
    assert by_key.code == 0, by_key.err
    assert by_key.out.splitlines()[-1] == "Verified: key"
    assert "linear layers quantised while it was loaded: int8" in by_key.err
    assert "on the base quantised to int8 while it was loaded" in by_key.out
    assert same("key", "out")


def test_the_folder_says_how_its_base_was_loaded(by_key: Done) -> None:
    """The code on the card gives the trained model; without its settings stock PEFT loads the adapter as well."""
    said = json.loads(Path("key/run.json").read_text(encoding="utf-8"))
    assert said["source"]["quantize"] == "int8" and "torchao" in said["environment"]["versions"]
    card = Path("key/README.md").read_text(encoding="utf-8")
    assert "| base | quantised to int8 while it was loaded (torchao) |" in card and "quantize: int8" in card
    code = card.split("```python")[1].split("```")[0].replace("path/to/this/folder", "key")
    found: dict[str, Any] = {}
    exec(code, found)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "key")
    with safe_open("key/verify/probes.safetensors", framework="pt") as file:
        ids, want = file.get_tensor("input.input_ids"), file.get_tensor("logits")
    with torch.no_grad():
        got, near = (model.eval()(ids).logits[:, -want.shape[1] :] for model in (found["model"], plain))
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert 1e-4 < float((near - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("profile", ["portable", "merged"])
def test_every_command_loads_the_base_as_in_training(profile: str, by_key: Done) -> None:
    assert run("verify", "key", "--base", "base").code == 0
    out = f"as-{profile}"
    exported = run("export", "key", "--base", "base", "--profile", profile, "--out", out)
    assert exported.code == 0, exported.err
    assert "quantised while it is loaded, as in training: int8" in exported.err
    assert run("verify", out, "--base", "base").code == 0
    near = run("export", "key", "--base", "base", "--profile", profile, "--out", f"{out}-near", "--quantize", "none")
    assert near.code == 0 and "as in training" not in near.err
    ours, theirs = (load_file(f"{folder}/verify/probes.safetensors")["logits"] for folder in (out, f"{out}-near"))
    assert not torch.equal(ours, theirs)
    if profile == "portable":
        shown = run("generate", out, "--base", "base", "--prompt", "w1")
        assert shown.code == 0 and "as in training: int8" in shown.err


def test_a_checkpoint_is_opened_on_the_base_that_its_run_had(by_key: Done) -> None:
    of = ("--data", "rows.jsonl", "--base", "base", "--limit", 2)
    done = run("eval", "key/checkpoints/checkpoint-4", *of)
    assert done.code == 0 and "as in training: int8" in done.err
    assert "as in training" not in run("eval", "key/checkpoints/checkpoint-4", *of, "--quantize", "none").err


def test_a_stopped_run_goes_on_as_it_was_begun_or_not_at_all(by_key: Done) -> None:
    shutil.copytree("key", "key-again")
    shutil.rmtree("key-again/checkpoints/checkpoint-6")
    words = ("train", "r.yaml", "--resume", "--set", "output=key-again")
    other = assert_one_sentence(run(*words))
    assert "`quantize` is None, the run began with 'int8'" in other
    again = run(*words, "--set", "quantize=int8")
    assert again.code == 0, again.err
    assert same("key-again", "out")


def test_bf16_is_computed_in_bf16_and_proven_so(world: Path) -> None:
    """What is not quantised has the precision of the run, in the proof too."""
    done = run("train", "r.yaml", "--set", "quantize=int8", "--set", "train.precision=bf16", "--set", "output=half")
    assert done.code == 0 and done.out.splitlines()[-1] == "Verified: half", done.err
    with safe_open("half/verify/probes.safetensors", framework="pt") as file:
        how = json.loads(file.metadata()["loralign"])
    assert (how["base_dtype"], how["dtype"], how["tolerance"]) == ("bfloat16", "bfloat16", 3e-2)
    assert run("verify", "half", "--base", "base").code == 0
    assert {p.dtype for p in load_base("base", None, how, "cpu").parameters()} == {torch.bfloat16}


def test_layers_that_are_left_out_are_merged_from_their_widened_weights(by_key: Done) -> None:
    done = run("train", "r.yaml", "--set", "quantize=int8", "--set", "exclude=[down_proj]", "--set", "output=part")
    assert done.code == 0, done.err
    assert run("export", "part", "--base", "base", "--profile", "merged", "--out", "part-merged").code == 0
    assert run("verify", "part-merged").code == 0
    kinds = {t.dtype for t in load_file("part-merged/model.safetensors").values()}
    assert kinds == {torch.float32}


def test_full_fine_tuning_of_a_base_that_is_stored_so_is_refused(world: Path) -> None:
    done = run("train", "r.yaml", *(p for w in ("model=q", "method=full", "rank=null", "options={}", "output=no")
                                    for p in ("--set", w)))  # fmt: skip
    assert done.code == 2 and "is stored quantised" in assert_one_sentence(done)


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def test_a_base_that_bitsandbytes_stored_is_loaded_by_its_own_settings(world: Path) -> None:
    """Without the settings that the proof remembers: Transformers refuses them beside the config's."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loralign.carrier.packed import is_quantised

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained("base", quantization_config=config).save_pretrained("nf4")
    settings = json.loads(Path("nf4/config.json").read_text(encoding="utf-8"))["quantization_config"]
    how = {"model_class": "LlamaForCausalLM", "labels": None, "attention": "sdpa", "quantization": settings}
    assert is_quantised(load_base("nf4", None, {**how, "base_dtype": "float32", "dtype": "float32"}, "cpu"))
