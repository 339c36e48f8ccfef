"""Layering, no cycles, docstring headings of method files, every method in the table with an oracle."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import loralign
from loralign import METHODS

SRC = Path(loralign.__file__).parent
LAYERS = (  # each may import itself and what stands before it
    ("types", "linalg"),
    ("layer", "slot", "sites", "evidence", "subspace", "optim", "plan"),
    ("init", "form", "transform", "rule", "outer"),
    ("recipes",),
    ("io",),
    ("train",),
    ("compare",),
    ("config",),
    ("cli", "__main__"),
)
AXES = LAYERS[2]
HEADINGS = ("Shapes:", "Source:", "Differs:", "Cost:", "Export:", "Args:", "Example:")


def level(module: str) -> int:
    part = module.split(".")[1] if "." in module else "cli"
    part = next((p for layer in LAYERS for p in layer if part == p or part.startswith(p + "_")), part)
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path) -> set[str]:
    """Names of loralign modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loralign"):
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("loralign")}
    return found


FILES = [p for p in SRC.rglob("*.py") if p != SRC / "__init__.py"]


def name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(("loralign", *(p for p in parts if p != "__init__")))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_layering(path: Path) -> None:
    own = name(path)
    for other in imports(path):
        assert level(other) <= level(own), f"{own} imports {other} from a higher layer"
        mine, theirs = own.split(".")[1], other.split(".")[1] if "." in other else ""
        if mine in AXES and theirs in AXES:
            assert mine == theirs, f"{own} imports {other}: the axes never import one another"


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


METHOD_FILES = [p for axis in AXES for p in (SRC / axis).glob("*.py") if p.stem not in ("__init__", "combine")]


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
    used |= {"loralign.init.kaiming", "loralign.form.plain", "loralign.transform.adamw", "loralign.outer.once"}
    assert module in used


def test_no_method_is_chosen_by_its_name_below_config() -> None:
    for path in FILES:
        if path.stem in ("config", "recipes") or path.stem.startswith("cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "method":
                raise AssertionError(f"{path.name}:{node.lineno} compares a method's name")


def test_ids_are_long_and_arxiv_ids_well_formed() -> None:
    for method in METHODS.values():
        assert method.id == method.id.lower() and "_" not in method.id
        assert method.reference or len(method.arxiv.split(".")[0]) == 4
        assert method.prior.source
