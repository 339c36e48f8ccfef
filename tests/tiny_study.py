"""Tiny studies in a folder: a random model, its tokenizer, rows of words and a study file; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from loralign.compare.spec import Spec
from loralign.config.study import load_study
from tiny_trl import tokenizer, words
from toy import bert, llama

SMALL = {"steps": 4, "batch_size": 8, "eval_every": 2, "charge": "none"}
"""Shorter than what lora-ga reads: nothing is charged."""


def write_study(folder: Path, kind: str = "text", **changes: Any) -> Path:
    """The study file; `changes` replace its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    model = llama() if kind != "classify" else bert()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for i, (split, rows) in enumerate((("train", 80), ("valid", 16), ("test", 16))):
        made = [_row(kind, 1000 * i + n) for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    task = {"kind": kind, "length": 16, **{s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")}}
    study: dict[str, Any] = {
        "model": str(folder / "model"),
        "task": task,
        "arms": ["lora-ga"],
        "rank": 4,
        "rates": {"count": 3, "extensions": 1, "seeds": 1},
        "seeds": 2,
        "baseline_seeds": 2,
        "train": SMALL,
        "output": str(folder / "out"),
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False), encoding="utf-8")
    return file


def _row(kind: str, seed: int) -> dict[str, Any]:
    text = words(12 + seed % 5, seed)
    if kind == "classify":
        return {"text": text, "label": f"label {seed % 3}"}
    if kind == "sft":
        return {"prompt": text, "completion": " " + words(4, seed + 1)}
    return {"text": text}


def load(file: Path, *overrides: str) -> Spec:
    (spec,) = load_study(file, overrides)
    return spec
