"""A study of several tasks, with made-up outcomes: one table for each and one over all, through the command."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from browser import needs_browser, visit
from loralign.cli.app import main
from loralign.compare.spec import Outcome, Trial
from loralign.compare.study import work
from loralign.config.study import load_study
from loralign.evidence.tap import token_count
from tiny_study import write_study


def runner(gain: float, level: float) -> Callable[[Trial, Callable[[int, float], bool]], Outcome]:
    """lora-ga ends `gain` lower than lora, full 1 lower; seeds differ by 0.01. Its start reads a step, uncharged."""

    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        ends = {"lora": 0.0, "full": -1.0, "lora-ga": -gain}
        final = level + ends[trial.arm] + 0.01 * (trial.seed % 3) + 0.1 * trial.index**2
        return Outcome(
            (2, 4), (0.1, 0.2), (final + 1, final), step_tokens=128.0, init_tokens=128 * (trial.arm == "lora-ga")
        )

    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    split = {s: f"{folder}/{s}.jsonl" for s in ("train", "valid", "test")}
    tasks = [{"name": n, "kind": "text", "length": 16, **split} for n in ("reviews", "poems")]
    file = write_study(folder, tasks=tasks, seeds=3, baseline_seeds=6)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    del content["task"]
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    for spec, gain, level in zip(load_study(file), (0.3, 0.2), (3.0, 2.0), strict=True):
        assert work(spec, runner(gain, level))
    return file


def test_tables_of_each_task_and_over_all(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (study.parent / "model" / "config.json").unlink()  # a report needs no model
    monkeypatch.setattr("sys.argv", ["loralign", "compare", str(study), "--report"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "== reviews" in said and "== poems" in said and "Over all tasks: final loss against lora's" in said
    out = study.parent / "out"
    free = "; same steps for every arm"  # in every table
    assert said.count(f"± 95 % over seeds{free}") == 2 and f"against lora's{free}" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(f"A head sorts{free}.") == 3
    for task in ("reviews", "poems"):
        assert free[2:] in (out / task / "results.md").read_text(encoding="utf-8")
        assert {"results.csv", "results.md", "results.json", "study.journal"} <= {
            p.name for p in (out / task).iterdir()
        }
    lines = {
        line["arm"]: line for line in csv.DictReader(io.StringIO((out / "overall.csv").read_text(encoding="utf-8")))
    }
    assert float(lines["lora-ga"]["reviews"]) == pytest.approx(-0.3, abs=0.006)
    assert float(lines["lora-ga"]["poems"]) == pytest.approx(-0.2, abs=0.006)
    body = json.loads((out / "overall.json").read_text(encoding="utf-8"))
    assert 0 < body["lora-ga"]["effect"][0] < 0.3 and 0.5 < body["lora-ga"]["better"] <= 1
    assert body["full"]["effect"] is None and lines["full"]["shrunken"] == ""


LOOK = """
  const all = query => [...document.querySelectorAll(query)], studies = all("[data-study]");
  const dots = {};
  for (const b of all(".chips button"))
    (dots[b.textContent] ??= new Set()).add(getComputedStyle(b.querySelector("i")).backgroundColor);
  const [whole, first] = studies;
  const rows = () => [...whole.querySelector("table").tBodies[0].rows].map(r => r.cells[0].textContent);
  const heads = [...whole.querySelectorAll("th button")].map(h => h.textContent), before = rows();
  whole.querySelectorAll("th button")[0].click();
  whole.querySelectorAll(".chips button")[1].click();
  const seen = e => e.getClientRects().length > 0, rings = [...whole.querySelectorAll(".figure .ring")].filter(seen);
  const beyond = all("main *").filter(e => !e.closest(".scroll, .chips, pre") && seen(e)
    && e.getBoundingClientRect().right > innerWidth + 1);
  return {studies: studies.map(s => s.dataset.study), heads, before, after: rows(), rings: rings.length,
    titles: all(".task > h2").map(h => h.textContent),
    links: all(".tasks a").map(a => !!document.querySelector(a.hash)),
    on: [...whole.querySelectorAll(".on")].length, elsewhere: [...first.querySelectorAll(".on")].length,
    colours: Object.values(dots).map(s => s.size), downloads: all("a[data-from]").map(a => a.download),
    verdict: all(".verdict")[0].textContent, beyond: beyond.map(e => e.outerHTML.slice(0, 80)),
    scrolls: document.documentElement.scrollWidth,
    reproduce: all("pre").filter(p => p.textContent.startsWith("loralign")).length};
"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_one_page_over_all_tasks(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr("sys.argv", ["loralign", "compare", str(study), "--report"])
    assert main() == 0
    assert f"over all tasks: {study.parent / 'out' / 'report.html'}" in capsys.readouterr().out
    page = Path(shutil.copy(study.parent / "out" / "report.html", tmp_path))
    found, console = visit(page, LOOK, width=width)
    assert not console and found["scrolls"] <= width and not found["beyond"]
    assert found["studies"] == ["all", "0", "1"] and found["titles"] == ["reviews", "poems"]
    assert found["links"] == [True, True] and found["reproduce"] == 1
    assert found["heads"] == ["arm", "reviews", "poems", "over all, shrunken", "P(better)"]
    assert found["before"] == ["full", "lora-ga"] and found["after"] == ["full", "lora-ga"]
    assert found["rings"] == 4  # two arms on two tasks
    assert found["on"] > 3 and not found["elsewhere"]
    assert set(found["colours"]) == {1}  # an arm has one colour in every part
    assert found["downloads"] == ["results-reviews.json", "results-poems.json"]
    assert "Full fine-tuning ends below plain lora on 2 of 2 tasks." in found["verdict"]
    assert re.search(r"(lora-ga is probably better than lora|Of lora-ga nobody can tell)", found["verdict"])


def test_nothing_to_report_is_said(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["loralign", "compare", str(study), "--report", "--set", "output=nowhere"])
    assert main() == 2
    assert "run it first, without --report" in capsys.readouterr().err


def test_pairs_of_sequences_are_counted_as_what_the_model_reads() -> None:
    """ORPO: chosen and rejected hold the prompt, so that is not counted a third time."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    pairs = {f"{k}_attention_mask": mask for k in ("chosen", "rejected", "prompt")}
    assert token_count({**pairs, "chosen_input_ids": torch.ones(2, 4)}) == 10
    assert token_count({"input_ids": torch.ones(2, 4), "attention_mask": mask}) == 5
    assert token_count({"input_ids": torch.ones(2, 4)}) == 8
