"""Benchmarks and scripts are imported and not run: every name they use is still there; what they refuse."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_benchmark_or_script_can_be_imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # scripts/demo.py sets its threads
    imported(file, monkeypatch)


def imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"imported_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_misspelt_kind_of_step_is_refused_and_not_measured_as_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    known = imported(ROOT / "benchmarks/bench_step.py", monkeypatch).known
    for kind in ("compiled floor", "peft", "one node", "recorded compiled", "compiled lora:8", "spectral:64:stateless"):
        assert known(kind) == kind
    for kind in ("lorra", "lora:x", "lora:0", "compiled peft", "lora:8:stateless", "peft:8", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="Known: peft"):
            known(kind)


def test_widths_join_a_file_of_the_same_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rates.json of the record: three widths of one call and one of another."""
    widths = imported(ROOT / "benchmarks/width_rates.py", monkeypatch)
    file = ROOT / "records/2026-11-29-cpu-width/rates.json"
    same = {"json": file, "methods": ["lora"], "rank": 16, "steps": 100, "first_steps": 300, "batch": 8, "seeds": 1}
    found = widths.begun(argparse.Namespace(**same))
    assert list(found) == ["spectral", "lora"] and list(found["spectral"]) == [64, 128, 256, 512] and not found["lora"]
    assert found["spectral"][64][0.008] == [2.2765]
    with pytest.raises(SystemExit, match="with steps 100, not 60: name another file"):
        widths.begun(argparse.Namespace(**{**same, "steps": 60}))


def test_no_module_of_the_tests_has_the_name_of_one_of_them() -> None:
    """Both are imported by their bare names, and the first one would be the other's."""
    assert not {f.name for f in Path(__file__).parent.glob("*.py")} & {f.name for f in FILES}
