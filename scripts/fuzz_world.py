"""The folder that the fuzz runs in: a tiny model, rows, a recipe and a study, and one good result of each."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralign.cli.app import main as command

CASE = Path("case")
"""The folder of one input; empty before each."""
RECIPE = """\
model: base
data:
  train: rows.jsonl
  max_length: 32
method: lora
rank: 4
targets: [q_proj, v_proj]
train:
  steps: 3
  batch_size: 4
  learning_rate: 1e-2
  save_every: 1
  keep: 3
output: case/out
"""
STUDY = """\
model: base
task: {kind: text, length: 16, train: train.jsonl, valid: valid.jsonl, test: test.jsonl}
arms: [lora-ga]
rank: 4
rates: {count: 2, extensions: 0}
seeds: 2
train: {steps: 2, batch_size: 8, eval_every: 2, charge: none}
output: case/study
"""
KEPT = ["--set", "method=lora-ga", "--set", "options={micro_batches: 2}", "--set", "cache=case/kept"]
"""A run that keeps its evidence."""


@dataclass(frozen=True)
class Input:
    """Words of a call. bad: it must be refused; False: it must be accepted; None: either, but in one sentence."""

    words: list[str]
    bad: bool | None = True


@dataclass(frozen=True)
class Kind:
    """A generator of inputs, which also writes their files into CASE."""

    name: str
    count: int
    make: Callable[[random.Random, int], Input]


def sentence(seed: int, count: int = 6) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(4, 60)}" for _ in range(count))


def build(root: Path) -> None:
    """Everything that inputs refer to; raises where a good call fails."""
    torch.manual_seed(0)
    special = ("<pad>", "<bos>", "<eos>", "<unk>")
    words = {w: i for i, w in enumerate((*special, *(f"w{i}" for i in range(4, 60))))}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        LlamaForCausalLM(config).save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
    rows = [{"prompt": sentence(i), "completion": " " + sentence(100 + i, 3)} for i in range(16)]
    write(root / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    for i, (split, count) in enumerate((("train", 40), ("valid", 8), ("test", 8))):
        texts = [json.dumps({"text": sentence(1000 * i + n, 18)}) for n in range(count)]
        write(root / f"{split}.jsonl", "\n".join(texts))
    write(root / "r.yaml", RECIPE)
    write(root / "s.yaml", STUDY)
    (root / CASE).mkdir()
    good(["train", "r.yaml"])
    good(["train", "r.yaml", "--set", "output=case/other", "--set", "seed=1"])
    good(["subspace", "extract", "case/out", "case/other", "--out", "case/basis.safetensors"])
    good(["train", "r.yaml", *KEPT, "--set", "output=case/ga"])
    good(["compare", "s.yaml"])
    shutil.move(root / CASE, root / "good")


def good(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(words)
    if code:
        raise SystemExit(f"the good call {' '.join(words)} ended with {code}: {said.getvalue()[-500:]}")


def write(path: Path, content: str | bytes) -> Path:
    """The file, with this content."""
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path
