"""The command's first and last moments: what it imports, and how it answers a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loralign

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "scipy", "optuna", "matplotlib", "pyarrow")
IMPORTED = """
import sys
from loralign.cli.app import main
code = main(sys.argv[1:])
print(code, *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
SLOW_TORCH = "print('loading', flush=True)\nimport time\ntime.sleep(60)\n"


def imported(folder: Path, *words: str) -> tuple[int, set[str]]:
    """Exit code of a command, and which heavy modules it imported."""
    program = IMPORTED.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=folder, check=True
    )
    code, *names = done.stderr.splitlines()[-1].split()
    return int(code), set(names)


@pytest.mark.parametrize("word", ["--help", "--version", "nonsense"])
def test_what_needs_no_library_imports_none(tmp_path: Path, word: str) -> None:
    code, names = imported(tmp_path, word)
    assert (code, names) == (2 if word == "nonsense" else 0, set())


def test_methods_and_the_answer_to_a_bad_recipe_import_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: {train: t.jsonl}\noutput: o\nmethod: lorra\n", encoding="utf-8")
    for words, code in ((("methods",), 0), (("train", "r.yaml"), 2)):
        assert imported(tmp_path, *words) == (code, {"torch"}), words


def test_every_public_name_is_there_and_listed() -> None:
    for name in loralign.__all__:
        assert getattr(loralign, name) is not None
        assert name in dir(loralign)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        loralign.lora  # noqa: B018


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "loralign: stopped; `--resume` goes on from what was saved\n"),
        (signal.SIGTERM, 143, "loralign: stopped by SIGTERM; `--resume` goes on from what was saved\n"),
    ],
)
def test_a_signal_while_libraries_load_is_answered_in_one_line(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH, encoding="utf-8")  # a library that takes its time
    path = os.pathsep.join([str(tmp_path), str(Path(loralign.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "loralign", "train", "r.yaml"],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (code, said)
