"""Full fine-tuning by `loralign train`: fp32 masters of what trains, the reference's own optimizer, one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toy
from cli_world import assert_one_sentence, run, world_in
from loralign import build
from loralign.carrier.masters import masters, rounded
from loralign.methods.reference import muon, state_over_numbers
from loralign.plan.memory import estimate
from loralign.plan.trace import Step
from loralign.types import Full

FULL = ("method=full", "options={}", "rank=null", "train.learning_rate=1e-3", "train.precision=bf16")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("reference")) as root:
        yield root


def train(*overrides: str) -> Any:
    return run("train", "r.yaml", *(word for o in (*FULL, *overrides) for word in ("--set", o)))


def steps(model: Any, count: int, lr: float) -> None:
    """Steps of size lr in one direction, as Adam makes them of a steady gradient."""
    for _ in range(count):
        for p in model.parameters():
            if p.requires_grad:
                p.data.sub_(lr * torch.ones_like(p))


def test_updates_below_the_resolution_of_bf16_are_not_lost() -> None:
    reference = Full()
    model, plain = (toy.llama().to(torch.bfloat16) for _ in range(2))
    layer, other = (m.get_submodule("model.layers.0.mlp.up_proj").weight for m in (model, plain))
    start = layer.detach().clone()
    before = masters(model, reference)
    assert layer.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16, "what rests stays as it is"
    count, lr = 200, 1e-5  # the distance between two bf16 at 0.1 is 5e-4
    steps(model, count, lr)
    other.data.copy_(start)
    for _ in range(count):
        other.data.sub_(lr)
    rounded(model, reference, before)
    moved = float((start.float() - layer.detach().float()).mean())
    assert layer.dtype == torch.bfloat16
    assert moved == pytest.approx(count * lr, rel=0.05)
    assert float((start.float() - other.detach().float()).mean()) < 0.5 * count * lr, "bf16 itself loses most of it"


def test_a_run_in_bf16_keeps_masters_in_its_checkpoints_and_rounds_once(world: Path) -> None:
    done = train("output=full")
    assert done.code == 0, done.err
    saved = load_file("full/checkpoints/checkpoint-6/model.safetensors")
    final, base = load_file("full/model.safetensors"), load_file("base/model.safetensors")
    trained = [k for k in final if "_proj" in k]
    assert len(trained) == 14
    for key in trained:
        assert (saved[key].dtype, final[key].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(saved[key].bfloat16(), final[key])
        assert not torch.equal(final[key], base[key].bfloat16())
    assert all(torch.equal(v, base[k].bfloat16()) for k, v in final.items() if k not in trained)


def test_full_muon_trains_with_muon(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    made = torch.optim.Muon.step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.param_groups[0]["lr"])
        return made(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Muon, "step", noted)
    assert train("method=full-muon", "output=muon", "train.steps=2").code == 0
    assert len(asked) == 2
    refused = train("method=full-muon", "output=no", "train.extra={adam_beta1: 0.8}")
    assert refused.code == 2
    assert "`train.extra.adam_beta1` would not count" in assert_one_sentence(refused)


def test_liger_without_its_package_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralign.train.arguments.is_liger_kernel_available", lambda: False)
    done = train("method=lora", "output=no", "train.extra={use_liger_kernel: true}")
    assert done.code == 2
    assert "`train.extra.use_liger_kernel` needs the package liger-kernel" in assert_one_sentence(done)


def test_deepspeed_by_accelerate_is_refused_before_anything_is_read(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate launch` tells its processes; its package need not be there."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    done = train("method=lora", "output=no")
    assert done.code == 2
    assert "set distributed_type: MULTI_GPU in its config, or start with torchrun" in assert_one_sentence(done)


def test_plan_counts_masters_and_the_optimizer_that_there_is() -> None:
    numbers, sizes = 0, {}
    for name in ("full", "full-muon"):
        with torch.device("meta"):
            base = toy.llama().to(torch.bfloat16)
        reference = build(name)
        assert isinstance(reference, Full)
        half = sum(p.numel() * 2 for p in base.parameters())
        found = estimate(base, reference, Step(2, 16, bf16=True))
        numbers, sizes[name] = found.trainable, found.optimizer_bytes
        assert found.weights_bytes - half == pytest.approx(2 * numbers, rel=0.01), "two bytes more for what trains"
        assert found.peak_bytes >= found.weights_bytes + found.optimizer_bytes + 4 * numbers
    assert sizes == {"full": 8 * numbers, "full-muon": 4 * numbers}
    assert (state_over_numbers(None), state_over_numbers(muon)) == (2.0, 1.0)
