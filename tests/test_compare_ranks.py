"""Ranks at the end in every file of a study: made-up outcomes of an arm with a rule, one of unequal ranks, one old."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from browser import needs_browser, visit
from loralign import build
from loralign.compare.curves import Curve
from loralign.compare.ranks import ranks_of
from loralign.compare.report import report
from loralign.compare.spec import Arm, Outcome, Spec, TaskSpec, Trial
from loralign.compare.study import work

SITES = [f"model.layers.{i}.{k}" for i in range(3) for k in ("self_attn.q_proj", "mlp.up_proj")]
RULED, UNEQUAL, OLD = "sora", "xgblora", "adalora"


def outcome(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
    """Losses as a parabola in the rate; seed k of the ruled arm ends with 1 + k, 2 + k … slots."""
    final = 1.0 + 0.1 * trial.index**2 + 0.01 * (trial.seed % 7)
    made = Outcome((2, 4), (0.1, 0.2), (final + 1, final), step_tokens=128.0, trainable=10, rank=9)
    ranks = {site: 4 for site in SITES}
    if trial.arm == RULED:
        return replace(made, ranks={s: 1 + i + trial.seed % 10 for i, s in enumerate(SITES)}, begun_slots=54)
    if trial.arm == UNEQUAL:
        return replace(made, ranks={**ranks, SITES[0]: 8})
    return replace(made, ranks=None if trial.arm in (OLD, "full") else ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    names = ("lora", "full", RULED, UNEQUAL, OLD)
    arms = tuple(Arm(name, build(name), lr=1e-3) for name in names)
    fields = {"steps": 4, "rates": 3, "choice_seeds": 1, "seeds": 3, "baseline_seeds": 3}
    spec = Spec("toy", TaskSpec("text", "a", "b", "c"), arms, out, **fields)  # type: ignore[arg-type]
    assert work(spec, outcome)
    report(spec)
    return out


@pytest.mark.parametrize(("begun", "ended", "shown"), [(None, 4, None), (None, 5, "9"), (8, 4, "8 → 8")])
def test_ranks_are_told_where_a_rule_decided_or_modules_differ(
    begun: int | None, ended: int, shown: str | None
) -> None:
    """A rule that left every slot is told of, too."""
    one = Curve("x", 1e-3, 0, (1,), (1.0,), (1.0,), 1.0, 1.0, ranks={"a": 4, "b": ended}, begun_slots=begun)
    found = ranks_of([one])
    assert (found and str(found)) == shown


def test_tables_tell_the_slots_of_arms_with_a_rule(folder: Path) -> None:
    rows = {r["arm"]: r for r in csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines())}
    assert {arm: (r["slots_begun"], r["slots_ended"]) for arm, r in rows.items()} == {
        "lora": ("", ""), "full": ("", ""), OLD: ("", ""), RULED: ("54.0", "27.0"), UNEQUAL: ("", "28.0"),
    }  # fmt: skip
    table = (folder / "results.md").read_text(encoding="utf-8").splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[4] for line in table if line.startswith("| ")}
    assert cells == {"arm": "slots", "lora": "–", "full": "–", OLD: "–", RULED: "54 → 27", UNEQUAL: "–"}


def test_results_hold_the_ranks_of_every_trial_and_their_mean_by_arm(folder: Path) -> None:
    body = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert body["modules"] == SITES
    assert body["trials"][f"seed/{RULED}/+0/2"]["ranks"] == [3, 4, 5, 6, 7, 8]
    assert body["trials"][f"seed/{OLD}/+0/2"]["ranks"] is None
    arms = {arm["arm"]: arm["ranks"] for arm in body["result"]["arms"]}
    assert arms[RULED] == {"begun": 54, "ended": 27, "by_module": dict(zip(SITES, range(2, 8), strict=True))}
    assert arms["lora"] is None and arms[UNEQUAL]["begun"] is None
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")


LOOK = """
  const all = query => [...document.querySelectorAll(query)], maps = all(".maps > svg");
  const cells = [...maps[0].querySelectorAll(".cell")].map(e => e.getBoundingClientRect());
  const fills = [...maps[0].querySelectorAll(".cell")].map(e => getComputedStyle(e).fill);
  return {titles: maps.map(m => m.querySelector(".label").textContent),
    tops: [...new Set(cells.map(c => c.top))].length,
    lefts: [...new Set(cells.map(c => c.left))].length, colours: [...new Set(fills)].length,
    said: [...maps[0].querySelectorAll(".in")].map(e => e.textContent),
    text: Math.min(...all(".maps text").map(e => e.getBoundingClientRect().height)),
    beyond: maps.filter(m => m.getBoundingClientRect().right > innerWidth).length,
    scrolls: document.documentElement.scrollWidth};
"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_maps_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    page = Path(shutil.copy(folder / "report.html", tmp_path))
    found, console = visit(page, LOOK, width=width)
    assert not console and found["scrolls"] <= width and not found["beyond"]
    assert found["titles"] == [RULED, UNEQUAL]
    assert (found["tops"], found["lefts"], found["colours"]) == (3, 2, 6)
    assert found["said"] == list("234567") and found["text"] >= 10
    assert re.search(f"{RULED}\\nmodel.layers.2.mlp.up_proj\\nrank 7", page.read_text(encoding="utf-8"))
