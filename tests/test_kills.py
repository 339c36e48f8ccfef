"""Forty SIGKILLs at random moments of training and comparing: what goes on after them ends as if nothing had been.

The seeds draw the moments and are the ids of the tests; the table that is printed says how far each process had come.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import warm
from cli_world import world_in
from loralign.compare.report import repeatable
from tiny_study import write_study

KILLS = 4
"""In each test; there are ten."""
KILLED_AFTER = """
import os, signal, sys, threading
from loralign.cli.app import main

os.setpgid(0, 0)
timer = threading.Timer(float(sys.argv[1]), os.killpg, (os.getpid(), signal.SIGKILL))
timer.daemon = True
begin = sys.argv[2]

def watch(name, args):
    if not timer.is_alive() and name == "open" and str(args[0]).endswith(begin):
        timer.start()

sys.addaudithook(watch)
raise SystemExit(main(sys.argv[3:]))
"""
"""The command, and some seconds after it opened a certain file the end of its process and all that it started."""
RECIPES = {
    11: ["method=lora-ga"],
    12: ["method=adalora", "options={}"],
    13: ["method=chain-of-lora", "options={}"],
    14: ["method=lora-rite+rslora", "options={}"],
    15: ["method=delta-lora", "options={}"],
}
STUDIES = {
    21: ("text", "1"),
    22: ("sft", "1"),
    23: ("text", "2"),
    24: ("classify", "1"),
    25: ("classify", "2"),
}
NO_START = "nothing to resume|no checkpoint is complete"
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("kills")) as root:
        yield root


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return warm.run([sys.executable, "-P", "-m", "loralign", *words])


def killed(after: float, begin: str, *words: str) -> subprocess.CompletedProcess[str]:
    return warm.run([sys.executable, "-c", KILLED_AFTER, str(after), begin, *words])


@pytest.mark.parametrize("seed", RECIPES)
def test_a_run_that_is_killed_again_and_again_ends_the_same(seed: int) -> None:
    draw, sets = random.Random(seed), [*RECIPES[seed], "train.steps=40", "train.keep=20"]
    overrides = [word for one in sets for word in ("--set", one)]
    whole, cut = (["train", "r.yaml", *overrides, "--set", f"output={n}-{seed}"] for n in ("whole", "cut"))
    done = command(*whole)
    assert done.returncode == 0, done.stderr
    room = Path(f"whole-{seed}", "checkpoints")
    took = (room / "checkpoint-40" / "loralign.json").stat().st_mtime - (room / "begun.json").stat().st_mtime
    kills = 0
    while kills < KILLS:
        after = draw.uniform(0.0, 0.6) * took
        done = killed(after, "begun.json", *cut, "--resume")
        if done.returncode == 2 and re.search(NO_START, done.stderr):
            done = killed(after, "begun.json", *cut)
        print(f"seed {seed}: {after:.2f} of {took:.2f} s, {done.returncode}, {done.stderr.splitlines()[-1:]}")
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
        if done.returncode == 0:  # it came to its end before that: from the start, with less time
            took *= 0.8
            shutil.rmtree(f"cut-{seed}")
    last = command(*cut, "--resume")
    if last.returncode == 2 and re.search(NO_START, last.stderr):
        last = command(*cut)
    assert last.returncode == 0, last.stderr
    for path in ("adapter_model.safetensors", "checkpoints/checkpoint-40/adapter_model.safetensors"):
        ours, theirs = load_file(Path(f"cut-{seed}", path)), load_file(Path(f"whole-{seed}", path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), path


@pytest.mark.distributed
@pytest.mark.parametrize("seed", STUDIES)
def test_a_study_that_is_killed_again_and_again_ends_with_the_same_table(seed: int, tmp_path: Path) -> None:
    draw, (kind, workers) = random.Random(seed), STUDIES[seed]
    whole, cut = write_study(tmp_path / "whole", kind), write_study(tmp_path / "cut", kind)
    began = time.monotonic()
    done = command("compare", str(whole), "--workers", workers)
    assert done.returncode == 0, done.stderr
    took = time.monotonic() - began
    kills = 0
    while kills < KILLS:
        after = draw.uniform(0.1, 0.9) * took / 3
        done = killed(after, "study.yaml", "compare", str(cut), "--workers", workers)
        print(f"seed {seed}: {after:.2f} of {took:.2f} s, {done.returncode}, {done.stderr.splitlines()[-1:]}")
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
        if done.returncode == 0:
            took *= 0.8
            shutil.rmtree(tmp_path / "cut" / "out")
    last = command("compare", str(cut), "--workers", workers)
    assert last.returncode == 0, last.stderr
    assert repeatable(tmp_path / "cut" / "out") == repeatable(tmp_path / "whole" / "out")
    for picture in ("rates.png", "steps.png"):
        assert (tmp_path / "cut" / "out" / picture).read_bytes() == (tmp_path / "whole" / "out" / picture).read_bytes()
