"""`attach` on TRL's SFTTrainer and DPOTrainer and on the Trainer: what it makes of a run, and what it refuses."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

import toy
from loralign import LoralignError, Recipe, build, optimizer, peft_config, sites
from loralign.train.attach import attach
from loralign.train.checkpoint import NOTE, numbered
from loralign.train.split import check_split
from loralign.train.undisturbed import same_randomness
from loralign.types import Full, WorkFailed
from tiny_trl import dpo, settings, sft
from trainers import rows, toy_trainer

TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo}
METHODS = ("lora", "lora-ga", "pissa")


def recipe(name: str = "lora", **fields: Any) -> Recipe:
    made = build(name, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Watch(TrainerCallback):
    """Calls `look` after every optimizer step."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look()


# ------------------------------------------------------------------------------------------------------ TRL's trainers


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_trainers_train(kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe(name, max_grad_norm=0.1)
    trainer = TRAINERS[kind](tmp_path, peft_config(made, toy.llama()), logging_steps=1)
    callback = attach(trainer, made)
    live = {f"{s.name}.lora_{f}.default.weight" for s in sites(trainer.model) for f in "AB"}
    assert {n.removeprefix("base_model.model.") for n in trained(trainer.model)} == live  # the live factors, no more
    before = trained(trainer.model)
    with caplog.at_level(logging.INFO, "loralign"):
        trainer.train()
    after = trained(trainer.model)
    assert f"{name}: applied to 14/14 pairs" in caplog.text and not callback.unreached
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert trainer.args.max_grad_norm == 0  # ours clips; the norm before clipping is logged
    assert trainer.args.ddp_broadcast_buffers is False  # constants are the same everywhere, and change at knots only
    norms = [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h]
    assert len(norms) == 3 and min(norms) > 0.1
    assert norms[-1] == pytest.approx(callback.optimizer.grad_norm, rel=1e-5)
    base, plain = trainer.model.get_base_model().state_dict(), toy.llama().state_dict()
    assert all(torch.equal(base[n], w) for n, w in plain.items() if n in base)


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_of_dpo_is_the_base_model(name: str, tmp_path: Path) -> None:
    """TRL's own reference log-probabilities (adapter disabled) equal those of a separate base model, bit by bit."""
    made = recipe(name)
    trainer = dpo(tmp_path, peft_config(made, toy.llama()))
    attach(trainer, made)
    other = dpo(tmp_path, peft_config(made, toy.llama()), ref_model=toy.llama())
    batch = next(iter(other.get_train_dataloader()))
    base = other.compute_ref_log_probs(other.ref_model, dict(batch))
    seen: list[tuple[Tensor, Tensor]] = []
    trainer.add_callback(Watch(lambda: seen.append(trainer.compute_ref_log_probs(trainer.model, dict(batch)))))
    trainer.train()
    assert len(seen) == 3
    assert all(torch.equal(a, b) for step in seen for a, b in zip(step, base, strict=True))
    rewards = [h["rewards/chosen"] for h in trainer.state.log_history if "rewards/chosen" in h]
    assert rewards[0] == 0.0 and rewards[-1] != 0.0  # policy = reference at the start, exactly


@pytest.mark.parametrize("kind", TRAINERS)
def test_evidence_changes_neither_randomness_nor_metrics(kind: str, tmp_path: Path) -> None:
    """Same batches, same dropout and the same counts in the log, with gradient evidence and without."""
    runs = {}
    for name in ("lora", "lora-ga"):
        made = recipe(name)
        trainer = TRAINERS[kind](tmp_path, peft_config(made, toy.llama()), toy.llama(attention_dropout=0.1))
        state, running = torch.get_rng_state(), trainer.accelerator.gradient_state.dataloader_references
        attach(trainer, made)
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.accelerator.gradient_state.dataloader_references == running
        batches: list[Tensor] = []
        compute = trainer.compute_loss

        def spy(model: Any, inputs: Any, compute: Any = compute, batches: Any = batches, **kw: Any) -> Any:
            batches.append(inputs["input_ids"].clone())
            return compute(model, inputs, **kw)

        trainer.compute_loss = spy
        trainer.train()
        runs[name] = batches, [h["num_tokens"] for h in trainer.state.log_history if "num_tokens" in h]
    assert all(torch.equal(a, b) for a, b in zip(runs["lora"][0], runs["lora-ga"][0], strict=True))
    assert runs["lora"][1] == runs["lora-ga"][1]


def test_what_is_drawn_beside_a_run_leaves_every_generator_as_it_was() -> None:
    draws = (random.random, np.random.rand, lambda: float(torch.rand(())))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = [draw() for draw in draws]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(ValueError, match="in the middle"), same_randomness():
        for draw in draws:
            draw()
        raise ValueError("in the middle")
    assert [draw() for draw in draws] == wanted


@pytest.mark.parametrize("kind", TRAINERS)
def test_judging_by_validation_rows_changes_neither_randomness_nor_metrics(kind: str, tmp_path: Path) -> None:
    """allocating-lora's forwards go through the trainer's own loss, whose averages the next evaluation would log."""
    runs = {}
    for name in ("lora", "allocating-lora"):
        made = build(name, {"rounds": 1, "scored": 4} if name != "lora" else {}, r=3, alpha=6.0, seed=11)
        assert isinstance(made, Recipe)
        trainer = TRAINERS[kind](tmp_path, peft_config(made, toy.llama()), toy.llama(attention_dropout=0.1))
        judges = [next(iter(trainer.get_train_dataloader()))] if name != "lora" else None
        attach(trainer, made, validation=judges)
        batches: list[Tensor] = []
        judged: list[bool] = []
        compute = trainer.compute_loss

        def spy(model: Any, inputs: Any, compute: Any = compute, seen: Any = (batches, judged), **kw: Any) -> Any:
            seen[0 if model.training else 1].append(inputs["input_ids"].clone() if model.training else True)
            return compute(model, inputs, **kw)

        trainer.compute_loss = spy
        trainer.train()
        assert bool(judged) == (name != "lora")
        assert not any(trainer._metrics["eval"].values())
        runs[name] = batches, [h["num_tokens"] for h in trainer.state.log_history if "num_tokens" in h]
    assert all(torch.equal(a, b) for a, b in zip(runs["lora"][0], runs["allocating-lora"][0], strict=True))
    assert runs["lora"][1] == runs["allocating-lora"][1]


def test_evidence_is_collected_with_gradient_checkpointing(tmp_path: Path) -> None:
    """A trainer told to checkpoint activations does so for evidence too, and the start is the same."""
    starts, forwards = [], []
    for checkpointed in (False, True):
        made = recipe("lora-ga")
        trainer = sft(tmp_path, peft_config(made, toy.llama()), gradient_checkpointing=checkpointed)
        first = next(m for m in trainer.model.modules() if type(m).__name__ == "LlamaAttention")
        calls: list[int] = []
        handle = first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        modes = [m.training for m in trainer.model.modules()]
        attach(trainer, made)
        handle.remove()
        assert [m.training for m in trainer.model.modules()][: len(modes)] == modes
        starts.append({n: p.clone() for n, p in trainer.model.state_dict().items() if "lora_" in n})
        forwards.append(len(calls))
    assert forwards[1] == 2 * forwards[0]  # recomputed once in every backward
    assert all(torch.allclose(starts[0][n], starts[1][n], atol=1e-5) for n in starts[0])


def test_adapters_that_trl_made_bf16_become_fp32(tmp_path: Path) -> None:
    """TRL casts the adapter of a quantised model to bf16; a twin's updates would drown there."""
    made = recipe("lora-ga")
    trainer = sft(tmp_path, peft_config(made, toy.llama()))
    for p in trainer.model.parameters():
        p.data = p.data.to(torch.bfloat16)
    attach(trainer, made)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_ready_peft_model_in_dpo_is_refused(tmp_path: Path) -> None:
    made = recipe()
    ready = get_peft_model(toy.llama(), peft_config(made, toy.llama()))  # type: ignore[arg-type]
    trainer = dpo(tmp_path, None, ready)
    with pytest.raises(LoralignError, match=r'frozen one named "ref".*pass the plain model and peft_config='):
        attach(trainer, made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 4}, r"r = 3, the recipe 4"),
        ({"alpha": 12.0}, r"lora_alpha = 6, the recipe 12"),
        ({"dropout": 0.1}, r"lora_dropout = 0.0, the recipe 0.1"),
        ({"ranks": {"layers.0.self_attn.q_proj": 2}}, r"rank_pattern = "),
        ({"targets": ("q_proj", "v_proj")}, r"adapts model\.layers\.0\.self_attn\.k_proj, the recipe does not"),
        ({"exclude": ("down_proj",)}, r"adapts model\.layers\.0\.mlp\.down_proj, the recipe does not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_config_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, peft_config(recipe(), toy.llama()), steps=1)
    with pytest.raises(LoralignError, match=rf"{said}.*peft_config=loralign.peft_config"):
        attach(trainer, recipe(**change))


def test_a_config_with_fewer_targets_is_refused(tmp_path: Path) -> None:
    config = peft_config(recipe(targets=("q_proj",)), toy.llama())
    with pytest.raises(LoralignError, match=r"leaves out model\.layers\.0\.self_attn\.k_proj, the recipe does not"):
        attach(toy_trainer(tmp_path, config, steps=1), recipe())


@pytest.mark.parametrize("family", ["bert", "vit", "t5", "tied", "gpt2"])
def test_the_recipes_own_config_is_accepted(family: str, tmp_path: Path) -> None:
    """Heads, tied heads and Conv1D do not look like other targets; heads and live factors train, nothing else."""
    model, made = toy.FAMILIES[family](), recipe()
    trainer = toy_trainer(tmp_path, peft_config(made, model), steps=1, model=model)
    attach(trainer, made)
    live = {f"base_model.model.{s.name}.lora_{f}.default.weight" for s in sites(trainer.model) for f in "AB"}
    rest = set(trained(trainer.model)) - live
    assert live <= set(trained(trainer.model)) and all(".modules_to_save.default." in n for n in rest)
    assert bool(rest) == (family in ("bert", "vit"))


def test_other_trainers_are_refused(tmp_path: Path) -> None:
    made = recipe()
    config = peft_config(made, toy.llama())
    trainer = toy_trainer(tmp_path, config, steps=1)
    trainer.model = toy.llama()
    with pytest.raises(LoralignError, match=r"the trainer holds a plain model: build it with peft_config="):
        attach(trainer, made)

    trainer = toy_trainer(tmp_path, config, steps=1)
    attach(trainer, made)
    with pytest.raises(LoralignError, match=r"already attached"):
        attach(trainer, made)
    trainer.train()

    trainer = toy_trainer(tmp_path, config, steps=1)
    trainer.train()
    with pytest.raises(LoralignError, match=r"already has an optimizer: call attach before train\(\)"):
        attach(trainer, made)

    trainer = toy_trainer(tmp_path, config, steps=1)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(LoralignError, match=r"pass no `optimizers`"):
        attach(trainer, made)

    trainer = toy_trainer(tmp_path, config, steps=1)
    trainer.model.add_adapter("second", config)
    with pytest.raises(LoralignError, match=r"expected one adapter named 'default', found \['default', 'second'\]"):
        attach(trainer, made)


def test_a_scheduler_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """It would turn the rate of an optimizer that nobody steps."""
    made = recipe()
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(trainer.model.parameters()))
    with pytest.raises(LoralignError, match=r"pass no `optimizers`"):
        attach(trainer, made)


def test_sharding_that_hides_factors_is_refused(tmp_path: Path) -> None:
    """By what the Trainer and accelerate say of themselves; neither engine is started."""
    made = recipe()
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1)
    trainer.args._n_gpu = 2
    with pytest.raises(LoralignError, match=r"2 GPUs in one process .*torchrun"):
        attach(trainer, made)
    trainer.args._n_gpu, trainer.is_deepspeed_enabled = 0, True
    with pytest.raises(LoralignError, match=r"DeepSpeed replaces the parameter groups.*use FSDP2 or DDP"):
        attach(trainer, made)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    trainer.accelerator = accelerator
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = False, True
    with pytest.raises(LoralignError, match=r"FSDP version 1.*fsdp_version: 2"):
        attach(trainer, made)


@pytest.mark.parametrize(
    ("asked", "best", "why"),
    [
        (Full(), False, "full needs whole weights at its end"),
        (recipe(), True, "put whole weights back"),
        (recipe(), False, ""),
    ],
)
def test_what_fsdp_could_not_end_is_refused_before_it_starts(
    asked: Recipe | Full, best: bool, why: str, tmp_path: Path
) -> None:
    """What the Trainer says of itself is read before anything is spent; runs that are split are in test_resume.py."""
    trainer = toy_trainer(tmp_path, peft_config(recipe(), toy.llama()), steps=1)
    trainer.args.load_best_model_at_end = best
    check_split(trainer, asked)
    trainer.is_fsdp_enabled = True
    if not why:
        return check_split(trainer, asked)
    with pytest.raises(LoralignError, match=why):
        check_split(trainer, asked)


def test_settings_of_the_trainer_that_no_longer_count_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe()
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1, weight_decay=0.1, optim="sgd")
    with caplog.at_level(logging.WARNING, "loralign"):
        attach(trainer, made)
    assert "optim = sgd" in caplog.text and "weight_decay = 0.1" in caplog.text


def test_the_trainer_itself_deletes_no_checkpoint(tmp_path: Path) -> None:
    """It would delete the one before while the last one is not complete; ours goes when it is."""
    made = recipe("lora")
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=4, save_steps=1, save_total_limit=1)
    callback = attach(trainer, made)
    assert trainer.args.save_total_limit is None and callback.keep == 1
    trainer.train()
    assert [p.name for p in numbered(tmp_path)] == ["checkpoint-4"] and (tmp_path / "checkpoint-4" / NOTE).is_file()


def test_resuming_needs_attach_to_know(tmp_path: Path) -> None:
    """`train(resume_from_checkpoint=…)` after an attach without `resume_from` would forget rules and episodes."""
    made = recipe()
    config = peft_config(made, toy.llama())
    trainer = toy_trainer(tmp_path, config, steps=2, save_steps=1)
    attach(trainer, made)
    trainer.train()
    again = toy_trainer(tmp_path, config, steps=2)
    attach(again, made)
    with pytest.raises(LoralignError, match=r"resume_from="):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    third = toy_trainer(tmp_path, config, steps=2)
    attach(third, made, resume_from=tmp_path / "checkpoint-2")
    with pytest.raises(LoralignError, match=r"attached to resume from step 2, but the trainer starts at 1"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ------------------------------------------------------------------------------------------------------------ the loop


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Rows of unequal length: two micro-batches of 2 are one batch of 4."""
    ends = []
    for micro in (4, 2):
        made = recipe("lora-ga", dropout=0.0)
        trainer = sft(
            tmp_path,
            peft_config(made, toy.llama()),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
        )
        attach(trainer, replace(made, init=recipe("pissa").init))  # the same start, whatever the micro-batches
        trainer.train()
        ends.append(trained(trainer.model))
    assert all(torch.allclose(ends[0][n], ends[1][n], rtol=1e-4, atol=1e-6) for n in ends[0])


def test_the_scheduler_turns_our_rates(tmp_path: Path) -> None:
    """Linear from 1e-2 to 0 over four steps; B's rate keeps its ratio to A's."""
    made = recipe()
    made = replace(made, transform=replace(made.transform, lr_ratio=8.0))  # type: ignore[type-var]
    config = peft_config(made, toy.llama())
    trainer = toy_trainer(tmp_path, config, steps=4, lr_scheduler_type="linear")
    callback = attach(trainer, made)
    rates: list[tuple[float, float]] = []
    trainer.add_callback(
        Watch(lambda: rates.append(tuple(g["lr"] for g in callback.optimizer.param_groups)))  # type: ignore[arg-type,union-attr]
    )
    trainer.train()
    assert [a for a, _ in rates] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0.0])
    assert [b for _, b in rates] == pytest.approx([6e-2, 4e-2, 2e-2, 0.0])
    logged = [h["learning_rate"] for h in trainer.state.log_history if "learning_rate" in h]
    assert logged == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


@pytest.mark.parametrize(("late", "save"), [(False, 1), (True, 1), (True, 2)], ids=["at-once", "saved", "next-step"])
@pytest.mark.parametrize(
    ("broken", "name", "options"),
    [
        ("loss", "lora-ga", {}),
        ("gradient", "lora-ga", {}),
        ("loss", "adalora", {"first": 0.1, "last": 0.5}),
        ("loss", "dynamic-rank-lora", {"first": 0.1, "last": 0.3}),
        ("loss", "sora", {"threshold": 1e-3}),
        ("loss", "sora", {"target_rank": 1, "last": 0.4}),
        ("loss", "delta-lora", {"wait_steps": 2}),
        ("loss", "prilora", {"interval": 3}),
    ],
    ids=["loss", "gradient", "scores", "switched", "shrunk", "cut", "frozen", "elements"],
)
def test_a_run_that_is_not_finite_ends_undamaged(
    broken: str, name: str, options: dict[str, Any], late: bool, save: int, tmp_path: Path
) -> None:
    """Rules that act after the step that was not finite change nothing either."""
    made = recipe(name, options=options)
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=4, save_steps=save, logging_steps=9)
    callback = attach(trainer, made)
    # late, as on a GPU: found before the third step is saved, or when the fourth begins
    trainer.add_callback(Watch(lambda: setattr(callback.optimizer.norms, "late", late)))
    compute, kept = trainer.compute_loss, {}

    def loss(model: Any, inputs: Any, **kw: Any) -> Any:
        value = compute(model, inputs, **kw)
        if trainer.state.global_step < 2:
            return value
        kept.update(kept or trained(trainer.model))
        if broken == "loss":
            return value * float("nan")
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
        return value

    trainer.compute_loss = loss  # type: ignore[method-assign]
    with pytest.raises(WorkFailed, match=r"gradient is not finite at step 3 .*lower the learning rate"):
        trainer.train()
    # an event of that step, which waits for the norm
    event = name in ("adalora", "delta-lora", "prilora") or "target_rank" in options
    assert trainer.state.global_step == (3 if late and not event else 2)
    assert all(torch.equal(kept[n], p) for n, p in trained(trainer.model).items())
    assert not callback.optimizer.state  # the moments that saw such a gradient are dropped
    last = numbered(tmp_path)[0]
    assert last.name == "checkpoint-2" and (last / NOTE).is_file()
    PeftModel.from_pretrained(toy.llama(), last)


def test_processes_that_would_train_apart_are_stopped(tmp_path: Path) -> None:
    made = recipe()
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=1)
    callback = attach(trainer, made)
    callback.adopt(optimizer(trainer.model, made, 1e-3))
    args, state = SimpleNamespace(parallel_mode=ParallelMode.DISTRIBUTED), SimpleNamespace(max_steps=1, global_step=0)
    with pytest.raises(WorkFailed, match=r"the processes would train apart.*eval_on_start"):
        callback.on_train_begin(args, state, None)
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    callback.on_train_begin(args, state, None)


def test_a_module_that_the_forward_leaves_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the first step; an expert may be reached later, so it is named at the end where it never was."""
    model, made = toy.llama(), replace(recipe("lora"), targets=("q_proj", "spare"))
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 8, bias=False)
    trainer = toy_trainer(tmp_path, peft_config(made, model), steps=2, model=model)
    attach(trainer, made)
    with pytest.raises(
        WorkFailed, match=r"^1 of 3 adapted modules got no gradient, \S*layers.1.mlp.spare first: .*exclude"
    ):
        trainer.train()
    model = toy.llama()
    model.model.layers[1].expert = torch.nn.ModuleDict({"spare": torch.nn.Linear(32, 8, bias=False)})
    trainer = toy_trainer(tmp_path, peft_config(made, model), steps=2, model=model)
    callback = attach(trainer, made)
    trainer.train()
    name = "model.layers.1.expert.spare"
    assert callback.unreached == {name} and f"1 adapted modules never got a gradient: ['{name}']" in caplog.text


def test_evidence_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    made = recipe("lora-ga")
    model = toy.llama()
    trainer = toy_trainer(tmp_path, peft_config(made, model), steps=1, model=model)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **kw: compute(*a, **kw) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(WorkFailed, match=r"loss of evidence micro-batch 0 is nan"):
        attach(trainer, made)
    assert all(p.grad is None for p in trainer.model.parameters())


class Overflow(TrainerCallback):
    """A loss scale at which gradients overflow at certain steps of the trainer, and an ordinary one at the others."""

    def __init__(self, scaler: torch.amp.GradScaler, at: set[int]) -> None:
        self.scaler, self.at = scaler, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self.scaler.update(3e38)
        elif self.scaler.get_scale() > 1e30:
            self.scaler.update(1024.0)


def test_a_skipped_step_is_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """fp16's scaler skips steps whose gradient overflowed, usually the first ones: no complaint, no event of a rule.

    The real scaler, on the CPU and in fp32. Of eight steps four are skipped: two before the third one that is taken,
    after which the rule copies slots, and the two right after it.
    """
    from test_protocols import stub

    made = stub("copy")
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes its state
    trainer.accelerator.scaler = scaler
    callback = attach(trainer, made)
    steps: list[int] = []
    trainer.add_callback(Overflow(scaler, {0, 2, 5, 6}))
    trainer.add_callback(Watch(lambda: steps.append(callback.optimizer.steps_here)))
    with caplog.at_level(logging.INFO, "loralign"):
        trainer.train()
    assert steps == [0, 1, 1, 2, 3, 3, 3, 4]
    said = [m.removeprefix(f"{made.name}: ") for m in caplog.messages]
    assert [m for m in said if "slots changed" in m] == ["slots changed at 14 sites after step 8"]
    assert [m for m in said if "applied to" in m] == ["applied to 14/14 pairs"]
    assert not callback.unreached


def test_a_copied_slot_starts_with_the_usual_second_moment(tmp_path: Path) -> None:
    """With v = 0 under a late step counter Adam's next updates would be up to 6.6 times the rate; m starts at 0."""
    from test_protocols import stub

    made = stub("copy")  # after step 4 slot 0 of every site becomes slot 1 as it was after step 2
    trainer = toy_trainer(tmp_path, peft_config(made, toy.llama()), steps=4)
    seen: list[dict[str, dict[str, Tensor]]] = []

    def moments() -> None:
        found = {}
        for group in callback.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                state = callback.optimizer.state[p]
                found[f"{name}.{group['role']}"] = {k: state[k].clone() for k in ("exp_avg", "exp_avg_sq")}
        seen.append(found)

    class Stepped(Watch):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.look()

    trainer.add_callback(Stepped(moments))  # before attach: sees the step first, then what the rule left
    callback = attach(trainer, made)
    trainer.train()
    before, after = seen[-2:]
    assert len(after) == 28
    for key, was in before.items():
        m, v = (after[key][k] if key.endswith("A") else after[key][k].T for k in ("exp_avg", "exp_avg_sq"))
        old = was["exp_avg_sq"] if key.endswith("A") else was["exp_avg_sq"].T
        assert not m[0].any() and m[1].any()
        assert torch.equal(v[0], old[1:].mean(dim=0)) and torch.equal(v[1:], old[1:]) and v[0].any()


@pytest.mark.parametrize("name", ["lora-ga", "gated"])
def test_the_best_checkpoint_comes_back_at_the_end(name: str, tmp_path: Path) -> None:
    """`load_best_model_at_end` restores live and frozen slots, and what a form folds."""
    from test_protocols import stub

    made = stub("gated") if name == "gated" else recipe(name)
    args = {**settings(tmp_path), "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_wanted", "greater_is_better": True}
    model: Any = get_peft_model(toy.llama(), peft_config(made, toy.llama()))  # type: ignore[arg-type]
    trainer = Trainer(model, TrainingArguments(**args, **best), train_dataset=rows(), eval_dataset=rows(4))  # type: ignore[arg-type]
    attach(trainer, made)
    evaluate = trainer.evaluate
    ends: list[Tensor] = []

    def judged(*args: Any, **kwargs: Any) -> dict[str, float]:
        ends.append(logits(trainer.model))
        return {**evaluate(*args, **kwargs), "eval_wanted": -abs(trainer.state.global_step - 1.0)}

    trainer.evaluate = judged  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert torch.equal(logits(trainer.model), ends[0]) and not torch.equal(ends[0], ends[-1])


def logits(model: Any) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**toy.batch_for(model)).logits
    model.train(training)
    return out
