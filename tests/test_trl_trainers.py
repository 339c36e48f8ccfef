"""TRL's other trainers (GRPO, KTO, ORPO, Reward), plain and with a start that needs gradients; SFT, then DPO."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import toy
from loralign import LoralignError, Recipe, build, peft_config, sites
from loralign.train.attach import attach
from tiny_trl import dpo, grpo, judge, kto, orpo, reward, sft

TRAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grpo": (grpo, toy.llama),
    "kto": (kto, toy.llama),
    "orpo": (orpo, toy.llama),
    "reward": (reward, judge),
}


def recipe(name: str = "lora", options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options or {}, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


@pytest.mark.parametrize("name", ["lora", "lora-ga"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_they_train_or_say_why_not(kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, base = TRAINERS[kind]
    made = recipe(name)
    trainer = make(tmp_path, peft_config(made, base()), max_steps=2)
    if (kind, name) == ("grpo", "lora-ga"):
        with pytest.raises(LoralignError, match=r"lora-ga starts from gradients, and GRPOTrainer hands out prompts"):
            attach(trainer, made)
        return
    callback = attach(trainer, made)
    with caplog.at_level(logging.INFO, "loralign"):
        trainer.train()
    assert f"{name}: applied to 14/14 pairs" in caplog.text and not callback.unreached
    trainer.save_model(str(tmp_path / "out"))
    again, ids = PeftModel.from_pretrained(base(), tmp_path / "out").eval(), torch.arange(4, 12)[None]
    with torch.no_grad():
        want, got = trainer.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_preheat_for_dpo_moves_away_from_its_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reference is the model without adapter, so the loss leaves ln 2."""
    made = recipe("hrp", {"steps": 6, "rank": 6, "lr": 1e-2})
    trainer = dpo(tmp_path, peft_config(made, toy.llama()))
    with caplog.at_level(logging.INFO, "loralign"):
        attach(trainer, made)
    found = re.search(r"preheat: .* loss ([0-9.]+) to ([0-9.]+)", caplog.text)
    assert found is not None
    first, last = map(float, found.groups())
    assert first == pytest.approx(0.6931, abs=1e-4) and last < 0.691


# --------------------------------------------------------------------------------------------------- a trained adapter


def factors(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n and ".default." in n}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    trainer = sft(folder / "t", peft_config(recipe(), toy.llama()))
    attach(trainer, recipe())
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter"


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(toy.llama(), folder, is_trainable=True)


def test_sft_then_dpo_goes_on_from_the_adapter(stage1: Path, tmp_path: Path) -> None:
    """TRL's copy named "ref" is the policy that DPO starts from; it stays, the adapter moves."""
    trainer = dpo(tmp_path, None, model=loaded(stage1), max_steps=2)
    before = factors(trainer.model)
    attach(trainer, recipe())
    assert all(torch.equal(p, before[n]) for n, p in factors(trainer.model).items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    after = factors(trainer.model)
    assert all(not torch.equal(p, before[n]) for n, p in after.items())
    ref = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert all(torch.equal(p, before[n]) for n, p in ref.items()) and len(ref) == len(before)
    trainer.save_model(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(toy.llama(), tmp_path / "out")
    assert all(torch.equal(p, after[n]) for n, p in factors(again).items())


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("lora-ga", {}, r"trained already, and lora-ga would reset it: go on with .* or merge it"),
        ("delta-lora", {}, r"trained already, and delta-lora would reset it"),
        ("pissa", {}, r"trained already, and pissa would reset it"),  # a twin
        ("lora-fa", {}, r"trained already, and lora-fa would reset it"),  # one factor rests
        ("lora", {"r": 4}, r"r = 3, the recipe 4: a trained adapter goes on as it is"),
        ("lora", {"targets": ("q_proj",)}, r"adapts .*: set `targets` of the recipe to what is trained"),
    ],
    ids=["lora-ga", "delta-lora", "pissa", "lora-fa", "rank", "targets"],
)
def test_a_trained_adapter_is_never_reset(
    name: str, fields: dict[str, Any], said: str, stage1: Path, tmp_path: Path
) -> None:
    trainer = sft(tmp_path, None, model=loaded(stage1))
    before = factors(trainer.model)
    with pytest.raises(LoralignError, match=said):
        attach(trainer, recipe(name, **fields))
    assert all(torch.equal(p, before[n]) for n, p in factors(trainer.model).items())
    assert len(sites(trainer.model)) == 14


def test_a_second_stage_resumes(stage1: Path, tmp_path: Path) -> None:
    made = recipe()
    whole = sft(tmp_path / "a", None, model=loaded(stage1), max_steps=3)
    attach(whole, made)
    whole.train()
    part = sft(tmp_path / "b", None, model=loaded(stage1), max_steps=3, save_strategy="steps", save_steps=2)
    attach(part, made)
    part.train()
    rest = sft(tmp_path / "b", None, model=loaded(stage1), max_steps=3, save_strategy="steps", save_steps=2)
    attach(rest, made, resume_from=tmp_path / "b" / "checkpoint-2")
    rest.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    want = factors(whole.model)
    assert all(torch.equal(p, want[n]) for n, p in factors(rest.model).items())
