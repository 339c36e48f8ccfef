"""What the pages name is there: links, anchors, commands, options, keys, files; figures stand in their records."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from loralign.cli.app import app
from loralign.config.recipe import load, parse
from loralign.config.sections import RunFile
from loralign.config.study_file import StudyFile
from loralign.config.tasks_file import TasksFile, load_tasks
from loralign.methods.table import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
RECORDS = [f"records/{p.parent.name}/README.md" for p in sorted((ROOT / "records").glob("*/README.md"))]
page = pytest.mark.parametrize("page", PAGES)
any_page = pytest.mark.parametrize("page", [*PAGES, *RECORDS, "CHANGELOG.md"])


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ +(.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@any_page
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]
    assert links or page not in ("README.md", "docs/cli.md")
    for link in links:
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), link


@any_page
def test_files_that_are_named_exist(page: str) -> None:
    """Of the folders of this repository."""
    named = re.findall(r"(?<![\w/.-])(?:scripts|examples|benchmarks|tests|docs|records)/[\w./-]+\.\w+", text_of(page))
    assert not [name for name in named if not (ROOT / name).exists()]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: str, word: str) -> list[str]:
    """What follows a word that begins a command, in a line of its own or between backticks; lines are joined."""
    text = re.sub(r" \\\n +", " ", text_of(page))
    return [c.split("  #")[0] for c in re.findall(rf"(?:`|^ +){word} ([^`\n]*)", text, flags=re.MULTILINE)]


KNOWN: Any = get_command(app).commands  # type: ignore[attr-defined]
READ = {"train": load, "plan": load, "init": load, "tasks": load_tasks}


def check_line(line: str) -> None:
    """A `loralign …` line without its first word: command, options, and settings of a file of examples/ are known."""
    name, *words = [w.strip("[]") for w in shlex.split(line)]
    inner = [KNOWN[name], *getattr(KNOWN[name], "commands", {}).values()]
    options = {o for command in inner for p in command.params for o in p.opts}
    assert {w for w in words if w.startswith("--")} <= options | {"--debug"}, line
    if name in READ and words and words[0].startswith("examples/"):
        READ[name](ROOT / words[0], [after for word, after in pairwise(words) if word == "--set"])


@page
def test_commands_and_options_exist(page: str) -> None:
    lines = [*commands(page, "loralign"), *commands(page, r"(?:torchrun|accelerate launch).*-m loralign")]
    lines = [line for line in lines if line[:1].isalpha()]
    assert lines or page not in ("README.md", "docs/cli.md", "docs/serving.md", "docs/scale.md")
    for line in lines:
        check_line(line)


def test_the_examples_of_help_pages_would_run() -> None:
    inner = [c for known in KNOWN.values() for c in (known, *getattr(known, "commands", {}).values())]
    lines = [c.epilog.removeprefix("Example: loralign ").split(" | ")[0] for c in inner if c.epilog]
    assert len(lines) > 12
    for line in lines:
        check_line(line)


@any_page
def test_targets_and_scripts_exist(page: str) -> None:
    """`make …`, and `python FILE …` with options whose names stand in the file, as words or as parameters."""
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    assert {line.split()[0] for line in commands(page, "make")} <= targets
    for line in commands(page, r"(?:python|torchrun --nproc_per_node \d)"):
        name, *words = line.split()
        if name.startswith(("scripts/", "benchmarks/", "records/")):
            there = set(re.findall(r"[\w-]+", text_of(name)))
            asked = [word.removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")]
            assert not [word for word in asked if not {f"--{word}", word.replace("-", "_")} & there], line


# --- keys of files ----------------------------------------------------------------------------------------------------


def keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")


KEYS = {key for file in (RunFile, StudyFile, TasksFile) for key in keys(file)}
OPEN = ("options.", "train.extra.")


@page
def test_keys_that_are_named_exist(page: str) -> None:
    """`section.key`, also with a value, and what --set sets."""
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    named = re.findall(rf"`((?:{sections})\.\w+)(?:[:=][^`]*)?`", text_of(page))
    named += re.findall(r"--set \"?([\w.]+)=(?!value)", text_of(page))
    named = [key for key in named if not key.endswith(".png")]
    assert named or page not in ("README.md", "docs/cli.md")
    assert not [key for key in named if key not in KEYS and not key.startswith(OPEN)]


@page
def test_methods_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`method: ([^`]+)`", text_of(page))
    named += re.findall(r"build\(\"([^\"]+)\"", text_of(page))
    parts = {part for name in named for part in re.split(r" *\+ *", name)}
    assert parts <= {*METHODS, "recommended"}


@page
def test_recipes_on_pages_are_taken(page: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", text_of(page), flags=re.DOTALL)
    assert blocks or page != "README.md"
    for block in blocks:
        parse(yaml.safe_load(block))


def test_the_readme_names_the_reconstructions() -> None:
    said = re.search(
        r"`hrp`, `hrp-sketch`.*?The class-incremental\s+`sd-lora` is one too", text_of("README.md"), re.DOTALL
    )
    assert said and set(re.findall(r"`([\w-]+)`", said[0])) == {m.id for m in METHODS.values() if m.unverified}


# --- figures ----------------------------------------------------------------------------------------------------------

NUMBER = r"(?<![\w.,/:-])\d[\d,]*(?:\.\d+)?(?![\w/]|\.\d|,\d)"
NO_FIGURE = r"`[^`]*`|\]\([^)]*\)|!\[[^\]]*\]|\d+ \w+ 20\d\d|torch (?:before |is )?\d\.\d+"
DERIVED = {  # page, figure: of which figures of the records it is made, and how
    ("README.md", "61"): ("38.9", "63.5", lambda ours, full: 100 * ours / full),  # memory, spectral over full
    ("README.md", "0.73"): ("92.1", "126.2", lambda ours, theirs: ours / theirs),  # a step, loralign over Unsloth
}


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """Paragraphs and tables with figures, and the records that they name; a table may leave that to its neighbours."""
    text = re.sub(r"^    .*$", "", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), flags=re.MULTILINE)
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip() and not part.startswith("!")]
    own = [re.findall(r"\]\((?:\.\./)?(records/[\w.-]+)", part) for part in parts]
    found = []
    for is_table, group in groupby(range(len(parts)), key=lambda i: parts[i].startswith("|")):
        at = list(group)
        beside = [i for i in (at[0] - 1, at[-1] + 1) if is_table and 0 <= i < len(parts)]
        found += [(parts[i], sorted({name for k in (i, *beside) for name in own[k]})) for i in at]
    return [(part, records) for part, records in found if records]


def figures(text: str) -> list[str]:
    return [n.replace(",", "").rstrip(".") for n in re.findall(NUMBER, re.sub(NO_FIGURE, " ", text))]


def stands(figure: str, among: set[str]) -> bool:
    """Itself, or what rounds to it."""
    places = len(figure.partition(".")[2])
    near = [n for n in among if len(n.partition(".")[2]) >= places]
    return any(abs(float(n) - float(figure)) <= 0.5 * 10**-places + 1e-12 for n in near)


@pytest.mark.parametrize("page", [name for name in PAGES if "](records/" in text_of(name).replace("../", "")])
def test_figures_stand_in_the_records_that_are_named(page: str) -> None:
    checked = 0
    for text, records in blocks(page):
        pages = [p.read_text(encoding="utf-8") for name in records for p in (ROOT / name).glob("*.md")]
        among = {n.replace(",", "") for part in pages for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", part)}
        for figure in figures(text):
            checked += 1
            if (page, figure) in DERIVED:
                *parts, make = DERIVED[page, figure]
                assert {*parts} <= among
                assert stands(figure, {f"{make(*map(float, parts)):.6f}"})  # type: ignore[operator, arg-type]
            else:
                assert stands(figure, among), f"{figure} is in none of {records}: {text[:80]!r}"
    assert checked


def test_a_figure_is_found_rounded_and_no_other() -> None:
    among = {"2.6745", "24213", "0.85"}
    assert stands("2.67", among) and stands("2.675", among) and stands("24213", among)
    assert not any(stands(n, among) for n in ("2.68", "2.676", "24212", "0.850"))
    assert figures("a [step](x-1) takes 1,024 of `r 8` or 2.5, torch 2.12") == ["1024", "2.5"]
