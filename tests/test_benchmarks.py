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
    """In this process, which gets its environment and modules of the same names (`tests/assets.py`) back."""
    monkeypatch.syspath_prepend(str(file.parent))
    environment, stems = dict(os.environ), [f.stem for f in FILES]
    kept = {name: sys.modules.pop(name) for name in stems if name in sys.modules}
    spec = importlib.util.spec_from_file_location(f"imported_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        for name in (*stems, spec.name):
            sys.modules.pop(name, None)
        sys.modules.update(kept)
        os.environ.clear()
        os.environ.update(environment)
