"""The page of the recorded study of seventeen arms: whole, safe, readable on a phone, and at work in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import needs_browser, visit
from loralign.cli.app import main

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
