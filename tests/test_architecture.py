"""Layering, no cycles, docstring headings of method files, every method in the table with an oracle."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

import loralign
from loralign import METHODS
from loralign.methods.build import DEFAULTS

SRC = Path(loralign.__file__).parent
ROOMS = (  # from the ground up: a room may import itself and the rooms before it, never one after it
    "types",
    "maths",
    "methods",
    "data",
    "carrier",
    "optim",
    "evidence",
    "io",
    "plan",
    "train",
    "compare",
    "config",
    "cli",
)
AT_THE_DOOR = {"__init__", "__main__"}
AXES = ("init", "form", "transform", "rule", "outer")
HEADINGS = ("Shapes:", "Source:", "Differs:", "Cost:", "Export:", "Args:", "Example:")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Names of loralign modules that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "loralign":
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "loralign"}
    return found


def arrows() -> Counter[tuple[str, str]]:
    """(room, room it imports) -> how many files of the first import from the second."""
    found: Counter[tuple[str, str]] = Counter()
    for path in FILES:
        own = room(name(path))
        found.update({(own, room(other)) for other in imports(path) if room(other) != own})
    return found


FILES = [p for p in SRC.rglob("*.py") if p.parent != SRC or p.stem not in AT_THE_DOOR]


def name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(("loralign", *(p for p in parts if p != "__init__")))


def test_every_file_is_in_a_room() -> None:
    at_root = {p.stem for p in SRC.glob("*.py")}
    assert at_root == AT_THE_DOOR
    assert {p.parent.name for p in SRC.glob("*/__init__.py")} == set(ROOMS)


def test_no_arrow_upwards() -> None:
    """The rooms are in order, so that no room can be part of a circle either."""
    upwards = [f"{a} -> {b}" for a, b in arrows() if ROOMS.index(a) < ROOMS.index(b)]
    assert not upwards, upwards


@pytest.mark.parametrize("axis", AXES)
def test_a_method_file_imports_torch_types_and_maths_only(axis: str) -> None:
    allowed = ("loralign.types", "loralign.maths.", f"loralign.methods.{axis}.")
    for path in (SRC / "methods" / axis).glob("*.py"):
        for other in imports(path):
            assert other.startswith(allowed), f"{name(path)} imports {other}"


def test_no_import_cycle() -> None:
    graph = {name(p): {i for i in imports(p) if i != name(p)} for p in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


METHOD_FILES = [
    p for axis in AXES for p in (SRC / "methods" / axis).glob("*.py") if p.stem not in ("__init__", "combine")
]


@pytest.mark.parametrize("path", METHOD_FILES, ids=name)
def test_method_file_says_what_it_does(path: Path) -> None:
    doc = importlib.import_module(name(path)).__doc__ or ""
    missing = [h for h in HEADINGS if h not in doc]
    assert not missing, f"{path.name}: docstring lacks {missing}"
    assert ">>>" in doc


@pytest.mark.parametrize("path", METHOD_FILES, ids=name)
def test_method_file_is_in_the_table(path: Path) -> None:
    """Every file on an axis serves a line of the table, or is the default of its axis."""
    module = name(path)
    used = {f.__module__ for m in METHODS.values() for f in (m.init, m.form, m.transform, m.outer, *m.rules) if f}
    used |= {f.__module__ for f in DEFAULTS.values()}
    assert module in used


def test_no_method_is_chosen_by_its_name_below_config() -> None:
    for path in FILES:
        if room(name(path)) in ("config", "cli") or name(path) == "loralign.methods.table":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "method":
                raise AssertionError(f"{path.name}:{node.lineno} compares a method's name")


def test_ids_are_long_and_arxiv_ids_well_formed() -> None:
    for method in METHODS.values():
        assert method.id == method.id.lower() and "_" not in method.id
        assert method.reference or len(method.arxiv.split(".")[0]) == 4
        assert method.prior.source


if __name__ == "__main__":  # python tests/test_architecture.py: the arrows between rooms
    for (one, other), count in sorted(arrows().items(), key=lambda a: (ROOMS.index(a[0][0]), ROOMS.index(a[0][1]))):
        print(f"{one:10} -> {other:10} {count}")
    print(f"{len(ROOMS)} rooms, {len(arrows())} arrows")
