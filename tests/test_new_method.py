"""A method of one's own is one file per axis and one line: written here as a stranger's package, nothing else edited.

A form (a trained size per slot), a rule (the smallest slot of every site dies after step 2) and an outer loop (two
links); found by its entry point in a process of its own, trained, killed and resumed, exported, verified by stock PEFT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import warm
from loralign import verify
from loralign.types import Method

FORM = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from loralign.maths.operators import Dense
from loralign.types import Facts

@dataclass(frozen=True)
class Sized:
    """W_eff = W0 + s·B·diag(size)·A, committed links with their size folded in."""
    facts: ClassVar[Facts] = Facts(gated=True, commits=True, per_slot=frozenset({"size"}), own_lr=0.5)
    def trained(self, W, r, draw): return {"size": torch.ones(r)}
    def constants(self, W, r, draw): return {}
    def shared(self): return {}
    def neighbours(self, name, sites): return ()
    def factors(self, own, others):
        A = torch.cat([own.A * own.own["size"][:, None], own.A0.to(own.A.dtype)])
        return Dense(A), Dense(torch.cat([own.B, own.B0.to(own.B.dtype)], dim=1))

def sized(): return Sized()
'''
RULE = """
from dataclasses import dataclass
from typing import ClassVar
from loralign.types import NOTHING, Facts, Off

@dataclass(frozen=True)
class Cull:
    after: int
    needs = NOTHING
    facts: ClassVar[Facts] = Facts(events=True, allocates=True)
    def init(self, sites, total_steps): return {}
    def penalty(self, state, tensors, ctx): return None
    grad_mask = update_mask = penalty
    def step(self, state, moment):
        if moment.step != self.after: return state, None
        smallest = {s.name: int(moment.tensors[s.name, "B"].norm(dim=0).argmin()) for s in moment.sites}
        return state, tuple(Off(name, (slot,)) for name, slot in smallest.items())

def cull(after: int = 2): return Cull(after)
"""
OUTER = """
from dataclasses import dataclass
from typing import ClassVar
from loralign.types import Episode, Facts

@dataclass(frozen=True)
class Halves:
    facts: ClassVar[Facts] = Facts()
    def episode(self, index, total_steps, sites, draw):
        return Episode(index, -(-total_steps // 2), warm_up_steps=1) if index < 2 else None

def halves(): return Halves()
"""
LINE = """
from stranger.cull import cull
from stranger.halves import halves
from stranger.sized import sized
from loralign.types import LrPrior, Method

METHOD = Method("stranger", "sizes, culls, two links", "2401.00001", "exact, rank grows", LrPrior(None, "unknown"),
                form=sized, rules=(cull,), outer=halves)
"""
USE = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from loralign import METHODS, build, export, peft_config, sites
from loralign.train.attach import attach
from toy import batch_for, llama
from trainers import toy_trainer

assert "stranger" in METHODS
folder = Path(sys.argv[1])
llama().save_pretrained(folder / "base")

def run(name, resume=None):
    recipe = build("stranger", {"after": 2}, r=3, alpha=6.0)
    trainer = toy_trainer(folder / name, peft_config(recipe, llama()), steps=6, save_steps=1)
    attach(trainer, recipe, resume_from=resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model.eval()

whole = run("whole")
assert {s.layer.lora_variant["default"].links for s in sites(whole)} == {(2,)}  # the culled slot is not committed
with torch.no_grad():
    out = whole(**batch_for(whole)).logits
for step in (1, 2, 3, 4):
    again = run(f"again-{step}", folder / "whole" / f"checkpoint-{step}")
    with torch.no_grad():
        assert torch.equal(again(**batch_for(again)).logits, out), step
export(whole, folder / "out", base_id="toy/base", probes=batch_for(whole))
config = json.loads((folder / "out" / "adapter_config.json").read_text())
print("rank", config["r"])
"""


def test_the_line_that_the_guide_shows_is_a_method() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names: dict[str, Method] = {}
    exec(guide.split("```python\n")[1].split("```")[0], names)
    assert names["MY_METHOD"].id == "my-method" and names["MY_METHOD"].transform is not None


def test_one_file_per_axis_and_one_line_make_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "site" / "stranger", tmp_path / "site" / "stranger-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    for name, text in {"__init__": "", "sized": FORM, "cull": RULE, "halves": OUTER, "table": LINE}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[loralign.methods]\nstranger = stranger.table:METHOD\n", encoding="utf-8")
    places = [str(tmp_path / "site"), str(Path(__file__).parent)]
    done = warm.run([sys.executable, "-P", "-c", USE, str(tmp_path), *places])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "rank 4"  # two links of 3, each without the slot that it lost
    warm.verification(monkeypatch)
    verify(tmp_path / "out", tmp_path / "base")
