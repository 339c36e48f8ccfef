"""Wrong arguments and a wrong order of calls in Python: one sentence that names the mend, or it works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import loralign
from loralign import LoralignError, Recipe, adapt, attach, build, drive, export, factors, optimizer, peft_config, verify
from tiny_trl import settings, texts, tokenizer
from toy import batches_for, bert, llama

LONGEST = 300


def made(name: str = "lora", options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    recipe = build(name, options, **{"r": 2, **fields})
    assert isinstance(recipe, Recipe)
    return recipe


def told(call: Callable[[], object], *words: str) -> None:
    """The call is refused in one sentence that holds the words."""
    with pytest.raises(LoralignError) as caught:
        call()
    text = str(caught.value)
    assert len(text) < LONGEST and "\n" not in text, text
    assert not [word for word in words if word not in text], text


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a rank": ({"r": "8"}, "r must be a whole number"),
    "half a rank": ({"r": 8.0}, "r must be a whole number"),
    "truth for a rank": ({"r": True}, "r must be a whole number"),
    "no rank": ({"r": 0}, "r must be at least 1"),
    "alpha": ({"alpha": float("nan")}, "alpha must be a finite number"),
    "no scale": ({"alpha": 0}, "alpha must be at least"),
    "dropout": ({"dropout": 1}, "dropout must be at least 0 and below 1"),
    "seed": ({"seed": -1}, "seed must be at least 0"),
    "decay": ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    "clip": ({"max_grad_norm": -1}, "max_grad_norm must be at least 0"),
    "targets": ({"targets": 3}, "targets must be a list of endings"),
    "one ending": ({"exclude": "lm_head"}, "exclude must be a list of endings"),
    "ranks": ({"ranks": ["q_proj"]}, "ranks must be a dictionary"),
    "half a rank by name": ({"ranks": {"q_proj": 1.5}}, "ranks['q_proj'] must be a whole number"),
    "PEFT's name": ({"target_modules": ["q_proj"]}, "it is `targets` here"),
    "another's name": ({"lr": 1e-3}, "learning rates go to loralign.optimizer"),
    "nearly a name": ({"dropot": 0.1}, "did you mean 'dropout'?"),
    "an option": ({"gamma": 16}, "it is an option of lora-ga: build('lora-ga', {'gamma': …})"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_recipe_cannot_be_built_of_these(name: str) -> None:
    fields, said = FIELDS[name]
    told(lambda: build("lora-ga", **fields), said)


def test_full_takes_the_same_fields() -> None:
    told(lambda: build("full", rank=8), "it is `r` here")
    told(lambda: build("full", seed="x"), "seed must be")


def test_the_name_and_the_options_of_a_recipe() -> None:
    told(lambda: build(["lora-ga", "lora-pro"]), "takes a method's name")  # type: ignore[arg-type]
    told(lambda: build("lora-ga", [16]), "takes options as a dictionary")  # type: ignore[arg-type]
    told(lambda: build("nothing-like-it"), "unknown method", "`loralign methods` lists all")


def test_lists_and_numbers_of_numpy_are_as_good() -> None:
    plain = build("lora", r=4, alpha=8.0, targets=("q_proj",), exclude=(), ranks={"q_proj": 2}, seed=3)
    same = {"r": np.int64(4), "alpha": np.float32(8), "targets": ["q_proj"], "exclude": [], "seed": np.int32(3)}
    recipe = build("lora", **same, ranks={"q_proj": np.int64(2)})
    assert recipe == plain
    assert isinstance(recipe, Recipe) and type(recipe.r) is int and type(recipe.ranks["q_proj"]) is int


ORDER: dict[str, tuple[Callable[[], object], str]] = {
    "recipe first": (lambda: adapt(made(), llama()), "takes a loaded model as `model`"),  # type: ignore[arg-type]
    "names": (lambda: adapt("org/model", made()), "not 'org/model'; it is called as adapt(model, recipe"),  # type: ignore[arg-type]
    "a method's name": (lambda: adapt(llama(), "lora"), "a recipe, made by loralign.build(…), as `recipe`"),  # type: ignore[arg-type]
    "full": (lambda: adapt(llama(), build("full")), "has no adapter"),  # type: ignore[arg-type]
    "model first": (lambda: peft_config(llama(), made()), "as `recipe`, not a Llama"),  # type: ignore[arg-type]
    "no adapter": (lambda: optimizer(llama(), made(), 1e-3), "takes an adapted model"),  # type: ignore[arg-type]
    "text for a rate": (lambda: optimizer(adapt(llama(), made()), made(), "1e-3"), "as `lr`, not '1e-3'"),  # type: ignore[arg-type]
    "a rate below 0": (lambda: optimizer(adapt(llama(), made()), made(), -1.0), "takes a number at least 0"),
    "rate of a head": (
        lambda: optimizer(adapt(bert(), made()), made(), 1e-3, rest_lr=float("nan")),
        "takes a finite number at least 0 and at most 1e+30 as `rest_lr`, not nan",
    ),
    "nothing to export": (lambda: export(llama(), "out"), "takes an adapted model"),  # type: ignore[arg-type]
    "no folder": (lambda: export(adapt(llama(), made()), None), "takes a path as `out`, not None"),  # type: ignore[arg-type]
    "profile": (lambda: export(adapt(llama(), made()), "x", profile="vllm"), "one of peft, portable"),  # type: ignore[arg-type]
    "dtype": (lambda: export(adapt(llama(), made()), "x", dtype="bf16"), "torch.bfloat16 as `dtype`"),  # type: ignore[arg-type]
    "whole numbers": (lambda: export(adapt(llama(), made()), "x", dtype=torch.int8), "not as torch.int8"),
    "tokenizer": (lambda: export(adapt(llama(), made()), "x", tokenizer="base"), "a loaded tokenizer, not 'base'"),
    "verify": (lambda: verify(llama()), "takes a path as `folder`"),  # type: ignore[arg-type]
    "factors": (lambda: factors(adapt(llama(), made())), "one of loralign.sites(model)"),  # type: ignore[arg-type]
    "rate": (lambda: loralign.learning_rate("lora", 0.0, 64), "as `s`, not 0.0"),
    "compile": (lambda: loralign.compile("model"), "takes a loaded model"),  # type: ignore[arg-type]
    "attach a model": (lambda: attach(adapt(llama(), made()), made()), "use adapt()"),
}


@pytest.mark.parametrize("name", ORDER)
def test_what_does_not_belong_there_is_named(name: str) -> None:
    told(*ORDER[name])


def test_a_missing_argument_is_pythons_to_name() -> None:
    with pytest.raises(TypeError, match=r"optimizer\(\) missing 1 required positional argument: 'lr'"):
        optimizer(adapt(llama(), made()), made())  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------------ evidence, model


def ga() -> Recipe:
    return made("lora-ga", {"micro_batches": 1})


BATCHES: dict[str, tuple[Any, Any, str]] = {
    "one batch": (lambda b: b[0], None, "takes a list of batches"),
    "tensors": (lambda b: [x["input_ids"] for x in b], None, "a batch is a dictionary"),
    "no labels": (lambda b: [{"input_ids": x["input_ids"]} for x in b], None, "give the batches `labels`"),
    "logits": (lambda b: b, lambda m, x: m(**x).logits, "must return one number as a tensor"),
    "a float": (lambda b: b, lambda m, x: 3.0, "must return one number as a tensor"),
    "detached": (lambda b: b, lambda m, x: m(**x).loss.detach(), "without detach()"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_and_losses_that_evidence_cannot_use(name: str) -> None:
    change, loss, said = BATCHES[name]
    model = llama()
    batches = change(batches_for(model, 1))
    told(lambda: adapt(model, ga(), batches, **({"loss": loss} if loss else {})), said)


def test_evidence_needs_no_grad_mode_of_its_caller(tmp_path: Path) -> None:
    with torch.no_grad():
        model = adapt(llama(), ga(), batches_for(llama(), 1), cache=str(tmp_path / "kept"))  # type: ignore[arg-type]
    again = adapt(llama(), ga(), batches_for(llama(), 1))
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and list((tmp_path / "kept").glob("evidence-*"))


def test_a_cache_that_cannot_be_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    seen: list[str] = []
    told(
        lambda: adapt(
            llama(), ga(), batches_for(llama(), 1), cache=tmp_path / "file", progress=lambda what, *_: seen.append(what)
        ),
        "is a file: name another folder",
    )
    assert not seen


def test_models_without_values_and_tensors_that_never_train() -> None:
    with torch.device("meta"):
        empty = llama()
    told(lambda: adapt(empty, made()), "device meta")
    with torch.inference_mode():
        told(lambda: adapt(llama(), made()), "inference_mode")


# ------------------------------------------------------------------------------------------- another recipe, no driver


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (made(r=4), "has rank 2, the recipe 4"),
        (made(alpha=8), "has the scale 16, the recipe 4"),
        (made("sora"), "has the form Plain, sora Gated"),
    ],
)
def test_the_optimizer_of_another_recipe(other: Recipe, said: str) -> None:
    model = adapt(llama(), made())
    told(lambda: optimizer(model, other, 1e-3), said, "pass the recipe that the model was adapted with")


def test_the_same_recipe_built_anew_is_no_other_one() -> None:
    model = adapt(llama(), made("beamlora"))
    opt = optimizer(model, made("beamlora"), 1e-3)
    drive(model, made("beamlora"), opt, 50)


def step(model: Any, opt: Any, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("name", ["chain-of-lora", "sora"])
def test_what_acts_between_steps_needs_its_driver(name: str) -> None:
    recipe, model = made(name), llama()
    model = adapt(model, recipe)
    batch = batches_for(model, 1)[0]
    opt = optimizer(model, recipe, 1e-3)
    step(model, opt, batch)
    told(lambda: step(model, opt, batch), "build `driver = loralign.drive(")
    opt = optimizer(model, recipe, 1e-3)
    driver = drive(model, recipe, opt, 2)
    told(lambda: drive(model, recipe, opt, 2), "has a driver already")
    step(model, opt, batch)
    told(lambda: step(model, opt, batch), "did not hear of the last step")
    driver.after_step()
    step(model, opt, batch)
    driver.after_step()
    step(model, opt, batch)
    told(driver.after_step, "the run was to have 2 steps")


def test_a_driver_of_another_recipe() -> None:
    recipe = made()
    model = adapt(llama(), recipe)
    told(lambda: drive(model, made("sora"), optimizer(model, recipe, 1e-3), 9), "other rules than sora")
    told(lambda: drive(model, made("lora-pro"), optimizer(model, recipe, 1e-3), 9), "other transform than lora-pro")
    told(lambda: drive(model, recipe, optimizer(model, recipe, 1e-3), 0), "as `total_steps`, not 0")


# ------------------------------------------------------------------------------------------------------------- trainers


def sft(recipe: Recipe, folder: Path, config: Any = None, **changes: Any) -> SFTTrainer:
    model = llama()
    return SFTTrainer(
        model,
        args=SFTConfig(**settings(folder, **changes)),
        train_dataset=texts(8),
        processing_class=tokenizer(),
        peft_config=config or peft_config(recipe, model),
    )


def test_a_trainer_that_makes_its_model_anew_is_refused(tmp_path: Path) -> None:
    """`train()` would train another model than the one whose start was written."""
    trainer = Trainer(
        model_init=lambda: adapt(llama(), made()),
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[]),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
    )
    told(lambda: attach(trainer, made()), "`model_init` makes another one")


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    trainer = sft(made(), tmp_path, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    told(lambda: attach(trainer, made()), "is no LoRA (PromptTuningConfig)")


def test_what_attach_is_given(tmp_path: Path) -> None:
    trainer = sft(made(), tmp_path)
    told(lambda: attach(trainer, "lora"), "as `recipe`, not 'lora'")  # type: ignore[arg-type]
    told(lambda: attach(trainer, made(), resume_from=True), "takes a path as `resume_from`")  # type: ignore[arg-type]
    told(lambda: attach(trainer, made(), compile="on"), "one of auto, off")  # type: ignore[arg-type]
    told(lambda: attach(trainer, made(), rows=[]), "a function as `rows`")  # type: ignore[arg-type]
    told(lambda: attach(trainer, made(), validation="rows"), "list of batches")  # type: ignore[arg-type]


def test_a_checkpoint_is_resumed_by_its_own_recipe_alone(tmp_path: Path) -> None:
    """The start is not repeated, so another seed or start is no other recipe."""
    began = made("lora-plus", {"ratio": 4.0})
    trainer = sft(began, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    attach(trainer, began)
    trainer.train()
    point = tmp_path / "checkpoint-1"

    def resumed(recipe: Recipe, folder: Path = point) -> None:
        attach(sft(recipe, tmp_path), recipe, resume_from=folder)

    told(lambda: resumed(made("lora-plus", {"ratio": 16.0})), "`transform.lr_ratio` 4.0, this one has 16.0")
    told(lambda: resumed(made("lora-plus", {"ratio": 4.0}, alpha=8.0)), "`alpha` the default, this one has 8.0")
    told(lambda: resumed(made("lora-plus", {"ratio": 4.0}, weight_decay=0.1)), "`weight_decay` the default")
    told(lambda: resumed(made()), "is of lora-plus, not of lora")
    told(lambda: resumed(began, tmp_path), "the last one in it is checkpoint-1")
    resumed(made("lora-plus", {"ratio": 4.0}, seed=5))


def test_a_second_run_of_what_is_timed_by_steps_is_refused(tmp_path: Path) -> None:
    """The snapshot of `delta-lora` was not taken in it."""
    recipe = made("delta-lora", {"wait_steps": 1})
    trainer = sft(recipe, tmp_path, max_steps=3)
    attach(trainer, recipe)
    trainer.train()
    told(trainer.train, "has trained already", "build a new trainer for another one")
