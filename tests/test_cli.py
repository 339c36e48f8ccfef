"""The command line from a recipe file to a verified adapter; every bad input: exit code, one sentence, no damage."""

from __future__ import annotations

import io
import json
import logging
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_trl
import toy
from cached_assets import asset, needs
from cli_world import TEMPLATE, Done, assert_one_sentence, bytes_of, run, run_process, world_in
from loralign import METHODS
from loralign.cli.guard import _Stderr, explained
from loralign.cli.run import Lines, progress
from loralign.io.clean_process import read_probes
from loralign.train import use
from loralign.types import VerificationFailed, WorkFailed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where the commands run."""
    with world_in(tmp_path_factory.mktemp("cli")) as root:
        yield root


@pytest.fixture(scope="module")
def trained(world: Path) -> Done:
    """`loralign train r.yaml`; the result lies in `out`."""
    return run("train", "r.yaml")


@contextmanager
def no_file_above(limit: int) -> Iterator[None]:
    """Within: the system refuses to make a file longer, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------------------- the whole way


def test_train_leaves_a_verified_plain_adapter(trained: Done) -> None:
    assert trained.code == 0, trained.err
    assert trained.out.splitlines()[0] == "lora-ga: learning rate 0.01 (given)"
    assert trained.out.splitlines()[-1] == "Verified: out"
    metrics = dict(re.findall(r"^(\w+): ([\d.e+-]+)$", trained.out, re.MULTILINE))
    assert float(metrics["eval_loss"]) < float(metrics["eval_loss_before"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json", "log.jsonl"} <= {
        p.name for p in Path("out").iterdir()
    }
    assert "applied to 14/14 pairs" in trained.err
    assert len(Path("out/log.jsonl").read_text(encoding="utf-8").splitlines()) >= 3


def test_a_run_under_autocast_exports_what_it_trained(world: Path) -> None:
    """What a GPU does by default: a bf16 base, and accelerate's autocast around the trained model's forward. The run
    verifies itself, in fp32 and to 1e-5."""
    done = run("train", "r.yaml", "--set", "train.precision=bf16", "--set", "train.steps=2", "--set", "output=half")
    assert (done.code, done.out.splitlines()[-1]) == (0, "Verified: half"), done.err
    how, *_ = read_probes(Path("half"))
    assert (how["base_dtype"], how["dtype"], how["tolerance"]) == ("bfloat16", "float32", 1e-5)
    assert how["effect"] > 1e-4


def test_progress_without_a_terminal_is_plain_lines(trained: Done) -> None:
    assert "\r" not in trained.err
    assert "\x1b" not in trained.err
    assert "train: 6/6" in trained.err


def test_a_finished_folder_is_not_trained_over(trained: Done) -> None:
    before = bytes_of(Path("out"))
    done = run("train", "r.yaml")
    assert done.code == 2
    assert "out is not empty: choose another output folder, or --resume" in assert_one_sentence(done)
    assert bytes_of(Path("out")) == before


def test_last_rows_may_be_dropped_and_fewer_rows_than_a_batch_are_still_told(world: Path, tmp_path: Path) -> None:
    """The first batch, which checks the start and becomes the probe, has fewer rows than one of training."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((world / "rows.jsonl").read_text(encoding="utf-8").splitlines(True)[:3]), encoding="utf-8")
    drop = ("--set", "method=lora", "--set", "options={}", "--set", "train.extra={dataloader_drop_last: true}")
    done = run("train", "r.yaml", *drop, "--set", f"output={tmp_path / 'all'}", "--set", "train.steps=2")
    assert done.code == 0, done.err
    none = run("train", "r.yaml", *drop, "--set", f"output={tmp_path / 'none'}", "--set", f"data={{train: {few}}}")
    assert none.code == 2
    assert "dataloader_drop_last" in assert_one_sentence(none)


@pytest.mark.usefixtures("trained")
def test_full_disk_then_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree("out", folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json", "README.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    kept = bytes_of(folder / "checkpoints" / "checkpoint-4")
    with no_file_above(12_000):
        full = run("train", "r.yaml", "--set", f"output={folder}", "--resume")
    assert full.code == 1
    assert re.search(r"writing failed \(.+\): free some space, then --resume", assert_one_sentence(full))
    assert bytes_of(folder / "checkpoints" / "checkpoint-4") == kept
    assert (folder / "checkpoints" / "checkpoint-6").exists(), "the save should have been cut off in the middle"
    resumed = run("train", "r.yaml", "--set", f"output={folder}", "--resume")
    assert resumed.code == 0, resumed.err
    ours, whole = (load_file(f / "adapter_model.safetensors") for f in (folder, Path("out")))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


@pytest.mark.usefixtures("trained")
def test_export_profiles_and_verify(tmp_path: Path) -> None:
    done = run("export", "out", "--out", tmp_path / "served", "--profile", "portable", "--power-of-two")
    assert done.code == 0, done.err
    assert "rank 8" in done.out
    assert done.out.splitlines()[-1] == f"Written: {tmp_path / 'served'}"
    checked = run("verify", tmp_path / "served", "--base", "base")
    assert checked.code == 0, checked.err
    assert checked.out.startswith("Verified in a clean process")
    half = run("export", "out", "--out", tmp_path / "half", "--dtype", "bfloat16", "--max-rank", 2)
    assert half.code == 0, half.err
    assert "not exact" in half.out or "%" in half.out
    with (tmp_path / "half" / "adapter_config.json").open(encoding="utf-8") as f:
        assert json.load(f)["r"] == 2
    merged = run("export", "out", "--out", tmp_path / "merged", "--profile", "merged")
    assert merged.code == 0, merged.err
    assert (tmp_path / "merged" / "config.json").exists()


@pytest.mark.usefixtures("trained")
def test_export_on_a_full_disk_leaves_the_former_export(tmp_path: Path) -> None:
    assert run("export", "out", "--out", tmp_path / "kept").code == 0
    before = bytes_of(tmp_path)
    with no_file_above(12_000):
        done = run("export", "out", "--out", tmp_path / "kept", "--max-rank", 6, "--overwrite")
    assert done.code == 1
    assert "free some" in assert_one_sentence(done)
    assert bytes_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_a_damaged_adapter_fails_verification_with_3(tmp_path: Path) -> None:
    shutil.copytree("out", tmp_path / "bad", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "bad" / "adapter_model.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(path).items()}, path)
    done = run("verify", tmp_path / "bad", "--base", "base")
    assert done.code == 3
    assert_one_sentence(done)


@pytest.mark.usefixtures("trained")
def test_eval_and_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], use._generated

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append({m.disable_adapters for m in model.modules() if isinstance(m, LoraLayer)})
        return real(model, *args, **kwargs)

    monkeypatch.setattr(use, "_generated", watched)
    found = run("eval", "out", "--data", "rows.jsonl", "--limit", 6, "--max-new-tokens", 4, "--json")
    assert found.code == 0, found.err
    numbers = json.loads(found.out)
    assert numbers["rows"] == 6
    assert 0 <= numbers["exact_match_base"] <= numbers["exact_match"] <= 1
    assert asked == [{False}, {True}], "the adapter, then its base alone"
    text = run_process("generate", "out", "--prompt", "w5 w6", "--prompt", "w7", "--max-new-tokens", 3)
    assert text.code == 0, text.err
    assert text.err == "", "no bars, no warnings"
    answers = text.out.splitlines()
    assert len(answers) == 2
    assert all(re.fullmatch(r"(w\d+ ?)*", a) for a in answers)


def test_eval_takes_conversations_and_names_rows_without_answers(tmp_path: Path, trained: Done) -> None:
    assert trained.code == 0
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "w5 w6"}), encoding="utf-8")
    talk = run("eval", "out", "--data", tmp_path / "talk.jsonl", "--max-new-tokens", 2)
    assert talk.code == 0, talk.err
    assert "rows: 1" in talk.out
    text = run("eval", "out", "--data", tmp_path / "text.jsonl")
    assert text.code == 2
    assert "text.jsonl has rows without an answer" in assert_one_sentence(text)


def test_init_reports_what_the_start_holds(tmp_path: Path) -> None:
    done = run("init", "r.yaml", "--set", f"output={tmp_path / 'start'}", "--report")
    assert done.code == 0, done.err
    shares = json.loads((tmp_path / "start" / "start" / "shares.json").read_text(encoding="utf-8"))
    assert list(shares["of"]) == ["lora-ga", "lora", "hrp-sketch", "best possible"]
    for name, best in shares["of"]["best possible"].items():
        for start in shares["of"].values():
            assert 0 <= start[name] <= best * (1 + 1e-5) <= 1 + 1e-5
    total = re.search(r"^all +([\d.]+)% +([\d.]+)% +([\d.]+)% +([\d.]+)%$", done.out, re.MULTILINE)
    assert total, done.out
    gradient, random, _, best = map(float, total.groups())
    assert random < gradient < best
    assert (tmp_path / "start" / "start" / "shares.png").read_bytes().startswith(b"\x89PNG")
    stored = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert any(bool(v.any()) for v in stored.values())
    assert not (tmp_path / "start" / "checkpoints").exists()


def test_plan_says_what_the_run_costs(trained: Done) -> None:
    assert trained.code == 0
    done = run("plan", "r.yaml", "--device", "cpu")
    assert done.code == 0, done.err
    trained_numbers = (
        sum(v.numel() for v in load_file("out/adapter_model.safetensors").values()) // 2
    )  # a twin: rank 2r
    assert done.out.splitlines()[0].startswith(f"lora-ga on base: {trained_numbers:,} trained numbers at 14 sites")
    assert "export         rank 8, exact at rank 2r" in done.out
    assert "learning rate  0.01 (given); lr·s = 0.16" in done.out
    data = json.loads(run("plan", "r.yaml", "--set", "train.learning_rate=null", "--json").out)
    assert data["trainable"] == trained_numbers
    assert data["lr_source"].startswith("prior of lora-ga: ")
    assert data["peak_bytes"] >= data["weights_bytes"] + data["adapter_bytes"] + data["optimizer_bytes"]
    assert run("train", "r.yaml", "--dry-run", "--set", "output=never").out.startswith("lora-ga on base")
    assert not Path("never").exists()


def test_plan_warns_of_a_run_that_ends_before_its_method_acts() -> None:
    cases = {
        "train.steps=6": "delta-lora: its rule acts after step 501 and the run has 6 steps, ",
        "options={wait_steps: 4}": None,
        "train.steps=null": "delta-lora: its rule acts after step 501: the run must have more, ",
    }
    for setting, said in cases.items():
        words = ["plan", "r.yaml", "--set", "method=delta-lora", "--set", "options={}", "--set", setting]
        lines = [x for x in run(*words).out.splitlines() if x.startswith("warning ")]
        warnings = json.loads(run(*words, "--json").out)["warnings"]
        assert lines == [f"warning        {text}" for text in warnings]
        assert [text.startswith(str(said)) for text in warnings] == [True] * bool(said)


def test_a_rule_that_decides_by_validation_rows_gets_its_own(tmp_path: Path) -> None:
    """They are no rows of the training; `plan` says how many forwards they cost; the exported ranks are ragged."""
    method = ["method=allocating-lora", "options={rounds: 1, rows: 2, scored: 6}", f"output={tmp_path / 'out'}"]
    words = [word for o in method for word in ("--set", o)]
    planned = run("plan", "r.yaml", *words)
    assert planned.code == 0 and "about 12 forwards of its validation rows" in planned.out, planned.err
    done = run("train", "r.yaml", *words)
    assert done.code == 0, done.err
    assert "slots: " in done.err and "modules alive" in done.err
    course = [json.loads(line) for line in (tmp_path / "out" / "ranks.jsonl").read_text().splitlines()]
    assert f"budget {course[0]['slots']} → {course[0]['slots']} slots" in done.err
    assert course[0]["step"] == 0 and {e["slots"] for e in course} == {sum(course[0]["ranks"].values())}
    assert course[0]["ranks"] != course[-1]["ranks"], "slots moved"
    assert (tmp_path / "out" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    many = run("train", "r.yaml", *words, "--set", "options={rounds: 1, rows: 5000}", "--set", "output=none")
    assert many.code == 2 and "keeps 5000 rows apart to decide by" in assert_one_sentence(many)


def test_export_takes_an_adapter_of_pefts_adalora(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    settings = {"init_r": 2, "target_r": 1, "total_step": 9, "lora_alpha": 4}
    theirs: Any = get_peft_model(base, AdaLoraConfig(**settings, target_modules=["q_proj"]))
    for name, p in theirs.named_parameters():
        if "lora_E" in name:
            p.data.copy_(torch.tensor([[30.0], [0.0]]))
    theirs.save_pretrained(tmp_path / "theirs")
    done = run("export", tmp_path / "theirs", "--base", "base", "--out", tmp_path / "plain")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 1
    assert run("verify", tmp_path / "plain", "--base", "base").code == 0


def test_methods_doctor_schema_version() -> None:
    table = run("methods")
    assert table.code == 0
    listed = json.loads(run("methods", "--json").out)
    assert [m["id"] for m in listed] == list(METHODS)
    assert all(re.search(rf"^{m['id']} ", table.out, re.MULTILINE) for m in listed)
    assert max(map(len, table.out.splitlines())) <= 110
    health = run("doctor")
    assert health.code == 0, health.out
    assert "ok     torch " in health.out
    assert "ok     adapter layers: forward, merge and save agree" in health.out
    assert run("schema").out == (ROOT / "docs" / "schema.json").read_text(encoding="utf-8")
    assert run("schema", "--text", "--of", "studies").out.startswith("model: text, required\n    Folder or hub id")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").out)


def test_lines_of_the_log_go_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress() as bars:
        bars("train", 1, 2)
        _Stderr().emit(logging.makeLogRecord({"msg": "step 1 of 2: loss 3.0000"}))
        bars("train", 2, 2)
    drawn = cast(io.BytesIO, terminal.buffer).getvalue().decode()
    assert "2/2" in drawn and re.search(r"\x1b\[2Kstep 1 of 2: loss 3\.0000\n", drawn)


def test_one_method_in_full() -> None:
    """Its equation, where its options stand, and no example; a mix is both; what is not there is one sentence."""
    page = run("methods", "lora-ga + spectral").out
    assert "W_eff(0) = W0 + s(B0·A0 − B0·A0) = W0" in page and ">>>" not in page
    assert re.search(r"^options +gamma: 16\.0  \(a number\)$", page, re.MULTILINE)
    assert re.search(r"^options +momentum: 0\.8  \(a number\)$", page, re.MULTILINE) and "\nspectral: every" in page
    assert json.loads(run("methods", "spectral", "--json").out)[0]["options"]["newton_steps"] == 5
    assert "unknown method 'lora-gaa'; did you mean lora-ga" in assert_one_sentence(run("methods", "lora-gaa"))


def test_every_command_has_help_with_an_example() -> None:
    listing, reference = run(), (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert listing.code == 0
    assert re.search(r"suggest .*plan .*train .*export .*methods ", listing.out, re.DOTALL), "in the order of use"
    names = "train compare init export verify eval generate plan rows methods doctor"
    for command in names.split():
        assert command in listing.out
        assert re.search(rf"`(loralign )?{command}\b", reference)
        page = run(command, "--help")
        assert page.code == 0
        assert f"loralign {command}" in re.sub(r"\s+", " ", page.out.split("Example:")[1])


@pytest.mark.usefixtures("trained")
def test_subspace_extract_and_show(tmp_path: Path) -> None:
    assert run("export", "out", "--out", tmp_path / "twin").code == 0
    file = tmp_path / "shared.safetensors"
    done = run("subspace", "extract", "out", tmp_path / "twin", "--out", file, "--width", 4)
    assert done.code == 0, done.err
    shown = run("subspace", "show", file, "--rank", 4)
    assert shown.code == 0
    row = next(line.split() for line in shown.out.splitlines() if line.startswith("model.layers.1.mlp.up_proj"))
    assert row[2:4] == ["1.00", "1.00"], "an adapter shares everything with itself"
    start = run(
        "init", "r.yaml", "--set", "method=cora-init", "--set", f"options={{sources: ['{file}'], side: left}}",
        "--set", f"output={tmp_path / 'start'}",
    )  # fmt: skip
    assert start.code == 0, start.err
    for bad in (["show", "r.yaml"], ["extract", "out", "--out", tmp_path], ["extract", "nope", "--out", "x"]):
        failed = run("subspace", *bad)
        assert failed.code == 2
        assert_one_sentence(failed)


# ------------------------------------------------------------------------------------------------------------- mistakes


BAD_RUNS: dict[str, tuple[str, str]] = {  # an override of the recipe: what is said about it
    "missing file": ("data.train=none.jsonl", r"no such file: none\.jsonl"),
    "empty file": ("data.train=empty.jsonl", r"empty\.jsonl is empty: give a file with at least one row"),
    "broken line": ("data.train=broken.jsonl", r"broken\.jsonl, line 2 is not JSON .*: write one object per line"),
    "no column": ("data.train=column.jsonl", r"column\.jsonl, row 1 has the columns foo: rename them to one of: mess"),
    "no site": ("targets=[nothing]", r"no module matches targets \('nothing',\); linear modules here: \['down_proj'"),
    "no site by regex": ("targets=noth.*", r"no module matches targets 'noth\.\*'; linear modules here"),
    "rank for the init": (
        "ranks={q_proj: 20}",
        r"rank 20 is too large for lora-ga at model\.layers\.0\.self_attn\.q_proj \(32 × 32\), where it can start 16",
    ),
    "adapter as model": ("model=out", "out holds an adapter, not a base model: give the base model in `model`"),
    "no model folder": ("model=.", r"\. is no model folder: it has no config\.json"),
    "unknown hub id": (
        "model=no/such",
        "cannot load the model 'no/such': it is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids asking the "
        "hub; check the name, or give the folder",
    ),
    "pickled weights": ("model=pickled", "'pickled': it has no safetensors weights, and nothing is unpickled; save it"),
    "damaged weights": ("model=torn", r"'torn': its weights are damaged \(.*\); download or copy them again"),
    "foreign code": ("model=coded", "'coded': it needs code that its repository ships; set `trust_remote_code: true`"),
    "no language model": ("model=seeing", "'seeing': it is no causal language model, which task sft needs"),
    "tokenizer of more tokens": ("model=small", r"has '.*' as token \d+, the model embeds 8: take the tokenizer of"),
    "classifier": ("model=sorting", "'sorting': .* no causal language model, which task sft needs"),
    "no gguf file": ("model=none.gguf", r"no such file: none\.gguf"),
    "foreign setting": (
        "train.extra={max_step: 1}",
        r"`train\.extra\.max_step` is no field .*; did you mean 'max_steps'",
    ),
    "setting of ours": (
        "train.extra={learning_rate: 1}",
        r"`train\.extra\.learning_rate` is decided by the recipe's own",
    ),
    "extra of another type": (
        "train.extra={label_smoothing_factor: much}",
        r"`train\.extra\.label_smoothing_factor` is not what SFTConfig takes: input should be a valid number",
    ),
    "extra list": (
        "train.extra={dataloader_drop_last: [1]}",
        r"`train\.extra\.dataloader_drop_last` is not what SFTCon",
    ),
    "extra that publishes": (
        "train.extra={push_to_hub: true}",
        r"`train\.extra\.push_to_hub` is refused: upload the res",
    ),
    "extra token": ("train.extra={hub_token: hf_SECRET}", r"`train\.extra\.hub_token` is refused: upload"),
    "extra that splits": ("train.extra={deepspeed: d.json}", r"`train\.extra\.deepspeed` is refused: use torchrun"),
    "extra that rounds": (
        "train.extra={bf16_full_eval: true}",
        r"`train\.extra\.bf16_full_eval` is refused: an evaluation would round the trained adapter",
    ),
    "extra that mixes rows": (
        "train.extra={packing_strategy: wrapped}",
        r"`train\.extra\.packing_strategy` would not count",
    ),
    "extra without a resume": (
        "train.extra={save_only_model: true}",
        r"`train\.extra\.save_only_model` is refused: --resume needs the optimizer's state",
    ),
    "schedule of other settings": (
        "train.extra={lr_scheduler_kwargs: {num_cycles: 0.5, cycles: 2}}",
        r"`train\.extra\.lr_scheduler_kwargs` has 'cycles', which does not go with `train\.schedule` cosine \(",
    ),
    "schedule that ends above its rate": (
        "train={steps: 6, batch_size: 4, schedule: polynomial, extra: {lr_scheduler_kwargs: {power: 2, lr_end: 1}}}",
        r"`train\.extra\.lr_scheduler_kwargs` has 'lr_end', which does not go with `train\.schedule` poly",
    ),
    "schedule of an epoch of other settings": (
        "train={epochs: 0.01, batch_size: 4, schedule: constant, extra: {lr_scheduler_kwargs: {cycles: 2}}}",
        r"`train\.extra\.lr_scheduler_kwargs` has 'cycles', which does not go with `train\.schedule` constant",
    ),
    "extra that SFTConfig refuses": (
        "train.extra={neftune_noise_alpha: 5, logging_strategy: often, logging_first_step: true}",
        r"`train\.extra\.logging_strategy` ",
    ),
    "extra that TRL refuses": (
        "train.extra={neftune_noise_alpha: 5, pad_token: <none>, logging_first_step: true}",
        r"does not take `train\.extra\.pad_token` here \(The specified `pad_token` \('<none>'\) is not found",
    ),
    "extra that torch refuses": (
        "train.extra={logging_first_step: true, dataloader_persistent_workers: true, run_name: a}",
        r"does not take `train\.extra\.dataloader_persistent_workers` here \(persistent_workers option needs",
    ),
    "what TRL refuses": (
        "targets=[lm_head]",
        "does not take this run: Applying a PEFT adapter to `lm_head` is not supp",
    ),
    "output is this folder": ("output=.", r"\. is not empty: choose another output folder"),
    "half a mix": ("method=lora-ga +", "a method's name is missing: write one, or a mix such as"),
    "twice in a mix": ("method=lora-ga + lora-ga", r"lora-ga \+ lora-ga names lora-ga twice: name it once"),
    "schedule below its end": (
        "train={steps: 6, batch_size: 4, schedule: polynomial, learning_rate: 1e-7}",
        r"`train\.schedule` polynomial does not go with 6 steps, 1 of them warm-up, at rate 1e-07 \(.*\): take another",
    ),
    "schedule of one step": (
        "train={steps: 1, batch_size: 4, schedule: polynomial}",
        r"`train\.schedule` polynomial does not go with 1 steps, 1 of them warm-up",
    ),
    "schedule of one epoch": (
        "train={epochs: 0.01, batch_size: 4, schedule: polynomial}",
        r"`train\.schedule` polynomial does not go with 1 steps",
    ),
    "broken expression": ("targets='(['", r"`targets` '\(\[' is no regular expression \(unterminated"),
    "kind of file": ("data.train=text", "text is a kind of file, not a file: name the file, such as rows.text"),
    "name too long": (f"model={'m' * 300}", "`model` is too long for a file's name: at most 255 bytes"),
    "output too long": (f"output={'o' * 250}", "`output` is too long for a file's name: at most 200 bytes"),
    "unknown tracker": ("train.report_to=[nothing]", r"`train\.report_to` names 'nothing', which is not installed"),
    "output is a file": ("output=r.yaml", "r.yaml is a file: name a folder in `output`"),
    "output below a file": ("output=r.yaml/out", "cannot write r.yaml/out: .*r.yaml is no folder; name another folder"),
    "unknown key": ("train.step=3", r"r\.yaml: `train\.step` is no key of a recipe; did you mean `train\.steps`\?"),
}


def odd_models(root: Path) -> None:
    """Copies of the base model that cannot be used."""
    for name in ("pickled", "torn", "coded", "seeing", "small", "sorting"):
        shutil.copytree(root / "base", root / name, dirs_exist_ok=True)
    config = json.loads((root / "base" / "config.json").read_text(encoding="utf-8"))
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (root / "coded" / "config.json").write_text(json.dumps(own), encoding="utf-8")
    (root / "coded" / "own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    (root / "seeing" / "config.json").write_text(json.dumps({**config, "model_type": "vit"}), encoding="utf-8")
    heads = {"architectures": ["LlamaForSequenceClassification"]}
    (root / "sorting" / "config.json").write_text(json.dumps({**config, **heads}), encoding="utf-8")
    weights = "model.safetensors"
    toy.llama(vocab_size=8).save_pretrained(root / "small")
    (root / "pickled" / weights).unlink()
    torch.save(load_file(root / "base" / weights), root / "pickled" / "pytorch_model.bin")
    (root / "torn" / weights).write_bytes((root / "base" / weights).read_bytes()[:3000])


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("what", BAD_RUNS)
def test_bad_input_exits_2_and_harms_nothing(what: str, world: Path) -> None:
    override, expected = BAD_RUNS[what]
    (world / "empty.jsonl").write_text("", encoding="utf-8")
    (world / "broken.jsonl").write_text('{"text": "w5"}\n{"text": \n', encoding="utf-8")
    (world / "column.jsonl").write_text('{"foo": "w5"}\n', encoding="utf-8")
    odd_models(world)
    before = bytes_of(world)
    done = run("train", "r.yaml", "--set", "output=bad", "--set", override)
    assert done.code == 2
    assert re.search(expected, assert_one_sentence(done))
    assert bytes_of(world) == before


@pytest.mark.usefixtures("trained")
def test_a_pad_token_that_the_model_does_not_embed_counts_where_rows_are_padded(tmp_path: Path) -> None:
    shutil.copytree("base", tmp_path / "base")
    padded = tiny_trl.tokenizer()
    padded.chat_template = TEMPLATE
    padded.add_special_tokens({"pad_token": "<more>"})
    padded.save_pretrained(tmp_path / "base")
    settings = [f"model={tmp_path / 'base'}", f"output={tmp_path / 'out'}", "method=lora", "options={}"]
    words = ["train", "r.yaml", *(word for setting in settings for word in ("--set", setting))]
    said = assert_one_sentence(run(*words))
    assert f"the tokenizer has '<more>' as token {toy.VOCAB}, the model embeds {toy.VOCAB}: take the tokenizer" in said
    packed = run(*words, "--set", "data.packing=true", "--set", "train.steps=2")
    assert packed.code == 0, packed.err


BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "no recipe": (["train", "none.yaml"], r"no such recipe file: none\.yaml; examples/ holds some to copy"),
    "parts that do not go together": (  # said before model and rows are looked for
        [
            *("train", "r.yaml", "--set", "method=adalora + lora-rite", "--set", "options={}"),
            *("--set", "model=none.gguf", "--set", "data.train=none.jsonl"),
        ],
        r"r\.yaml: adalora \+ lora-rite: a trained gate stands between A and B, .*; use the transform adamw",
    ),
    "no argument": (["train"], r"Missing argument 'RECIPE' \(see loralign train --help\)"),
    "unknown option": (["train", "r.yaml", "--foo"], r"No such option.*--foo.*\(see loralign train --help\)"),
    "a setting as an option": (["train", "r.yaml", "--learning_rate", "1e-4"], r"is given as --set key=value \(see"),
    "a setting as a word": (["plan", "r.yaml", "rank=4"], r"is given as --set key=value \(see loralign plan --help\)"),
    "unknown command": (["tran"], r"No such command 'tran'.*train"),
    "unknown choice": (
        ["export", "out", "--out", "x", "--profile", "foo"],
        "'foo' is not one of 'peft', 'portable', 'g",
    ),
    "no number": (
        ["eval", "out", "--data", "rows.jsonl", "--limit", "x"],
        "'--limit': Input should be a valid integer",
    ),
    "nothing to resume": (
        ["train", "r.yaml", "--resume", "--set", "output=fresh"],
        "nothing to resume: there is no folder fresh; run without",
    ),
    "use a model": (
        ["generate", "base", "--prompt", "x"],
        r"base is no adapter folder: it has no adapter_config\.json",
    ),
    "nothing asked": (
        ["generate", "out", "--base", "base", "--prompt", "w5", "--prompt", ""],
        "prompt 2 has no tokens",
    ),
    "expand a folder": (["expand", "out", "--out", "x"], r"out is a folder: name the compact/compact\.safetensors of"),
    "no name": (["suggest", ""], "the base model has no name: give its folder or hub id"),
    "export a model": (["export", "base", "--out", "x"], "base is no adapter folder"),
    "export over itself": (["export", "out", "--out", "./out", "--overwrite"], "out is the adapter that is exported"),
    "export over a run": (["export", "out", "--out", "run"], "run holds a trained run: name another folder, or pass"),
    "export over the base": (
        ["export", "out", "--out", "base"],
        "base holds the base model itself: name another folder",
    ),
    "init of full": (["init", "full.yaml"], "full has no adapter to initialise: choose another method, or train it"),
    "report options alone": (["init", "r.yaml", "--beside", "lora"], "--beside and --source belong to the report"),
    "unknown start": (
        ["init", "r.yaml", "--report", "--beside", "lor", "--set", "output=y"],
        "unknown method 'lor'; did",
    ),
    "no folder for the schema": (["schema", "--out", "no/such.json"], "no such folder: no; make it first"),
    "plan without sites": (["plan", "r.yaml", "--set", "targets=[nothing]"], "no module matches targets"),
    "plan of a rank too large": (
        ["plan", "r.yaml", "--set", "rank=20"],
        "rank 20 is too large for lora-ga at .*k_proj",
    ),
    "init at a rank too large": (
        ["init", "r.yaml", "--set", "rank=20", "--set", "output=y"],
        r"rank 20 is too large for lora-ga at .*k_proj \(16 × 32\), where it can start 8 slots at most: lower `rank`",
    ),
    "a preheat of too low a rank": (
        ["train", "r.yaml", "--set", "method=hrp", "--set", "options={rank: 3, steps: 2}", "--set", "output=y"],
        r"the preheat's rank 3 is below the adapter's 4 at .*k_proj \(16 × 32\): raise `options\.rank`",
    ),
}


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_bad_commands_exit_2_and_harm_nothing(what: str, world: Path) -> None:
    argv, expected = BAD_COMMANDS[what]
    (world / "full.yaml").write_text(
        "model: base\ndata: {train: rows.jsonl}\nmethod: full\noutput: f\n", encoding="utf-8"
    )
    shutil.copytree("out", "run", dirs_exist_ok=True)
    before = bytes_of(world)
    done = run(*argv)
    assert done.code == 2, done.err
    assert re.search(expected, assert_one_sentence(done))
    assert bytes_of(world) == before


def test_a_run_that_diverges_exits_1() -> None:
    done = run("train", "r.yaml", "--set", "output=diverged", "--set", "train.learning_rate=1e30")
    assert done.code == 1
    assert re.search(r"nan|inf|finite|diverged", assert_one_sentence(done))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_device_exits_1() -> None:
    done = run("schema", "--out", "/dev/full")
    assert done.code == 1
    assert "No space left on device" in assert_one_sentence(done)
    assert Path("/dev/full").is_char_device()


def test_processes_exit_with_the_code_and_show_tracebacks_on_demand() -> None:
    plain = run_process("train", "r.yaml", "--set", "rank=x")
    assert plain.code == 2
    assert plain.err == "loralign: r.yaml: `rank` must be a whole number, not 'x'\n"
    debug = run("train", "r.yaml", "--set", "rank=x", "--debug")
    assert debug.code == 2
    assert "Traceback" in debug.err


def test_what_other_libraries_warn_of_is_for_debug_alone() -> None:
    """Of torch, which has a handler of its own and is loaded by most commands, and of one without."""
    code = """
import logging, os
from loralign.cli.guard import _quiet
def warn():
    for name in ("torch.utils._pytree", "another.library"):
        logging.getLogger(name).warning("a warning of %s", name)
with _quiet(False):
    import torch
    warn()
    logging.getLogger("another.library").error("an error")
with _quiet(True):
    warn()
assert "TORCH_LOGS" not in os.environ and logging.lastResort.level == logging.WARNING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines() == ["an error", "a warning of another.library"]


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    shell = f"{sys.executable} -m loralign schema | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "{0\n"
    assert done.stderr == ""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (WorkFailed("it  diverged\nhere"), 1, "it diverged here"),
        (VerificationFailed("logits differ"), 3, "logits differ"),
        (OutOfMemoryError("CUDA out of memory"), 1, "out of memory: lower `rank` or `train.micro_batch_size`"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "out of memory: lower",
        ),
        (OSError(36, "File name too long", "x" * 999), 2, "x" * 40 + "…" + "x" * 12 + ": file name too long; name"),
        (MemoryError(), 1, "out of memory"),
        (UnicodeEncodeError("ascii", "ü", 0, 1, "not in range"), 2, r"this locale (ascii) has no '\xfc', which a path"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: permission denied; name another path"),
        (OSError(5, "Input/output error", "/x"), 1, "/x: Input/output error"),
        (ZeroDivisionError(), 1, "unexpected ZeroDivisionError: no message; --debug shows where, please report it"),
    ],
)
def test_every_exception_has_a_code_and_a_sentence(error: Exception, code: int, said: str) -> None:
    assert explained(error)[0] == code
    assert explained(error)[1].startswith(said)


def test_interrupting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loralign.config.recipe.read", pressed)
    assert run("plan", "r.yaml") == Done(130, "", "loralign: stopped\n")


def test_lines_come_at_the_end_and_not_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for i in range(100):
        lines("rows", i + 1, 100)
    assert capsys.readouterr().err == "rows: 100/100\n"


def test_a_gguf_file_is_trained_as_the_plain_model_it_is(tmp_path: Path) -> None:
    """Transformers de-quantises the file and still calls the model quantised."""
    toy_gguf = pytest.importorskip("toy_gguf")
    model = toy_gguf.write(tmp_path / "tiny.gguf")
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = [
        f"model={model}", f"data={{train: {tmp_path / 'sums.jsonl'}, max_length: 16}}", "method=pissa", "options={}",
        f"output={tmp_path / 'out'}", "train.steps=2", "train.save_every=null",
    ]  # fmt: skip
    done = run("train", "r.yaml", *(word for o in overrides for word in ("--set", o)))
    assert done.code == 0, done.err
    assert "was de-quantised while loading; its layers are plain" in done.err
    assert done.out.splitlines()[-1] == f"Verified: {tmp_path / 'out'}"
    merged = run("export", tmp_path / "out", "--base", model, "--profile", "merged", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert run("verify", tmp_path / "merged").code == 0


# ----------------------------------------------------------------------------------------------- examples, real weights


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("sft-*.yaml")), ids=lambda p: p.stem)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example, with the tiny model, the rows above and a few steps; the proof of an export has its own tests."""
    monkeypatch.setattr("loralign.train.sft.verify", lambda folder, base: ExportedOnly(True))
    few = {"sft-long": ["train.steps=2", "train.eval_every=1", "data.eval=0.25", "rank=4", "ranks={down_proj: 2}"]}
    overrides = [
        "model=base", "data.train=rows.jsonl", "data.max_length=32", f"output={tmp_path / 'out'}", "train.batch_size=8",
        *few.get(path.stem, ["train.epochs=0.5", "data.eval=0.25", "rank=4"]),
        *([f"cache={tmp_path / 'cache'}", "options.micro_batches=2"] if path.stem == "sft-lora-ga" else []),
    ]  # fmt: skip
    done = run("train", path, *(word for o in overrides for word in ("--set", o)))
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@dataclass(frozen=True)
class ExportedOnly:
    """Stands for a verification that another test makes."""

    passed: bool
    proven: bool = True


@pytest.mark.assets
@needs("smollm2-2layer")
def test_the_whole_way_on_real_weights(tmp_path: Path) -> None:
    base, out = asset("smollm2-2layer"), tmp_path / "real"
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 1 ="}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        f"model: {base}\ndata: {{train: {tmp_path}/rows.jsonl, max_length: 64}}\nmethod: lora-ga\nrank: 4\n"
        f"options: {{micro_batches: 2}}\ntrain: {{steps: 2, batch_size: 4}}\noutput: {out}\n",
        encoding="utf-8",
    )
    done = run("train", tmp_path / "r.yaml")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Verified: {out}"
    found = run("eval", out, "--data", tmp_path / "rows.jsonl", "--base", base, "--limit", 2, "--max-new-tokens", 2)
    assert found.code == 0, found.err
    assert "rows: 2" in found.out
