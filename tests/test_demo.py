"""The demo on two real layers, its report on made-up numbers, and what README.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import warm
from cached_assets import asset, needs
from tiny_trl import preferences, settings, tokenizer
from toy import VOCAB, llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "scripts"))
from demo_report import Seen, sentences, table, write_picture  # noqa: E402

# --- the demo ---------------------------------------------------------------------------------------------------------


FORKED = """
import multiprocessing, runpy, sys
import pytest
sys.path.insert(0, sys.argv.pop(1))
import warm

context = multiprocessing.get_context
multiprocessing.get_context = lambda method: context("fork")
warm.verification(pytest.MonkeyPatch())
warm.server(True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The demo where its libraries are imported already: its workers are forked, and so is the clean process of a proof."""


def narrow(folder: Path) -> Path:
    """SmolLM2's kind of tokenizer with a fiftieth of its words, and a random model for it."""
    texts = (asset("bbc") / "all.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    tokenizer = AutoTokenizer.from_pretrained(asset("smollm2-2layer")).train_new_from_iterator(texts, 1000)
    tokenizer.save_pretrained(folder)
    llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    return folder


@pytest.mark.assets
@needs("smollm2-2layer")
@needs("bbc")
@pytest.mark.parametrize("how", ["forked", pytest.param("as people run it", marks=pytest.mark.slow)])
def test_demo_trains_verifies_and_tells(how: str, tmp_path: Path) -> None:
    """As people run it: on two real layers."""
    out, forked = tmp_path / "demo", how == "forked"
    base = narrow(tmp_path / "base") if forked else asset("smollm2-2layer")
    start, program = (warm.run, ["-c", FORKED, str(ROOT / "tests")]) if forked else (subprocess.run, [])
    sizes = ["--steps", "2", "--valid", "2", "--test", "2"]
    done: Any = start(
        [sys.executable, *program, str(ROOT / "scripts/demo.py"), "--model", str(base), "--out", str(out), *sizes],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folders = sorted(p.parent for p in out.glob("*/adapter_config.json"))
    assert sorted(f.name.rsplit("-", 1)[0] for f in folders) == ["lora", "lora", "lora-ga", "lora-ga"]
    after = {}
    for folder in folders:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        after[folder.name] = [e["eval_loss"] for e in log if "eval_loss" in e][-1]
        assert f"{after[folder.name]:.3f}" in done.stdout
    assert len(set(after.values())) == 4, "four different runs"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for part in ("before:", "after:", "PeftModel.from_pretrained", "Each at its own prior", "Both at "):
        assert part in done.stdout
    texts = [set((out / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "valid", "test")]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


@pytest.mark.assets
@needs("bbc")
def test_demo_says_bad_input_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/demo.py"), "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    done = warm.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("demo: ")


# --- the report -------------------------------------------------------------------------------------------------------


def seen(method: str, shared: bool, after: float, match: float) -> Seen:
    curve = [(1, 2.0), (2, after)]
    lr = 0.0003 if shared else 0.001
    return Seen(method, lr, shared, curve, curve, 2.0, after, match, 10.0, 1.0, Path("out"), "tech")


def four(ga_after: float, ga_match: float) -> list[Seen]:
    return [
        seen(m, shared, *((1.0, 0.5) if m == "lora" else (ga_after, ga_match)))
        for shared in (False, True)
        for m in ("lora", "lora-ga")
    ]


@pytest.mark.parametrize(
    ("after", "match", "loss", "exact"),
    [
        (0.5, 0.9, "lora-ga ends with the lower held-out loss", "lora-ga ahead"),
        (1.5, 0.1, "lora ends with the lower held-out loss", "lora ahead"),
        (1.02, 0.52, "end alike", "do not tell apart"),
    ],
)
def test_sentences_follow_the_numbers(after: float, match: float, loss: str, exact: str) -> None:
    said = sentences(four(after, match), 60)
    for line in said[:2]:
        assert loss in line and exact in line


def test_sentences_name_runs_that_learned_nothing() -> None:
    said = " ".join(sentences(four(float("nan"), 0.5), 60))
    assert "did not fall with lora-ga at 0.001 and lora-ga at 0.0003" in said
    assert "did not fall" not in " ".join(sentences(four(1.0, 0.5), 60))


def test_table_and_picture(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(four(0.5, 0.9), 0.25, "title"))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["base", "model", "2.000", "25%"] in rows
    assert ["lora-ga", "0.0003", "shared", "2.000", "0.500", "90%", "10", "1"] in rows
    console.file.close()
    write_picture(four(0.5, 0.9), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# --- README.md --------------------------------------------------------------------------------------------------------


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def wide() -> Any:
    """Every matrix takes the README's rank twice."""
    return llama(hidden_size=64, num_key_value_heads=4)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(4, VOCAB, (2, 8), generator=generator) for _ in range(4)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def train(model: Any, opt: torch.optim.Optimizer, rows: list[dict[str, torch.Tensor]]) -> None:
    for batch in rows:
        model(**batch).loss.backward()
        opt.step()
        opt.zero_grad()


def test_readme_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"base_model": wide(), "batches": batches(), "train": train}
    exec(python_blocks()[0], names)
    probe = batches()[0]["input_ids"]
    trained = names["model"].eval()(probe).logits
    base = wide().eval()
    assert (trained - base(probe).logits).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(base, "out").eval()
    torch.testing.assert_close(loaded(probe).logits, trained, rtol=1e-4, atol=1e-5)


def test_readme_trainer(tmp_path: Path) -> None:
    model = wide()
    names: dict[str, Any] = {
        "DPOTrainer": DPOTrainer,
        "model": model,
        "args": DPOConfig(**settings(tmp_path)),
        "rows": preferences(),
        "tokenizer": tokenizer(),
    }
    exec(python_blocks()[1], names)
    trained = names["trainer"]
    assert trained.state.global_step == 3
    assert any(p.requires_grad and bool(p.any()) for n, p in trained.model.named_parameters() if "lora_B" in n)
