"""`quantize`: a base that is quantised while it is loaded. What needs no package: the table, what it refuses, what
plans count, how a folder's record is read; torchao's own weights are in test_quantised.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from cli_world import assert_one_sentence, bytes_of, run, world_in
from loralign.carrier import quantise
from loralign.carrier.packed import PackedLinear, is_quantised, make_lean, not_sent
from loralign.carrier.quantise import KINDS, Quantize, kind_of, short
from loralign.cli.plan import Planned, as_data, planned, sentences
from loralign.config.recipe import parse
from loralign.plan.quantised import saved_bytes
from loralign.plan.suggest import Choice, findings, first_that_fits, on_nf4, ranked
from loralign.train.begun import check_settings
from loralign.train.recorded import kind_for
from loralign.types import LoralignError
from toy import llama

NAMES = get_args(Quantize)
GIB = 2**30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("quantise")) as root:
        shutil.copytree("base", "stored")
        path = Path("stored/config.json")
        body = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**body, "quantization_config": KINDS["int8"].section}), encoding="utf-8")
        yield root


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_name_is_a_line_and_every_line_is_counted_and_known_again() -> None:
    assert set(KINDS) == set(NAMES)
    with torch.device("meta"):
        model = llama(hidden_size=512, intermediate_size=1024).to(torch.bfloat16)
    for name, kind in KINDS.items():
        settings = kind.settings(torch.bfloat16)
        assert json.loads(json.dumps(settings)) == settings
        assert kind_of(settings) == kind_of({**settings, "more": 1}) == name
        assert short({**settings, "more": 1}) == settings
        assert saved_bytes(model, settings)[0] > 0
        for key in kind.section:
            assert kind_of({**settings, key: "another"}) is None
    assert kind_of(None) is kind_of({}) is None


@pytest.mark.usefixtures("world")
def test_a_plan_counts_what_a_checkpoint_that_is_stored_so_takes() -> None:
    def plan(**keys: Any) -> Planned:
        content = {"model": "base", "data": {"train": "rows.jsonl", "max_length": 8}, "rank": 2, "output": "o", **keys}
        return planned(parse(content), "cuda")

    plain = plan()
    for kind, line in KINDS.items():
        shutil.copytree("base", f"as-{kind}")
        path = Path(f"as-{kind}/config.json")
        body = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**body, "quantization_config": line.section}), encoding="utf-8")
        key = plan(quantize=kind)
        assert key.estimate == plan(model=f"as-{kind}").estimate
        assert key.estimate.weights_bytes < plain.estimate.weights_bytes
        assert as_data(key)["quantize"] == kind
        assert any(f"quantised to {kind} while" in said for said in sentences(key))
    assert not any("quantised" in said for said in sentences(plain))


# ---------------------------------------------------------------------------------------------------------- what is not


REFUSED = {
    "stored": (["train", "r.yaml", "--set", "model=stored", "--set", "quantize=int8"],
               "stored is stored quantised (torchao) and is loaded as it is stored: leave `quantize: int8` out"),
    "stored, planned": (["plan", "r.yaml", "--set", "model=stored", "--set", "quantize=int8"], "is stored quantised"),
    "gguf": (["train", "r.yaml", "--set", "model=small.gguf", "--set", "quantize=int8"],
             "small.gguf is de-quantised while it is loaded, and is not quantised again: leave `quantize: int8` out"),
    "nf4 on a CPU": (["train", "r.yaml", "--set", "quantize=nf4"],
                     "`quantize: nf4` needs a GPU (bitsandbytes packs weights on a CPU in evaluation"),
    "nf4 planned for a CPU": (["plan", "r.yaml", "--set", "quantize=nf4", "--device", "cpu"], "say `--device cuda`"),
    "full": (["train", "r.yaml", "--set", "quantize=int8", "--set", "method=full", "--set", "rank=null",
              "--set", "options={}"],
             "`method: full` trains the weights that `quantize: int8` rounds: leave `quantize` out"),
    "fsdp": (["plan", "r.yaml", "--set", "quantize=int8", "--gpus", "2", "--fsdp"], "FSDP does not split a quantised"),
    "fsdp, stored": (["plan", "r.yaml", "--set", "model=stored", "--gpus", "2", "--fsdp"], "FSDP does not split"),
    "no such kind": (["train", "r.yaml", "--set", "quantize=int4"], "`quantize` must be one of nf4, int8, not 'int4'"),
    "the field's name": (["train", "r.yaml", "--set", "method=qlora"], "set `method: lora` and `quantize: nf4`"),
    "another trainer's key": (["train", "r.yaml", "--set", "load_in_4bit=true"], "says `quantize: nf4`"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_sentence(what: str, world: Path) -> None:
    before = bytes_of(world)
    words, said = REFUSED[what]
    done = run(*words)
    assert done.code == 2 and said in assert_one_sentence(done)
    assert bytes_of(world) == before


@pytest.mark.usefixtures("world")
def test_a_package_that_is_not_installed_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    said = assert_one_sentence(run("train", "r.yaml", "--set", "quantize=int8"))
    assert said.endswith("`quantize: int8` needs the package torchao: pip install 'loralign[quantised]'")
    assert not Path("out").exists()


@pytest.mark.usefixtures("world")
def test_fsdp_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("loralign.train.sft.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    assert "FSDP does not split" in assert_one_sentence(run("train", "r.yaml", "--set", "quantize=int8"))


# ----------------------------------------------------------------------------------------------------------- the record


def proven(folder: Path, quantization: Any) -> Path:
    """A folder with the record that an export writes."""
    (folder / "verify").mkdir(parents=True)
    how = {"loralign": json.dumps({"quantization": quantization})}
    save_file({"logits": torch.zeros(1)}, folder / "verify/probes.safetensors", metadata=how)
    return folder


def test_the_record_of_an_export_decides_unless_somebody_does(world: Path, tmp_path: Path) -> None:
    as_int8 = proven(tmp_path / "int8", {**KINDS["int8"].section, "include_input_output_embeddings": False})
    assert kind_for(as_int8, "base") == "int8"
    assert kind_for(as_int8, "base", asked="none") is None
    assert kind_for(as_int8, "stored") is None, "that base is quantised as it is"
    assert kind_for(as_int8, "base", asked="nf4") == "nf4"
    for other in (None, {"quant_method": "gptq", "bits": 4}):
        assert kind_for(proven(tmp_path / f"other{other}", other), "base") is None
    assert kind_for(proven(tmp_path / "plain", None), "base", asked="int8") == "int8"
    assert kind_for(tmp_path, "base") is None, "a folder without any record"
    with pytest.raises(LoralignError, match=r"needs a GPU .* say `--quantize none` for the base as it is"):
        kind_for(proven(tmp_path / "nf4", KINDS["nf4"].settings(torch.bfloat16)), "base")
    with pytest.raises(LoralignError, match="`--quantize int3`: choose nf4, int8 or none"):
        kind_for(as_int8, "base", asked="int3")
    (as_int8 / "verify/probes.safetensors").write_bytes(b"torn")
    with pytest.raises(LoralignError, match="which says how the base was loaded, is damaged"):
        kind_for(as_int8, "base")
    assert kind_for(as_int8, "base", asked="none") is None


def test_the_record_of_a_checkpoint_is_its_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    for settings, kind in (({"quantize": "'int8'"}, "int8"), ({"quantize": "None"}, None), ({"seed": "0"}, None)):
        body = {"format": 2, "run": "a", "settings": settings}
        (checkpoint.parent / "begun.json").write_text(json.dumps(body), encoding="utf-8")
        assert kind_for(checkpoint, str(world / "base")) == kind
    body = {"format": 2, "run": "a", "settings": {"quantize": "'int8'"}}
    (checkpoint.parent / "begun.json").write_text(json.dumps(body), encoding="utf-8")
    monkeypatch.chdir(checkpoint)
    assert kind_for(Path(), str(world / "base")) == "int8"


def test_a_run_that_began_before_the_key_was_there_goes_on_without_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    body = {"format": 2, "run": "a", "settings": {"seed": "0"}}
    (tmp_path / "checkpoints/begun.json").write_text(json.dumps(body), encoding="utf-8")
    assert check_settings(tmp_path, {"seed": "0", "quantize": "None"}, ()).run == "a"
    with pytest.raises(LoralignError, match="`quantize` is 'int8', the run began with nothing"):
        check_settings(tmp_path, {"seed": "0", "quantize": "'int8'"}, ())


# ---------------------------------------------------------------------------------------------------------- suggestions


def test_nf4_is_suggested_where_nothing_fits_as_it_is() -> None:
    """A base of 10 GiB, of 3 in nf4; the order of methods stays, activations are recomputed before the next one."""
    choices = ranked(findings(), answers=False, width=4096)
    both = [*choices, *on_nf4(choices)]

    def peak(c: Choice) -> int:
        return int(GIB * ((3 if c.quantize else 10) + (2 if c.checkpointing else 4) + c.rank / 64))

    assert first_that_fits(both, peak, 100 * GIB)[0] == choices[0]
    least = first_that_fits(both, peak, 13.5 * GIB)[0]
    assert (least.method, least.quantize, least.checkpointing) == ("lora", None, True)
    first = first_that_fits(both, peak, 12 * GIB)[0]
    assert (first.method, first.rank, first.quantize) == (choices[0].method, choices[0].rank, "nf4")
    with pytest.raises(LoralignError, match=r"recomputed and the base in nf4, takes 5.1 GiB"):
        first_that_fits(both, peak, 4 * GIB)


def test_the_command_suggests_it_for_a_gpu_alone(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain LoRA; two layers of 2048² · 3 + 2048 · 8192 · 3 numbers are 250 MB in bf16 and 65 in nf4."""
    monkeypatch.setattr("loralign.plan.suggest.findings", lambda: [f for f in findings() if f.method == "lora"])
    sizes: Any = {"vocab_size": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2}
    LlamaConfig(**sizes).save_pretrained("wide")
    words = ("suggest", "wide", "--length", "8", "--memory", "0.2", "--device")
    told = json.loads(run(*words, "cuda", "--json").out)
    assert told["recipe"]["quantize"] == "nf4" and "quantised to nf4" in told["reasons"]["base"]
    assert 0.065e9 < told["peak_bytes"] < 0.9 * 0.2 * GIB
    none = assert_one_sentence(run(*words, "cpu"))
    assert "nothing fits" in none and "nf4" not in none


# -------------------------------------------------------------------------------------------------------- torchao's way


class Packed(Tensor):
    """Stands in for a tensor of torchao: whole numbers under a scale, which a product widens."""

    scale: float

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, W, *rest = args
            return nn.functional.linear(x, W.dequantize(), *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor) * self.scale


Packed.__module__ = "torchao.stand_in"


def packed(d_in: int = 24, d_out: int = 16) -> nn.Linear:
    layer = nn.Linear(d_in, d_out)
    whole = torch.randint(-127, 128, (d_out, d_in), generator=torch.Generator().manual_seed(0)).float()
    layer.weight = nn.Parameter(whole.as_subclass(Packed), requires_grad=False)
    layer.weight.scale = 1e-3  # type: ignore[assignment]
    layer.bias.requires_grad_(False)  # type: ignore[union-attr]
    return layer


def test_no_widened_weight_is_kept_for_backward() -> None:
    """Forward to the bit, gradient to 1e-6, and nothing of the weight's size among what is kept."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), packed(), nn.Tanh(), packed(16, 24))
    x, kept, seen = torch.randn(5, 24), {}, {}
    for lean in (False, True):
        if lean:
            make_lean(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):  # type: ignore[misc,func-returns-value]
            y = model(x)
        model.zero_grad()
        y.square().sum().backward()
        kept[lean], seen[lean] = sizes, (y.detach(), model[0].weight.grad.clone())  # type: ignore[union-attr,operator]
    assert isinstance(model[2], PackedLinear) and not isinstance(model[0], PackedLinear)
    assert max(kept[False]) >= 16 * 24 and max(kept[True]) <= 5 * 24
    assert torch.equal(seen[False][0], seen[True][0])
    assert torch.allclose(seen[False][1], seen[True][1], rtol=1e-6, atol=1e-9)
    assert torch.equal(model.eval()(x), seen[True][0])


def test_ddp_does_not_send_what_it_cannot() -> None:
    model = nn.Sequential(nn.Linear(24, 24), packed())
    not_sent(model)
    assert is_quantised(model) and model._ddp_params_and_buffers_to_ignore == ["1.weight"]
    plain = nn.Sequential(nn.Linear(24, 24))
    not_sent(plain)
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore") and not is_quantised(plain)
