"""`plan --gpus N [--fsdp]`: the memory of one GPU, part by part, from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_world import assert_one_sentence, run, world_in
from loralign import Recipe, build
from loralign.plan.memory import Estimate, estimate
from loralign.plan.several import Layout
from loralign.plan.trace import Step
from toy import llama

STEP = Step(2, 16, bf16=True)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 32}


@cache
def planned(name: str, layout: Layout, step: Step = STEP, **options: Any) -> Estimate:
    with torch.device("meta"):
        base = llama(**SIZES).to(torch.bfloat16)
    return estimate(base, build(name, options, r=8) if name != "full" else build(name), step, layout=layout)


def block_numbers() -> tuple[int, int, int]:
    """Of one decoder block, of the embedding, of the head with its norm."""
    with torch.device("meta"):
        base = llama(**SIZES)
    block = sum(p.numel() for p in base.model.layers[0].parameters())
    ends = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert ends[0] is not ends[1]
    return block, ends[0].numel(), ends[1].numel() + base.model.norm.weight.numel()


def test_fsdp_holds_shares_and_two_blocks() -> None:
    one, two, many = (planned("lora", Layout(n, sharded=n > 1)) for n in (1, 2, 8))
    block, _, tail = block_numbers()
    adapter = one.trainable // 4
    assert two.gathered_bytes == many.gathered_bytes == 2 * (2 * (block + adapter) + tail)
    assert many.weights_bytes - one.weights_bytes / 8 < 0.02 * one.weights_bytes, "but for the buffers of rotations"
    assert (two.adapter_bytes, many.adapter_bytes) == (one.adapter_bytes // 2, one.adapter_bytes // 8)
    assert (two.optimizer_bytes, many.optimizer_bytes) == (one.optimizer_bytes // 2, one.optimizer_bytes // 8)
    assert many.peak_bytes == (
        many.weights_bytes + many.adapter_bytes + many.optimizer_bytes + many.gathered_bytes + many.activation_bytes
    )


def test_what_is_stepped_in_pairs_keeps_its_state_whole() -> None:
    one, eight = planned("lora-rite", Layout()), planned("lora-rite", Layout(8, sharded=True))
    assert eight.optimizer_bytes == one.optimizer_bytes


def test_a_step_in_pairs_gathers_the_gradients_and_holds_its_own_share() -> None:
    """Where it is the fullest moment: what it takes alone, the gradients whole once more, and the shares."""
    made = build("lora-pro", r=32)
    assert isinstance(made, Recipe)
    with torch.device("meta"):
        base = llama(**SIZES).to(torch.bfloat16)
    found = estimate(base, made, Step(1, 2, bf16=True), layout=Layout(8, sharded=True))
    gradients = 4 * found.trainable
    alone = int((2 + made.transform.facts.transient) * gradients)
    held = found.weights_bytes + found.adapter_bytes + found.optimizer_bytes
    assert alone > found.gathered_bytes + found.activation_bytes
    assert found.peak_bytes == held + alone + gradients + gradients // 8


def test_frozen_slots_are_on_every_gpu() -> None:
    plain, twin = (planned(name, Layout(8, sharded=True)) for name in ("lora", "pissa"))
    assert twin.adapter_bytes - plain.adapter_bytes == 4 * plain.trainable


def test_summed_gradients_are_whole() -> None:
    once, summed = (planned("lora", Layout(8, sharded=True), Step(2, 16, n, bf16=True)) for n in (1, 4))
    gradients = 4 * once.trainable
    assert summed.activation_bytes - once.activation_bytes == gradients - gradients // 8


def test_ddp_holds_everything_and_the_gradients_twice() -> None:
    one, eight = (planned("lora", Layout(n), Step(2, 16, 4, bf16=True)) for n in (1, 8))
    assert eight.peak_bytes - one.peak_bytes == 4 * one.trainable
    assert eight.weights_bytes == one.weights_bytes


def test_a_gpu_keeps_the_last_steps_factors() -> None:
    """As `RecipeCallback` decides it, whatever rules there are."""
    gpu = Step(2, 16, bf16=True, device="cuda")
    for name, layout, copies in (("lora", Layout(), 1), ("lora", Layout(8), 1), ("lora", Layout(8, sharded=True), 0),
                                 ("adalora", Layout(), 1)):  # fmt: skip
        here, there = planned(name, layout), planned(name, layout, gpu)
        assert there.optimizer_bytes - here.optimizer_bytes == copies * 4 * here.trainable, (name, layout)
        held = there.weights_bytes + there.adapter_bytes + there.optimizer_bytes + there.activation_bytes
        assert there.peak_bytes >= held


def test_full_fine_tuning_splits_its_masters_and_gathers_halves() -> None:
    one, eight = planned("full", Layout()), planned("full", Layout(8, sharded=True))
    block, _, tail = block_numbers()
    assert eight.gathered_bytes == 2 * (2 * block + tail)
    assert eight.optimizer_bytes == one.optimizer_bytes // 8 == one.trainable
    assert eight.weights_bytes < one.weights_bytes / 7
    with torch.device("meta"):
        numbers = sum(p.numel() for p in llama(**SIZES).parameters())
    assert eight.weights_bytes * 8 == pytest.approx(2 * numbers + 2 * one.trainable, rel=0.02)  # masters in fp32
    held = eight.weights_bytes + eight.optimizer_bytes + eight.gathered_bytes
    assert eight.peak_bytes == held + eight.activation_bytes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("several")) as root:
        yield root


def test_the_command_says_whose_memory_it_is(world: Path) -> None:
    words = ("plan", "r.yaml", "--set", "method=lora", "--set", "options={}", "--gpus", 8)
    done, told = run(*words, "--fsdp"), run(*words, "--fsdp", "--json")
    assert done.code == 0, done.err
    assert "each GPU, FSDP2" in done.out
    assert "gathered blocks" in done.out
    assert "rows on each of 8 GPUs" in done.out
    assert json.loads(told.out)["layout"] == {"gpus": 8, "sharded": True}
    assert "each GPU, DDP" in run(*words).out


def test_what_cannot_be_split_is_refused(world: Path) -> None:
    alone = run("plan", "r.yaml", "--fsdp")
    assert alone.code == 2
    assert "say how many with `--gpus`" in assert_one_sentence(alone)
    layers = run("plan", "r.yaml", "--set", "method=reslora", "--set", "options={}", "--gpus", 2, "--fsdp")
    assert layers.code == 2
    assert "FSDP2" in assert_one_sentence(layers)
