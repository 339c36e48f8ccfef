"""Export in every profile, all folders verified in one clean process; then each promise of a profile by itself."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForTokenClassification

import toy
import warm
from loralign import adapt, build, factors, sites
from loralign.carrier.links import commit
from loralign.io import adapter_file
from loralign.io.adapter_file import check_supported
from loralign.io.card import Card, read_card, write_card
from loralign.io.export import ExportReport, base_name, export
from loralign.io.layout import Product, Stored, limited, loss, padded, rounded
from loralign.io.portable import check_portable, needed_max_lora_rank
from loralign.io.probes import probe_inputs
from loralign.io.provenance import write_run
from loralign.io.public import is_local, scrub
from loralign.io.verify import VerifyJob, VerifyReport, verify_many
from loralign.methods.form.plain import Plain
from loralign.types import Episode, Facts, LoralignError, Recipe, Start, WorkFailed
from trainers import step_by_step

METHODS = ("lora", "lora-ga", "pissa")
HEADS = ("bert", "vit")


def recipe(name: str, **fields: Any) -> Recipe:
    made = build(name, **fields)
    assert isinstance(made, Recipe)
    return made


def trained(model: Any, chosen: Recipe, batches: list[dict[str, Tensor]] | None = None) -> PeftModel:
    """Adapted and trained for three steps, in train mode, with gradients left as a real run leaves them."""
    return step_by_step(model, chosen, batches or toy.batches_for(model, 3))


def loaded(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A base model as a user has it: read from a folder."""
    return type(toy.FAMILIES[family]()).from_pretrained(folder, dtype=dtype)


@dataclass(frozen=True)
class Done:
    folder: Path
    export: ExportReport
    verified: VerifyReport


def _cases(bases: dict[str, Path]) -> dict[str, tuple[PeftModel, list[tuple[str, dict[str, Any]]]]]:
    """Trained models by name, with the exports to make of each."""
    bf16 = {"dtype": torch.bfloat16}
    made: dict[str, tuple[PeftModel, list[tuple[str, dict[str, Any]]]]] = {}
    for family in toy.FAMILIES:
        for method in METHODS:
            profiles = ["peft", "merged"] if family in HEADS else ["peft", "portable", "merged"]
            wanted: list[tuple[str, dict[str, Any]]] = [(p, {"profile": p}) for p in profiles]
            model = trained(loaded(family, bases[family]), recipe(method, r=4))
            made[f"{family}/{method}"] = model, [*wanted, ("bf16", bf16)] if family == "llama" else wanted
    layer_0 = r".*layers\.0\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
    both = [("peft", {}), ("portable", {"profile": "portable", "power_of_two": True})]
    ragged = recipe("rslora", r=5, ranks={"q_proj": 3, "layers.1.mlp.down_proj": 7})
    made["ragged"] = trained(loaded("llama", bases["llama"]), ragged), both
    made["subset"] = trained(loaded("llama", bases["llama"]), recipe("lora-ga", r=5, targets=layer_0)), both
    cut = [("peft", {"max_rank": 3}), ("portable", {"profile": "portable", "max_rank": 3, **bf16})]
    made["cut"] = trained(loaded("llama", bases["llama"]), recipe("lora-ga", r=4)), cut
    made["half"] = (
        trained(loaded("llama", bases["llama"], torch.bfloat16), recipe("lora-ga", r=4)),
        [("peft", {}), ("merged", {"profile": "merged"})],
    )
    made["chain"] = chained(loaded("llama", bases["llama"])), both
    tagger = LlamaForTokenClassification.from_pretrained(
        bases["llama"], num_labels=5
    )  # a fresh head on a language model
    tags = [{**b, "labels": b["input_ids"] % 5} for b in toy.batches_for(tagger, 3)]
    made["tagger"] = (
        trained(tagger, recipe("lora", r=2, exclude=("score",)), tags),
        [("peft", {}), ("merged", {"profile": "merged"})],
    )
    return made


@dataclass(frozen=True)
class OneStep:
    facts: ClassVar[Facts] = Facts()

    def episode(self, index: int, total_steps: int, sites: Any, draw: Any) -> Episode | None:
        return Episode(index, 1)


def chained(model: Any) -> PeftModel:
    """Two links at some sites, three at the others."""
    adapted = trained(model, replace(recipe("lora", r=2), outer=OneStep()), toy.batches_for(model, 1))
    draw = torch.Generator().manual_seed(5)
    for i, site in enumerate(sites(adapted) * 2):
        if i % 3:
            fresh = (torch.randn(2, site.d_in, generator=draw), torch.randn(site.d_out, 2, generator=draw) * 0.02)
            commit(site.layer, site.adapter, Start(*fresh))
    return adapted


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Any]]:
    root = tmp_path_factory.mktemp("bases")
    bases = {family: root / family for family in toy.FAMILIES}
    for family, make in toy.FAMILIES.items():
        make().save_pretrained(bases[family])
    return bases, _cases(bases)


@pytest.fixture(scope="module")
def done(models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every export of every case, verified together in one clean process."""
    (bases, cases), root = models, tmp_path_factory.mktemp("exports")
    reports, jobs = {}, {}
    for name, (model, wanted) in cases.items():
        family = name.split("/")[0] if "/" in name else "llama"
        for label, options in wanted:
            key, folder = f"{name}/{label}", root / name.replace("/", "-") / label
            reports[key] = export(model, folder, probes=toy.batch_for(model.get_base_model(), seed=9), **options)
            jobs[key] = VerifyJob(folder, None if options.get("profile") == "merged" else bases[family])
    with pytest.MonkeyPatch.context() as patch:
        warm.verification(patch)
        verified = verify_many(list(jobs.values()))
    return {k: Done(Path(job.folder), reports[k], v) for (k, job), v in zip(jobs.items(), verified, strict=True)}


def test_every_folder_reloads_to_the_same_logits(done: dict[str, Done]) -> None:
    failed = {k: d.verified.failure for k, d in done.items() if not d.verified.passed}
    assert not failed
    assert len(done) == len(toy.FAMILIES) * 3 * 3 - 2 * 3 + 3 + 12
    for key, d in done.items():
        assert d.verified.tolerance == 1e-5 and d.verified.dtype == "float32", key
        assert d.verified.relative <= 1e-5 and d.verified.top1 == 1.0, key
        assert d.verified.effect > 1e-3, f"{key}: an adapter that changes nothing proves nothing"
        assert d.export.exact == (d.verified.lost == 0.0) or d.export.profile == "merged"


def test_twins_keep_their_update_in_bf16(done: dict[str, Done]) -> None:
    for method in METHODS:
        report = done[f"llama/{method}/bf16"].export
        assert report.rounding is not None and not report.exact
        assert 1e-4 < report.rounding.total <= 0.01 and report.rounding.largest <= 0.01
        assert done[f"llama/{method}/bf16"].verified.lost < 0.01


def test_portable_folders_hold_no_traps(done: dict[str, Done]) -> None:
    for key, d in done.items():
        if d.export.profile != "portable":
            continue
        assert check_portable(d.folder) == [], key
        config = json.loads((d.folder / "adapter_config.json").read_text())
        tensors = load_file(d.folder / "adapter_model.safetensors")
        assert config["lora_alpha"] == config["r"] == d.export.rank and config["init_lora_weights"] is True
        assert not config["rank_pattern"] and not config["alpha_pattern"] and config["modules_to_save"] is None
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
        assert any(f"--max-lora-rank {needed_max_lora_rank(config['r'])}" in line for line in d.export.lines())


def test_portable_equals_peft(done: dict[str, Done], models: Any) -> None:
    for name in ("llama/lora-ga", "gpt2/pissa", "ragged", "chain"):
        for site in sites(models[1][name][0]):
            A, B = factors(site)
            for label in ("peft", "portable"):
                d = done[f"{name}/{label}"]
                tensors = load_file(d.folder / "adapter_model.safetensors")
                stored = [tensors[f"base_model.model.{site.name}.lora_{side}.weight"] for side in "AB"]
                scale = alpha_of(d.folder, site.name) / stored[0].shape[0]
                torch.testing.assert_close(scale * stored[1] @ stored[0], B @ A, rtol=1e-5, atol=1e-6)


def alpha_of(folder: Path, name: str) -> float:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["alpha_pattern"].get(f"^{name.replace('.', chr(92) + '.')}$", config["lora_alpha"])


def test_ragged_ranks_have_one_scale_and_anchored_names(done: dict[str, Done], models: Any) -> None:
    config = json.loads((done["ragged/peft"].folder / "adapter_config.json").read_text())
    assert config["r"] == 7 and set(config["rank_pattern"].values()) == {3, 5}
    assert all(key.startswith("^") and key.endswith("$") for key in config["rank_pattern"])
    assert config["rank_pattern"][r"^model\.layers\.0\.self_attn\.q_proj$"] == 3
    scales = {config["lora_alpha"] / config["r"]}
    scales |= {config["alpha_pattern"][key] / rank for key, rank in config["rank_pattern"].items()}
    assert max(scales) - min(scales) < 1e-12, "vLLM applies one scale to all modules"
    assert any("llama.cpp" in trap for trap in done["ragged/peft"].export.traps)
    assert done["ragged/portable"].export.rank == 8
    assert (
        set(done["chain/peft"].export.ranks.values()) == {4, 6}
        or len(set(done["chain/peft"].export.ranks.values())) > 1
    )


def test_an_adapter_of_stock_peft_exports_too(done: dict[str, Done], models: Any, tmp_path: Path) -> None:
    stock = PeftModel.from_pretrained(loaded("llama", models[0]["llama"]), done["ragged/peft"].folder)
    report = export(stock, tmp_path / "out", profile="portable", power_of_two=True)
    assert report.exact and report.rank == 8 and report.base == "llama"
    mine = load_file(done["ragged/portable"].folder / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-6, atol=1e-9)


def test_a_subset_of_layers_is_named_exactly(done: dict[str, Done]) -> None:
    config = json.loads((done["subset/peft"].folder / "adapter_config.json").read_text())
    assert len(done["subset/peft"].export.ranks) == 3
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["exclude_modules"] == [
        f"model.layers.1.{n}" for n in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    ]


def test_truncation_states_its_error(done: dict[str, Done], models: Any) -> None:
    d, model = done["cut/peft"], models[1]["cut"][0]
    assert d.export.truncation is not None and not d.export.exact and d.export.rank == 3
    errors, norms = {}, {}
    for site in sites(model):
        A, B = factors(site)
        S = torch.linalg.svdvals((B @ A).double())
        errors[site.name], norms[site.name] = S[3:].square().sum(), S.square().sum()
        assert d.export.truncation.by_site[site.name] == pytest.approx(
            float((errors[site.name] / norms[site.name]) ** 0.5), rel=1e-3
        )
    total = float((sum(errors.values()) / sum(norms.values())) ** 0.5)
    assert d.export.truncation.total == pytest.approx(total, rel=1e-3)
    assert f"{d.export.truncation.total:.1e}" in (d.folder / "README.md").read_text()
    assert d.export.difference is not None and d.verified.lost == pytest.approx(d.export.difference.relative)


def test_merged_model_is_rounded_once(done: dict[str, Done], models: Any) -> None:
    d, model = done["half/merged"], models[1]["half"][0]
    tensors = load_file(d.folder / "model.safetensors")
    assert "bfloat16" in d.export.merged_into and d.export.difference is not None and not d.export.exact
    for site in sites(model):
        A, B = factors(site)
        W = site.layer.get_base_layer().weight.float() + B @ A
        assert torch.equal(tensors[f"{site.name}.weight"], W.bfloat16())
    fp32 = done["gpt2/lora/merged"].export
    assert fp32.exact and fp32.difference is not None and fp32.difference.relative < 1e-6


def test_a_base_that_was_quantised_keeps_its_settings_of_generation(tmp_path: Path) -> None:
    """It is written by its class without weights, which knows none of them."""
    model = trained(toy.llama(), recipe("lora", r=2))
    base: Any = model.get_base_model()
    base.hf_quantizer, base.generation_config.eos_token_id = SimpleNamespace(pre_quantized=True), [5, 7]
    export(model, tmp_path / "out", profile="merged", base_id="x/y")
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert said["eos_token_id"] == [5, 7]


@pytest.mark.parametrize(
    ("written", "said"), [({"a": torch.zeros(0, 4)}, "holds an empty tensor"), ({}, "was written without weights")]
)
def test_a_merged_model_without_weights_is_noticed(written: Any, said: str, tmp_path: Path) -> None:
    model = trained(toy.llama(), recipe("lora", r=2))
    base: Any = model.get_base_model()
    base.save_pretrained = lambda folder, state_dict: save_file(written, Path(folder, "model.safetensors"))
    with pytest.raises(WorkFailed, match=said):
        export(model, tmp_path / "out", profile="merged", base_id="x/y")
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = trained(toy.llama().bfloat16(), recipe("lora-ga", r=2))
    model.model.model.norm.eval()
    before = [(n, p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    for profile in ("peft", "portable", "merged"):
        export(model, tmp_path / profile, profile=profile, base_id="toy/llama")
    for (name, pointer, dtype, grad, value), p in zip(before, model.parameters(), strict=True):
        assert (p.data_ptr(), p.dtype, p.requires_grad) == (pointer, dtype, grad), name
        assert torch.equal(p, value), name
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_loss_from_grams_equals_the_dense_one() -> None:
    draw = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(4, 40, generator=draw), torch.randn(30, 4, generator=draw)
    dA, dB = 1e-3 * torch.randn(4, 40, generator=draw), 1e-3 * torch.randn(30, 4, generator=draw)
    delta = Product(torch.cat([dA, A0]), torch.cat([B0 + dB, dB], dim=1))
    additive = Product(torch.cat([A0 + dA, A0]), torch.cat([B0 + dB, -B0], dim=1))
    for product, bound in ((delta, 0.01), (additive, 10.0)):
        stored = rounded({"x": Stored(*product, 8.0)}, torch.bfloat16)
        W = product.B.double() @ product.A.double()
        dense = float((stored["x"].B.double() @ stored["x"].A.double() - W).norm() / W.norm())
        assert loss({"x": product}, stored).by_site["x"] == pytest.approx(dense, rel=1e-4)
        assert dense < bound
    assert dense > 0.1, "the additive form is what the Δ-form repairs"


def test_padding_is_exact() -> None:
    A, B = torch.randn(5, 12), torch.randn(9, 5)
    stored = padded({"x": Product(A, B), "y": Product(A[:2], B[:, :2])}, power_of_two=True)
    assert {s.rank for s in stored.values()} == {8} and {s.scale for s in stored.values()} == {1.0}
    torch.testing.assert_close(stored["x"].B @ stored["x"].A, B @ A, rtol=1e-6, atol=1e-6)
    assert padded({"x": Product(A, B)}, power_of_two=False)["x"].rank == 5
    assert loss({"x": Product(A, B)}, {"x": stored["x"]}).total < 1e-7


def test_rank_limit_without_loss_and_refusals() -> None:
    A, B = torch.randn(2, 12), torch.randn(9, 2)
    kept, cut = limited({"x": Product(A, B)}, 2)
    assert cut is None and kept["x"].A is A
    low, cut = limited({"x": Product(torch.cat([A, A]), torch.cat([B, B], dim=1))}, 2)
    assert cut is not None and cut.total < 1e-5 and low["x"].A.shape[0] == 2
    small, cut = limited({"x": Product(torch.randn(6, 12), torch.randn(3, 6))}, 4)  # the product has rank 3
    assert cut is not None and cut.total < 1e-5 and small["x"].A.shape == (3, 12) and small["x"].B.shape == (3, 3)
    with pytest.raises(LoralignError, match="start at 1"):
        limited({"x": Product(A, B)}, 0)


def test_slots_that_are_zero_in_one_factor_are_dropped_on_request_and_dead_ones_always(tmp_path: Path) -> None:
    model = trained(toy.llama(), recipe("lora", r=4))
    q, k = sites(model)[:2]
    with torch.no_grad():
        q.layer.lora_B["default"].weight[:, 1:3] = 0
        k.layer.lora_B["default"].weight.zero_()
    assert set(export(model, tmp_path / "all", base_id="x/y").ranks.values()) == {4}
    report = export(model, tmp_path / "some", base_id="x/y", drop={q.name: (1, 2), k.name: range(4)})
    assert (report.ranks[q.name], report.exact) == (2, True) and k.name not in report.ranks
    with torch.no_grad():
        q.layer.lora_A["default"].weight[1] = 0
    dead = export(model, tmp_path / "dead", base_id="x/y")
    assert (dead.ranks[q.name], dead.ranks[k.name], dead.exact) == (3, 4, True)
    with pytest.raises(LoralignError, match="not zero"):
        export(model, tmp_path / "no", base_id="x/y", drop={q.name: (0,)})
    with pytest.raises(LoralignError, match="no adapted site"):
        export(model, tmp_path / "no", base_id="x/y", drop={"q": (0,)})
    assert not (tmp_path / "no").exists()


@dataclass(frozen=True)
class Approximate(Plain):
    facts: ClassVar[Facts] = replace(Plain.facts, exact=False)


def test_a_form_without_exact_fold_says_so(tmp_path: Path) -> None:
    model = trained(toy.llama(), replace(recipe("lora", r=2), form=Approximate()))
    report = export(model, tmp_path / "out", base_id="x/y")
    assert not report.exact and not report.method_exact and report.difference is not None
    assert "paper's own merge" in (tmp_path / "out" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_portable_refuses_a_head(models: Any, tmp_path: Path) -> None:
    for family in HEADS:
        with pytest.raises(LoralignError, match=r"classifier was trained in full .*vLLM refuses"):
            export(models[1][f"{family}/lora"][0], tmp_path / "out", profile="portable")
    assert not list(tmp_path.iterdir())


def test_merged_refuses_a_tied_head_and_a_dtype(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = trained(toy.tied(), recipe("lora", r=2, targets=("lm_head", "q_proj")))
    with pytest.raises(LoralignError, match="shares its weight with"):
        export(model, tmp_path / "out", profile="merged", base_id="x/y")
    with pytest.raises(LoralignError, match="dtype of its base"):
        export(model, tmp_path / "out", profile="merged", base_id="x/y", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("use_dora", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [(0, 1)]),
        ("trainable_token_indices", [3]),
    ],
)
def test_refuses_what_factors_cannot_say(key: str, value: Any) -> None:
    with pytest.raises(LoralignError, match=f"the adapter uses PEFT's `{key}`, which loralign does not export"):
        check_supported(LoraConfig(**{"target_modules": ["q_proj"], key: value}))
    check_supported(LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"]))


def test_refuses_what_is_not_factors(tmp_path: Path) -> None:
    model = trained(toy.llama(), recipe("lora", r=2))
    model.merge_adapter()
    with pytest.raises(WorkFailed, match="merged into the base in memory: call unmerge_adapter"):
        export(model, tmp_path / "out", base_id="x/y")
    model.unmerge_adapter()
    model.peft_config["default"].use_dora = True
    with pytest.raises(LoralignError, match="use_dora"):
        export(model, tmp_path / "out", base_id="x/y")
    with pytest.raises(LoralignError, match=r"takes an adapted model.*not a LlamaForCausalLM"):
        export(toy.llama(), tmp_path / "out")
    with torch.no_grad():
        sites(model)[0].layer.lora_A["default"].weight[0, 0] = float("nan")
    model.peft_config["default"].use_dora = False
    with pytest.raises(WorkFailed, match="NaN"):
        export(model, tmp_path / "out", base_id="x/y")


def test_results_are_replaced_only_on_request(tmp_path: Path) -> None:
    model, out = trained(toy.llama(), recipe("lora", r=2)), tmp_path / "out"
    out.mkdir()
    export(model, out, base_id="x/y")  # an empty folder is fine
    (out / "log.jsonl").write_text("{}")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    for profile in ("peft", "merged"):
        with pytest.raises(LoralignError, match="out holds an earlier result: name another folder, or pass overwrite"):
            export(model, out, base_id="x/y", profile=profile)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    export(model, out, base_id="x/y", profile="merged", overwrite=True)
    assert not (out / "adapter_config.json").exists() and (out / "model.safetensors").exists()
    export(model, out, base_id="x/y", overwrite=True)
    names = {p.name for p in out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "verify", "log.jsonl"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(LoralignError, match="not made by loralign"):
        export(model, foreign, base_id="x/y")
    export(model, foreign, base_id="x/y", overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    with pytest.raises(LoralignError, match="is a file"):
        export(model, foreign / "thesis.tex", base_id="x/y")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "foreign"}


def test_who_may_read_the_folder_may_read_every_file(tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read."""
    before = os.umask(0o022)
    try:
        export(trained(toy.llama(), recipe("lora", r=2)), tmp_path / "out", base_id="x/y")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()} == dict.fromkeys(
        ("adapter_config.json", "adapter_model.safetensors", "README.md", "probes.safetensors"), 0o644
    )


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = trained(toy.llama(), recipe("lora", r=2)), tmp_path / "out"
    if existing:
        export(model, out, base_id="x/y")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_file, "save_file", full)
    with pytest.raises(WorkFailed, match="no space left on the disk"):
        export(model, out, base_id="x/y", overwrite=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert out.exists() == existing and [p for p in tmp_path.iterdir() if p != out] == []


def test_a_wrong_write_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, save = trained(toy.llama(), recipe("lora", r=2)), adapter_file.save_file

    def damaged(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save({k: v * 0 if "layers.1.mlp" in k else v for k, v in tensors.items()}, path, **options)

    monkeypatch.setattr(adapter_file, "save_file", damaged)
    with pytest.raises(WorkFailed, match=r"layers\.1\.mlp.*differs from what was written"):
        export(model, tmp_path / "out", base_id="x/y")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- names and text


def test_base_names_are_never_paths(tmp_path: Path) -> None:
    model, config = trained(toy.llama(), recipe("lora", r=2)), tmp_path / "My-Base" / "config.json"
    with pytest.raises(LoralignError, match="pass base_id"):
        base_name(model, None, None)
    config.parent.mkdir()
    config.write_text("{}")
    assert base_name(model, str(config.parent), "abc") == ("My-Base", "abc")
    config.write_text(json.dumps({"_name_or_path": "org/original"}))
    assert base_name(model, str(config.parent), None) == ("org/original", None)
    config.write_text(json.dumps({"_name_or_path": "/home/someone/original"}))
    assert base_name(model, str(config.parent), None) == ("My-Base", None)
    cache = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    cache.mkdir(parents=True)
    assert base_name(model, str(cache), None) == ("org/name", "0a1b")
    assert base_name(model, "org/name", "main") == ("org/name", "main")
    assert is_local("./x") and is_local("/x") and is_local("C:\\x") and is_local("a/b/c") and not is_local("org/name")


@pytest.mark.parametrize("text", ["[]", '{"prompts": ["text"]}', '{"prompts": '])
def test_a_damaged_run_json_is_refused_since_it_says_how_to_ask(text: str, tmp_path: Path) -> None:
    assert not read_card(tmp_path, "base").prompts
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(LoralignError, match=r"run\.json in .* is damaged: copy it again, or delete it"):
        read_card(tmp_path, "base")


def test_card_and_run_json_hold_no_paths(tmp_path: Path) -> None:
    base = tmp_path / "My-Base"
    toy.llama().save_pretrained(base)
    model = trained(loaded("llama", base), recipe("lora-ga", r=2))
    card = Card(
        base=str(base),
        method="lora-ga",
        options={"gamma": 16.0, "targets": ("q_proj", "v_proj"), "cache": tmp_path / "cache"},
        data={"name": str(tmp_path / "rows.jsonl"), "rows": 12, "fingerprint": "ab12"},
        learning_rate=2e-4,
        lr_source="sweep | ours",
        metrics={"eval loss": 1.23456},
        source={"train": str(tmp_path / "rows.jsonl")},
    )
    report = export(model, tmp_path / "out", card=card, dtype=torch.bfloat16)
    write_card(tmp_path / "out", replace(card, export=report, verified=True))
    write_run(tmp_path / "out", replace(card, export=report, verified=True), seconds={"train": 1.5})
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and front["base_model"] == "My-Base"
    assert front["pipeline_tag"] == "text-generation" and "base_model:adapter:My-Base" in front["tags"]
    for said in ("rows.jsonl", "ab12", "0.0002", r"sweep \| ours", "1.235", "Stored in bfloat16", "Verified:", "gamma"):
        assert said in text, said
    code = text.split("```python\n")[1].split("```")[0]
    assert "loralign" not in code and len(code.strip().splitlines()) == 3
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["seconds"] == {"train": 1.5} and run["export"]["rounding"]["total"] < 0.01
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_card_without_export_is_of_a_whole_model(tmp_path: Path) -> None:
    write_card(tmp_path, Card("org/base", method="full", metrics={"loss": 1}))
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model_relation"] == "finetune"
    assert "lora" not in front["tags"] and "A fine-tuned copy of `org/base`" in text


def test_scrub() -> None:
    assert scrub({"a": Path("/x/y.json"), "b": ("/x/z", 1, None), "c": "read /x/y first"}) == {
        "a": "y.json",
        "b": ["z", 1, None],
        "c": "read y first",
    }


def test_traps_are_named(tmp_path: Path) -> None:
    model = trained(toy.llama(), recipe("rslora", r=2, targets=("k_proj",), ranks={"layers.0.self_attn.k_proj": 3}))
    export(model, tmp_path, base_id="x/y")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"use_dora": True, "bias": "all", "lora_dropout": 0.1, "target_modules": ".*k_proj", "r": 600}
    config |= {"use_rslora": True, "modules_to_save": ["score"], "init_lora_weights": "pissa"}
    path.write_text(json.dumps(config))
    traps = check_portable(tmp_path)
    for key in (
        *(
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "bias",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "score"[:0],
        ),
        *(
            "modules_to_save",
            "init_lora_weights",
            "no integer",
            "max_lora_rank",
            "SGLang needs all three",
            "ranks [2, 3]",
        ),
    ):
        assert any(key in trap for trap in traps), key
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors |= {first: tensors[first].bfloat16(), f"{first}.magnitude": torch.ones(2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    traps = check_portable(tmp_path)
    assert "mixed dtypes ['BF16', 'F32']: servers cast all tensors to one" in traps
    assert any(trap.startswith(f"{first}.magnitude: llama.cpp aborts on tensors other than") for trap in traps)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LoralignError, match="no readable adapter"):
        check_portable(tmp_path)


# -------------------------------------------------------------------------------------------------------------- probes


def test_probes_are_small_unpadded_and_complete() -> None:
    for family, make in toy.FAMILIES.items():
        model = adapt(make(), recipe("lora", r=2))
        for inputs in (probe_inputs(model), probe_inputs(model, toy.batch_for(model, rows=4, length=40))):
            assert "labels" not in inputs and all(v.shape[0] <= 2 for v in inputs.values())
            assert ("decoder_input_ids" in inputs) == (family == "t5")
            assert inputs.get("attention_mask", torch.ones(1)).all()
    left = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    model = adapt(toy.llama(), recipe("lora", r=2))
    assert torch.equal(probe_inputs(model, left)["input_ids"], left["input_ids"][:, 2:])
    with pytest.raises(LoralignError, match="hold none of"):
        probe_inputs(model, {"rows": torch.ones(2)})


@pytest.mark.parametrize("profile", ["peft", "portable", "merged"])
def test_the_rank_of_a_truncation_is_the_one_asked_for(profile: Any, tmp_path: Path) -> None:
    """Of a merged model, which has none itself, and before padding."""
    model = trained(toy.llama(), recipe("lora", r=4))
    padding = {"power_of_two": True} if profile == "portable" else {}
    report = export(model, tmp_path / "out", base_id="x/y", profile=profile, max_rank=3, **padding)
    assert [line for line in report.lines() if line.startswith("Truncated to rank 3:")]
    export(model, tmp_path / "all", base_id="x/y", profile=profile, max_rank=10**9)
