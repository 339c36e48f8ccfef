"""Benchmarks and scripts are not run by the tests; that every name they import is still there, is."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_benchmark_or_script_can_be_imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # scripts/demo.py sets its threads
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"imported_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)


def test_no_module_of_the_tests_has_the_name_of_one_of_them() -> None:
    """Both are imported by their bare names, and the first one would be the other's."""
    assert not {f.name for f in Path(__file__).parent.glob("*.py")} & {f.name for f in FILES}
