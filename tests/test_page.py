"""The page of the recorded study of seventeen arms: whole, safe, readable on a phone, and at work in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import needs_browser, visit
from loralign import build
from loralign.cli.app import main
from loralign.compare.report import report
from loralign.compare.spec import Arm, Outcome, Spec, TaskSpec, Trial
from loralign.compare.study import work

RECORD = Path(__file__).parent.parent / "records" / "2026-11-26-h100-study"
VOID = {"meta", "link", "br", "input"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    for name in ("study.yaml", "study.journal"):
        shutil.copy(RECORD / name, folder / name)
    assert main(["compare", str(folder / "study.yaml"), "--report", "--set", f"output={folder}"]) == 0
    return folder / "report.html"


class Nesting(HTMLParser):
    """Elements as they open and close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_one_whole_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    read = Nesting()
    read.feed(text)
    assert not read.wrong and not read.open
    assert set(read.links) == {"data:,", "results.json"}  # the latter is replaced by what the page holds
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(text) < 1_500_000


def test_it_holds_what_the_other_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    held = re.search(r'<script type="application/json" id="data-0">(.*?)</script>', text, re.S)
    assert held and json.loads(held[1]) == json.loads((page.parent / "results.json").read_text(encoding="utf-8"))
    for name in ("results.md", "results.csv"):  # the record's are those of today's command
        assert (page.parent / name).read_text(encoding="utf-8") == (RECORD / name).read_text(encoding="utf-8")
    arms = json.loads(held[1])["result"]["arms"]
    assert len(arms) == 17
    for arm in arms:
        assert f"<b>{arm['arm']}</b>: " in text and f"{arm['final']['mean']:.4f} ± " in text
    assert text.count("Only seeds were drawn anew") == 1
    assert text.count("−0.241 (−0.371 … −0.110)") == 5  # full less lora: figures and tips in two sizes, the table
    assert text.count('<span class="flag">edge</span>') == 3 and '<span class="flag">unequal budget</span>' in text


LOOK = """
  const all = query => [...document.querySelectorAll(query)];
  const table = all("section table")[0], heads = [...table.querySelectorAll("th button")];
  const order = () => [...table.tBodies[0].rows].map(r => r.cells[0].textContent);
  const at = name => heads.find(h => h.textContent === name);
  const orders = [order()];
  for (const name of ["arm", "arm", "P(better)", "P(better)", "test loss"]) { at(name).click(); orders.push(order()); }
  const sorted = at("test loss").parentElement.getAttribute("aria-sort");

  const paper = () => getComputedStyle(document.body).backgroundColor, papers = [paper()];
  document.getElementById("theme").click();
  papers.push(paper());

  const chip = all(".chips button")[3], forward = () => all(".figure .arm.on").map(e => e.dataset.arm);
  chip.click();
  const on = forward();
  chip.click();

  const seen = e => e.getClientRects().length > 0, tip = document.getElementById("tip");
  all(".hit").find(seen).dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 40, clientY: 40}));

  const right = e => e.getBoundingClientRect().right > innerWidth + 1;
  const beyond = all("main *").filter(e => !e.closest(".scroll, .chips, pre") && seen(e) && right(e));
  const heights = all(".figure text").filter(seen).map(e => e.getBoundingClientRect().height);
  const dots = all(".chips i").map(e => getComputedStyle(e).backgroundColor);
  return {orders, sorted, papers, on, off: forward(), tip: tip.classList.contains("on") && tip.textContent,
    width: innerWidth, scrolls: document.documentElement.scrollWidth, beyond: beyond.map(e => e.outerHTML.slice(0, 80)),
    text: Math.min(...heights), link: all("a[data-from]")[0].href, colours: new Set(dots).size};
"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_at_work_in_a_browser(page: Path, width: int) -> None:
    found, console = visit(page, LOOK, width=width)
    assert not console
    assert found["width"] == width and found["scrolls"] <= width
    assert not found["beyond"]
    by_loss, up, down, low, high, again = found["orders"]
    assert by_loss[0] == "full" and by_loss[-1] == "lora-pro" and again == by_loss
    assert up == sorted(up) and down == up[::-1] and sorted(up) == sorted(by_loss)
    assert low[0] == "lora-pro" and {high[0], high[1]} == {"rslora", "lora-plus"}
    assert {low[-1], low[-2]} == {high[-1], high[-2]} == {"full", "lora"}  # nothing to order them by: always last
    assert found["sorted"] == "ascending"
    assert len(set(found["papers"])) == 2 and found["colours"] == 17
    assert len(found["on"]) > 3 and set(found["on"]) == {"3"} and not found["off"]
    assert "loss " in found["tip"] and found["link"].startswith("blob:")
    assert found["text"] >= 10  # pixels of a line in a figure


NAMES = (
    *("lora", "full", "W" * 60, "a_very_long_name_without_any_space_that_goes_on_and_on_at_1"),
    *("<b>\"x\"</b> & 'y'", "a|b"),
)


def odd_study(folder: Path, scale: float) -> None:
    """The report of arms whose names are long, broad, or mean something in HTML and Markdown; losses are about so
    large, where it is infinite every trial diverges."""
    arms = tuple(Arm(name, build(name if name in ("lora", "full") else "pissa"), lr=1e-3) for name in NAMES)

    def run(trial: Trial, tell: object) -> Outcome:
        end = scale * (2.0 + 0.05 * len(trial.arm) + 0.02 * abs(trial.index) + 0.001 * (trial.seed % 7))
        wild = end == math.inf or (trial.arm == "a|b" and trial.index != 0)
        ranks = {f"layers.{i}.{kind}": i + 1 for i in range(3) for kind in ("q_proj", "v_proj")}
        losses = (end + scale, end)
        return Outcome((2, 4), (0.1, 0.2), losses, ranks=ranks, diverged=wild, step_tokens=1.0, total_s=0.2)

    study = Spec("some/model", TaskSpec("text", "a", "b", "c"), arms, folder, 4, rates=3, seeds=3, choice_seeds=1)
    work(study, run)
    report(study)


MESS = """
  const box = e => e.getBoundingClientRect(), seen = e => e.getClientRects().length > 0;
  const all = query => [...document.querySelectorAll(query)].filter(seen);
  const within = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  const over = [];
  for (const figure of all(".figure")) {
    const texts = [...figure.querySelectorAll("text:not(.in)")].filter(seen).map(e => [e.textContent, box(e)]);
    texts.forEach(([a, at], i) => texts.slice(i + 1).forEach(([b, other]) => within(at, other) && over.push([a, b])));
  }
  const beyond = all(".figure text").filter(e => box(e).right > innerWidth + 1).map(e => e.textContent);
  const first = all("section table td:first-child").map(e => box(e).width);
  return {over, beyond, first: Math.max(...first) / innerWidth};
"""


@pytest.fixture(scope="module", params=[1e-4, *(pytest.param(s, marks=pytest.mark.slow) for s in (1.0, 1e5))])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    odd_study(folder, request.param)
    return folder


@needs_browser
@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_no_label_covers_another_whatever_arms_are_called(odd: Path, width: int) -> None:
    found, console = visit(odd / "report.html", MESS, width=width)
    assert not console and not found["over"] and not found["beyond"]
    assert found["first"] < 0.5, "the first column, which stays, leaves room for the others"


def test_names_are_literal_in_markdown(odd: Path) -> None:
    lines = (odd / "results.md").read_text(encoding="utf-8").splitlines()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(cells) == 1 and any(line.startswith("| a\\|b |") for line in lines)
    assert "<b>" not in "".join(line.replace("\\<", "") for line in lines)


def test_a_study_whose_every_trial_diverged_shows_the_rates(tmp_path: Path) -> None:
    odd_study(tmp_path, math.inf)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="lost"') == len(NAMES) * 6 and "No finished <code>lora</code> arm" in page
