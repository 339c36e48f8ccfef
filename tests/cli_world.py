"""The command line on a tiny model: a folder with a saved Llama, its tokenizer, rows and a recipe; a call a command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_trl
import toy
import warm
from loralign.cli.app import main

TEMPLATE = "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <eos> ' }}{% endfor %}"
RECIPE = """\
model: base
data: {train: rows.jsonl, eval: 0.25, max_length: 32}
method: lora-ga
options: {micro_batches: 2}
rank: 4
train: {steps: 6, batch_size: 4, learning_rate: 1e-2, save_every: 2, log_every: 2}
output: out
"""


@dataclass(frozen=True)
class Done:
    """What one command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run(*argv: object) -> Done:
    """One command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Done(code, out.getvalue(), err.getvalue())


def run_process(*argv: object, **kwargs: Any) -> Done:
    """One command as people run it."""
    command = [sys.executable, "-m", "loralign", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)
    return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def world_in(root: Path) -> Iterator[Path]:
    """Within: the commands run in `root`, which holds a tiny Llama with its tokenizer, rows and a recipe."""
    before = dict(os.environ)
    tokenizer = tiny_trl.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    toy.llama(max_position_embeddings=256).save_pretrained(root / "base")
    rows = [{"prompt": tiny_trl.words(4, i), "completion": " " + tiny_trl.words(3, 100 + i % 3)} for i in range(24)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "r.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        warm.verification(patch)
        yield root
    os.environ.clear()
    os.environ.update(before)


def bytes_of(folder: Path) -> dict[str, str]:
    """Checksum of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_one_sentence(done: Done) -> str:
    """The last line of stderr says what is wrong; there is no traceback. Returns that line."""
    assert "Traceback" not in done.err
    said = [line for line in done.err.splitlines() if line.startswith("loralign: ")]
    assert len(said) == 1, done.err
    assert done.err.splitlines()[-1] == said[0]
    return said[0]
