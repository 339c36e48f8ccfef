"""Study files: what they mean, and every mistake in one sentence with exit code 2."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loralign import LoralignError
from loralign.cli.app import main
from loralign.compare.begun import as_begun
from loralign.compare.identity import arm_settings, settings
from loralign.compare.report import collect, notes
from loralign.compare.spec import grid
from loralign.compare.store import Claim, Store
from loralign.config.study import load_study, to_specs
from loralign.config.study_file import StudyFile, parse_study, schema_text
from loralign.config.yaml_text import read_yaml
from loralign.methods.build import _say_renamed
from loralign.types import Full, Recipe
from tiny_study import load, write_study

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


def test_references_are_added_and_every_arm_gets_as_many_rates(study: Path) -> None:
    spec = load(study)
    assert [a.name for a in spec.arms] == ["full", "lora", "lora-ga"]
    assert isinstance(spec.arms[0].recipe, Full)
    for arm in spec.arms:
        rates = [t.lr for t in grid(arm, spec.rates, spec.ratio)]
        assert rates[0] == arm.lr and len(set(rates)) == 3
        assert max(rates) / min(rates) == pytest.approx(4, rel=0.01)
    alone = load(study, "references=false", "arms=[pissa]")
    assert [a.name for a in alone.arms] == ["pissa"] and not alone.references


def test_a_prior_is_scaled_by_the_methods_scale_and_the_width(study: Path) -> None:
    """lr·s = 1e-3 at hidden size 2000; here s = 32/4 = 8 (rslora: 16) and the width 32."""
    lrs = {a.name: a.lr for a in load(study, "arms=[rslora]").arms}
    assert lrs["lora"] == pytest.approx(1e-3 / 8 * (2000 / 32) ** 0.781, rel=0.05)
    assert lrs["rslora"] == pytest.approx(lrs["lora"] / 2, rel=0.05)


def test_arms_differ_where_the_file_says_so(study: Path) -> None:
    arms = "[{method: lora-ga, name: hot, options: {gamma: 64.0}, rank: 2, lr: 1e-2}, {method: lora-ga + lora-rite}]"
    hot, mixed = load(study, f"arms={arms}", "max_grad_norm=0.5").arms[2:]
    assert isinstance(hot.recipe, Recipe) and isinstance(mixed.recipe, Recipe)
    assert (hot.name, hot.recipe.r, hot.lr, hot.recipe.max_grad_norm) == ("hot", 2, 1e-2, 0.5)
    assert arm_settings(hot)["init.scale.gamma"] == 64.0
    assert mixed.name == "lora-ga + lora-rite" and mixed.recipe.r == 4


def test_an_old_name_is_told_once_however_often_its_arm_is_built(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    _say_renamed.cache_clear()
    for _ in range(2):
        load(study, "arms=[muon-factors]")
    assert [r.getMessage()[:50] for r in caplog.records] == ["muon-factors goes with the next release: use spect"]


def test_contents_are_read_and_paths_do_not_count(study: Path, tmp_path: Path) -> None:
    elsewhere = write_study(tmp_path)
    assert load(study).content == load(elsewhere).content
    with (tmp_path / "test.jsonl").open("a") as f:
        f.write((tmp_path / "train.jsonl").read_text().splitlines(True)[0])
    changed = load(elsewhere)
    assert changed.shared_rows == 1
    assert {k for k, v in load(study).content.items() if changed.content[k] != v} == {"task.test"}


MISTAKES: dict[str, tuple[str, str]] = {
    "key": ("train.stps=3", "`train.stps` is no key of a study; did you mean `train.steps`?"),
    "method": ("arms=[lorra]", "arm lorra: unknown method 'lorra'; did you mean lora"),
    "ambiguous": ("arms=[dora]", "'dora' means two things in the field"),
    "option": ("arms=[{method: lora-ga, options: {gama: 1.0}}]", "lora-ga has no option 'gama'; did you mean 'gamma'?"),
    "arm key": (
        "arms=[{method: pissa, rnak: 3}]",
        "arm 1: `rnak` is no key of an arm; did you mean `rank`?",
    ),
    "arm type": ("arms=[{method: pissa, lr: fast}]", "arm 1: `lr` must be a number"),
    "steps": ("train.eval_every=3", "`train.steps` 4 is no multiple of `train.eval_every` 3"),
    "batch": ("train.micro_batch_size=3", "`train.batch_size` is no multiple of `train.micro_batch_size`"),
    "file": ("task.test=none.jsonl", "no such file: none.jsonl"),
    "model": ("model=./nowhere", "no such folder: ./nowhere"),
    "twice": ("arms=[pissa, pissa]", "two arms are called 'pissa': give one of them another `name`"),
    "false friend": ("arms=[{method: pissa, name: lora}]", "`lora` is what the others are compared with"),
    "seeds": ("seeds=1", "`seeds` must be greater than or equal to 2"),
    "ratio": ("rates.ratio=1", "`rates.ratio` must be greater than 1"),
    "compile": ("train.compile=true", "`train.compile` needs rows of one length"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    study: Path, mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = MISTAKES[mistake]
    extra = ["--set", "task.kind=sft"] if mistake == "compile" else []
    monkeypatch.setattr(sys, "argv", ["loralign", "compare", str(study), "--set", change, *extra])
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("loralign: ")


def test_rows_that_a_choice_has_seen_are_refused(study: Path) -> None:
    for name in ("train", "valid"):
        with pytest.raises(LoralignError, match="reported on rows that a choice has seen"):
            load(study, f"task.test={study.parent / name}.jsonl")
    with pytest.raises(LoralignError, match=r"every row of `task.valid` stands in `task.train`"):
        load(study, f"task.valid={study.parent}/train.jsonl")


def test_a_copy_under_another_name_and_in_another_order_is_refused(study: Path, tmp_path: Path) -> None:
    rows = (study.parent / "train.jsonl").read_text().splitlines(True)
    for kept in (rows, rows[::-1], rows[3:9]):
        (tmp_path / "copy.jsonl").write_text("".join(kept))
        with pytest.raises(LoralignError, match=r"every row of `task.valid` stands in `task.train`"):
            load(study, f"task.valid={tmp_path}/copy.jsonl")
        with pytest.raises(LoralignError, match="reported on rows that a choice has seen"):
            load(study, f"task.test={tmp_path}/copy.jsonl")
    new = (study.parent / "valid.jsonl").read_text().splitlines(True)[0]
    (tmp_path / "copy.jsonl").write_text("".join([*rows[:3], new]))
    assert load(study, f"task.valid={tmp_path}/copy.jsonl").shared_rows == 0


def test_the_baseline_gets_more_seeds_and_families_are_declared(study: Path) -> None:
    arms = "[lora-ga, {method: pissa, family: starts}]"
    spec = load(study, f"arms={arms}", "baseline_seeds=null")
    assert (spec.seeds, spec.baseline_seeds) == (2, 12)
    assert load(study, "baseline_seeds=null", "seeds=20").baseline_seeds == 20
    assert [a.family for a in spec.arms] == ["primary", "primary", "primary", "starts"]
    for wrong in ("{method: pissa, family: control}", "{method: lora, family: starts}"):
        with pytest.raises(LoralignError, match="`full` alone is the control"):
            load(study, f"arms=[{wrong}]")


def test_a_prior_tuned_on_these_rows_is_told(study: Path, tmp_path: Path) -> None:
    spec = load(study, "arms=[hrp, {method: lora-plus, lr: 1e-3}]")
    by_name = {a.name: a for a in spec.arms}
    assert by_name["hrp"].tuned_on[0][0] == "reviews in German (MultiEmo)" and not by_name["lora-plus"].tuned_on
    assert not any("tuned on this very task" in note for note in notes(spec, {}, collect(spec, {}), {}))
    same = replace(spec, content={**spec.content, "task.train": by_name["hrp"].tuned_on[0][1]})
    said = notes(same, {}, collect(same, {}), {})
    assert "the rates of hrp are centred where they were tuned on this very task: reviews in German (MultiEmo)" in said
    here = replace(spec, output=tmp_path)
    Store(here)
    assert (
        as_begun(replace(here, arms=tuple(replace(a, tuned_on=()) for a in here.arms)), reading=True).arms == here.arms
    )


def test_a_journal_from_before_starts_were_charged_keeps_its_rules(study: Path, tmp_path: Path) -> None:
    """One seed a rate, no giving up, every step trained and read where the start is paid for; grids as far as they were
    extended."""
    here = replace(load(study), output=tmp_path, baseline_seeds=9)
    store = Store(here)
    added = ("train.charge", "rates.finalists", "rates.seeds", "rates.give_up")
    old = {k: v for k, v in settings(here).items() if k not in added}
    store._journal.set_study_user_attr(store._study, "settings", {**old, "rates.prune": True})
    for index in range(-3, 4):
        for name in ("lora", "a/b")[: 1 + (index > 0)]:
            claim = Claim(store._journal, store._study, f"rate/{name}/{index:+d}/1000")
            claim.drop()
    found = as_begun(here)
    assert (found.charge, found.choice_seeds, found.finalists, found.prune) == ("read", 1, 1, False)
    assert found.extensions == 7 - here.rates > 0 and found.baseline_seeds == here.seeds


def tasks(study: Path, *names: str) -> str:
    keys = {"kind": "text", "length": 16, **{s: f"{study.parent}/{s}.jsonl" for s in ("train", "valid", "test")}}
    return (
        "[" + ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in {"name": n, **keys}.items()) + "}" for n in names) + "]"
    )


def test_several_tasks(study: Path) -> None:
    first, second = load_study(study, ("task=null", f"tasks={tasks(study, 'reviews', 'poems')}"))
    assert (first.task_name, second.task_name) == ("reviews", "poems")
    assert first.output == study.parent / "out" / "reviews"
    assert [(a.name, a.lr) for a in first.arms] == [(a.name, a.lr) for a in second.arms]
    for change, said in (
        (f"tasks={tasks(study, 'a')}", "either one `task` or a list of `tasks`"),
        ("task=null", "either one `task` or a list of `tasks`"),
    ):
        with pytest.raises(LoralignError, match=said):
            load(study, change)
    with pytest.raises(LoralignError, match="two tasks are called 'a'"):
        load(study, "task=null", f"tasks={tasks(study, 'a', 'a')}")


@pytest.mark.parametrize("text", ["", "- a\n- b", "model: x\nmodel: y", "model: [1"])
def test_no_study(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(LoralignError):
        load(tmp_path / "study.yaml")


def test_the_published_schema_is_the_present_one_and_the_examples_name_it() -> None:
    assert (ROOT / "docs" / "schema-study.json").read_text(encoding="utf-8") == schema_text()
    for path in (ROOT / "examples").glob("compare*.yaml"):
        first, *_ = path.read_text(encoding="utf-8").splitlines()
        assert first == "# yaml-language-server: $schema=../docs/schema-study.json"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("compare*.yaml")), ids=lambda p: p.stem)
def test_examples_parse(path: Path) -> None:
    (spec,) = to_specs(parse_study(read_yaml(path), path.name), 576)
    assert [a.name for a in spec.arms][:2] == ["full", "lora"] and len(spec.arms) > 2


def test_every_key_is_described() -> None:
    def fields(model: Any) -> list[Any]:
        found = list(model.model_fields.values())
        inner = [f.annotation for f in found if hasattr(f.annotation, "model_fields")]
        return found + [f for m in inner for f in fields(m)]

    assert all(f.description for f in fields(StudyFile))


def test_the_demo_is_such_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_demo

    rows = dict.fromkeys(("train", "valid", "test"), "x.jsonl")
    monkeypatch.setattr(compare_demo, "write_rows", lambda folder, part: rows)
    (spec,) = to_specs(parse_study(compare_demo.study(Path("out"))), 384)
    assert [a.name for a in spec.arms] == ["full", "lora", "lora-ga"]
    assert (spec.rates, spec.seeds, spec.task.head_lr) == (4, 3, 1e-3)
