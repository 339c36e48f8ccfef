"""`method: recommended`: the frozen rule, and the name in a recipe file from plan to a resumed run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import warm
from cli_world import Done, run
from loralign import build
from loralign.cli.plan import planned
from loralign.config.recipe import load
from loralign.io import probes
from loralign.io.host import free_host_memory, host_memory, limits
from loralign.plan import recommended as rule
from loralign.plan.fitting import ROOM
from loralign.plan.suggest import findings, judged, rate
from loralign.types import LoralignError
from tiny_trl import tokenizer, words
from toy import llama

GIB = 2**30
FILE = """\
model: base
data: {train: rows.jsonl, max_length: 16}
method: recommended
train: {batch_size: 4, save_every: 3, precision: fp32}
output: out
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recommended")
    llama(hidden_size=128, intermediate_size=160).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = "".join(json.dumps({"text": words(12, k)}) + "\n" for k in range(24))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    (folder / "r.yaml").write_text(FILE, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(world)
    warm.verification(monkeypatch)
    yield


def command(name: str, *words: object) -> Done:
    given = [part for w in words for part in (("--set", w) if "=" in str(w) else (w,))]
    return run(name, "r.yaml", *given)


def peak(rank: int, *more: str) -> int:
    return planned(load("r.yaml", ["method=spectral", f"rank={rank}", *more]), "cpu").estimate.peak_bytes


def between(*more: str) -> float:
    """GiB that hold rank 32 and not rank 64."""
    low, high = (peak(r, *more) / ROOM / GIB for r in (32, 64))
    assert low < high
    return (low + high) / 2


def test_the_rule() -> None:
    assert rule.ranks(4096) == rule.ranks(128) == (64, 32) and rule.ranks(127) == (32,)
    with pytest.raises(LoralignError, match="begins at a model width of 64, this one has 63"):
        rule.ranks(63)
    peaks = {64: 9 * GIB, 32: 8 * GIB}
    assert rule.first_that_fits((64, 32), peaks.__getitem__, 10 * GIB) == (64, 9 * GIB)
    assert rule.first_that_fits((64, 32), peaks.__getitem__, 10 * GIB - 1) == (32, 8 * GIB)
    with pytest.raises(LoralignError, match=r"takes 8\.0 GiB at rank 32 of 8\.0: set `train\.gradient_checkpointing`"):
        rule.first_that_fits((64, 32), peaks.__getitem__, 8 * GIB)
    rule.check_passes(1.0)
    with pytest.raises(LoralignError, match=rf"gone through 1\.5 times, for which no rule stood \({rule.FELL}\): name"):
        rule.check_passes(1.5)


def test_it_is_the_recipe_that_was_judged() -> None:
    """The arm of the judge's study file, with its record's README beside it."""
    root = Path(__file__).resolve().parent.parent
    study = yaml.safe_load((root / "scripts/studies/judge.yaml").read_text(encoding="utf-8"))
    (arm,) = (a for a in study["arms"] if a["method"] == rule.METHOD)
    assert arm["rank"] == rule.RANKS[0] and "alpha" not in arm and "options" not in arm
    assert build(rule.METHOD, r=64).s() == 8.0  # type: ignore[union-attr]
    assert (root / rule.RECORD / "README.md").is_file()


def test_plan_says_what_it_chose_and_why() -> None:
    done = command("plan", "--device", "cpu")
    first = done.out.splitlines()[0]
    assert done.code == 0 and first.startswith("recommended: spectral, rank 64, s = √r, ") and rule.RECORD in first
    assert f"GiB of {host_memory() / GIB:.1f}" in first
    small = json.loads(command("plan", "--device", "cpu", "--json", f"options.memory={between()}").out)
    assert small["method"] == "spectral" and small["export_rank"] == 32 and small["peak_bytes"] == peak(32)
    assert "rank 64 does not fit there, and 32 was not part of the judgement" in small["chosen_by"]
    given = json.loads(command("plan", "--json", "train.learning_rate=1e-4").out)
    assert (
        given["learning_rate"] == 1e-4 and "prior of spectral" in json.loads(command("plan", "--json").out)["lr_source"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.epochs=3",), "these are gone through 3 times, for which no rule stood"),
        (("rank=8",), "`rank` is chosen by `method: recommended`: leave it out"),
        (("preset=stateless",), "`preset` is chosen by"),
        (("options.momentum=0.9",), "has one option, `memory` in GiB"),
        (("options.memory=much",), "a number above 0"),
        (("options.memory=1e-5",), "GiB at rank 32 of 0.0: set `train.gradient_checkpointing`"),
        (("method=recommended + lora-ga",), "'recommended' is resolved for one run"),
        (("train.stesp=3",), "steps"),
        (("method=recomended",), "did you mean recommended"),
        (("train.steps=7",), "gone through 1.17 times"),
    ],
)
def test_what_it_refuses(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = command("train", *words, f"output={tmp_path / 'o'}")
    assert done.code == 2 and said in done.err and len(done.err.strip().splitlines()[-1]) < 300
    assert not (tmp_path / "o").exists() or not any(p.is_file() for p in (tmp_path / "o").rglob("adapter*"))


def test_a_container_has_the_memory_that_it_is_given(tmp_path: Path) -> None:
    for text, found in (("1073741824\n", [GIB]), ("max\n", []), ("", [])):
        (tmp_path / "memory.max").write_text(text, encoding="ascii")
        assert [limit for limit, _ in limits(tmp_path, tmp_path / "none")] == found
    assert limits(tmp_path / "none") == []


def test_what_is_free_in_a_container_is_what_it_has_left(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    machine = free_host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n", encoding="ascii")
    assert free_host_memory(tmp_path) == 5_000_000 < machine
    (tmp_path / "memory.current").write_text("4000000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 1500000\ninactive_file 2500000\n", encoding="ascii")
    assert free_host_memory(tmp_path) == 5_000_000 - 1_500_000


GROUPS_OF_A_PROCESS = {  # what /proc/self/cgroup says, limits by folder, what is left
    "a container of version 2": ("0::/\n", {"memory.max": "5000000"}, 5_000_000),
    "a service of version 2": ("0::/a.slice/b.service\n", {"a.slice/b.service/memory.max": "5000000"}, 5_000_000),
    "the tightest of its parents": (
        "0::/a/b\n", {"a/memory.max": "3000000", "a/b/memory.max": "5000000", "memory.max": "max"}, 3_000_000,
    ),
    "a sibling's does not count": ("0::/a\n", {"b/memory.max": "3000000", "a/memory.max": "5000000"}, 5_000_000),
    "a container of version 1": ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "5000000"}, 5_000_000),
    "a job of version 1": (
        "9:name=systemd:/\n4:cpu,memory:/job/7\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712", "memory/job/7/memory.limit_in_bytes": "5000000",
            "memory/job/7/memory.usage_in_bytes": "4000000", "memory/job/7/memory.stat": "total_inactive_file 2500000",
        },
        3_500_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GROUPS_OF_A_PROCESS)
def test_the_group_of_a_process_and_those_above_it_limit_its_memory(what: str, tmp_path: Path) -> None:
    said, files, left = GROUPS_OF_A_PROCESS[what]
    own = tmp_path / "cgroup"
    own.write_text(said, encoding="ascii")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n", encoding="ascii")
    assert free_host_memory(tmp_path / "groups", own) == left
    assert left <= host_memory(tmp_path / "groups", own) <= 5_000_000


def test_probes_read_what_is_free_on_the_host_where_everybody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "free_host_memory", lambda: 1000.0)
    half = torch.zeros(200, dtype=torch.bfloat16)
    assert probes._fits([half[:199]]) and not probes._fits([half])


def test_elsewhere_the_name_says_where_it_is_resolved() -> None:
    with pytest.raises(LoralignError, match="'recommended' is resolved for one run, by `loralign train`"):
        build("recommended")


def test_a_run_states_the_choice_and_resumes_with_it_on_a_machine_of_another_size(tmp_path: Path) -> None:
    """Begun where only rank 32 fits, resumed where 64 would: the same bits as the run that went through. 24 rows in
    steps of five are gone through once, the last step has four."""
    steps = ("train.batch_size=5", "train.steps=5")
    size = f"options.memory={between(*steps)}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train", size, *steps, f"output={whole}").code == 0
    run_file = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    assert "recommended: spectral, rank 32" in json.dumps(run_file, ensure_ascii=False)
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "method chosen by" in card and "method: spectral" in card and "rank: 32" in card
    shutil.copytree(whole, parts)
    for left in ("adapter_model.safetensors", "run.json", "checkpoints/checkpoint-5/loralign.json"):
        (parts / left).unlink()
    done = command("train", "--resume", *steps, f"output={parts}")
    assert done.code == 0 and "recommended: spectral, rank 32, as the run began" in done.out
    both = [(f / "adapter_model.safetensors").read_bytes() for f in (whole, parts)]
    assert both[0] == both[1]


def test_suggest_begins_with_it_at_the_prior_where_rows_do_not_repeat() -> None:
    wide = judged(findings(), 4096)
    assert [(c.method, c.rank, c.judged) for c in wide] == [("spectral", 64, True), ("spectral", 32, True)]
    assert all(rule.RECORD in c.reason and not c.finding.options for c in wide)
    assert [c.rank for c in judged(findings(), 64)] == [32] and judged(findings(), 63) == []
    lr, said = rate(wide[0], 576, 0.0028, "ours")
    assert lr == 0.0028 and said == "0.0028: ours; the prior is part of the rule"
    done = run("suggest", "base", "--device", "cpu", "--memory", "4", "--length", "16", "--json")
    assert json.loads(done.out)["recipe"]["method"] == "spectral" and json.loads(done.out)["recipe"]["rank"] == 64
    assert json.loads(done.out)["reasons"]["rests on"].startswith(rule.RECORD)
    repeated = json.loads(
        run("suggest", "base", "--device", "cpu", "--length", "16", "--json", "--rows", "rows.jsonl").out
    )
    assert "rule of `recommended`" not in repeated["reasons"]["method"]
