"""Study files: what they mean, and every mistake in one sentence with exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from loralign import LoralignError
from loralign.cli.app import main
from loralign.compare.identity import arm_settings
from loralign.compare.spec import grid
from loralign.config.study import to_spec
from loralign.config.study_file import StudyFile, parse_study
from loralign.config.yaml_text import read_yaml
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
        assert max(rates) / min(rates) == pytest.approx(9, rel=0.01)
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
    with pytest.raises(LoralignError, match="are the same rows"):
        load(study, f"task.valid={study.parent}/train.jsonl")


@pytest.mark.parametrize("text", ["", "- a\n- b", "model: x\nmodel: y", "model: [1"])
def test_no_study(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(LoralignError):
        load(tmp_path / "study.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("compare*.yaml")), ids=lambda p: p.stem)
def test_examples_parse(path: Path) -> None:
    spec = to_spec(parse_study(read_yaml(path), path.name), 576)
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

    monkeypatch.setattr(compare_demo, "write_rows", lambda folder: dict.fromkeys(("train", "valid", "test"), "x.jsonl"))
    spec = to_spec(parse_study(compare_demo.study(Path("out"))), 384)
    assert [a.name for a in spec.arms] == ["full", "lora", "lora-ga"]
    assert (spec.rates, spec.seeds, spec.task.head_lr) == (5, 3, 1e-3)
