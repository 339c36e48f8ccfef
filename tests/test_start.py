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
from loralign.cli.stop import Signals

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "scipy", "optuna", "matplotlib", "pyarrow")
IMPORTED = """
import sys
from loralign.cli.app import main
code = main(sys.argv[1:])
print(code, *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
SLOW = "print('loading', flush=True)\nimport time\ntime.sleep(60)\n"


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


BEGINS_ANEW = "nothing was saved yet, the same command begins anew"


@pytest.mark.parametrize(
    ("number", "ignored", "library"),
    [
        (signal.SIGINT, False, "torch"),
        (signal.SIGTERM, False, "torch"),
        (signal.SIGTERM, False, "typer"),  # while the command itself loads
        (signal.SIGHUP, False, "typer"),
        (signal.SIGHUP, True, "torch"),  # under nohup
    ],
)
def test_a_signal_while_libraries_load_is_answered_in_one_line(
    tmp_path: Path, number: signal.Signals, ignored: bool, library: str
) -> None:
    """The library takes its time in a string given to `exec`, past which CPython remembers a KeyboardInterrupt."""
    (tmp_path / f"{library}.py").write_text(f"exec({SLOW!r})", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(loralign.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "loralign", "train", "r.yaml"],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        signal.signal(signal.SIGHUP, before)
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.1)
        process.send_signal(number)
        answered = signal.SIGTERM if ignored and number == signal.SIGHUP else number
        if answered != number:
            time.sleep(0.1)
            assert process.poll() is None
            process.send_signal(answered)
        _, error = process.communicate(timeout=20)
    by = "" if answered == signal.SIGINT else f" by {answered.name}"
    assert (process.returncode, error) == (128 + answered, f"loralign: stopped{by}; {BEGINS_ANEW}\n")


@pytest.mark.parametrize(
    ("words", "left", "said"),
    [
        (["train", "r.yaml"], "", BEGINS_ANEW),
        (["train", "r.yaml"], "checkpoints/begun.json", "`--resume` goes on from what was saved"),
        (["--debug", "tasks", "t.yaml"], "checkpoints/begun.json", "`--resume` goes on from what was saved"),
        (["train", "r.yaml", "--resume"], "", "`--resume` goes on from what was saved"),
        (["compare", "s.yaml"], "", "the same command goes on where it was"),
        (["plan", "r.yaml"], "", ""),
    ],
)
def test_a_stop_names_the_command_that_goes_on(tmp_path: Path, words: list[str], left: str, said: str) -> None:
    stop = Signals()
    stop.output = tmp_path / "out"
    (stop.output / "checkpoints").mkdir(parents=True)
    if left:
        (stop.output / left).touch()
    assert stop.answer(words) == "; ".join(["stopped", *([said] if said else [])])
