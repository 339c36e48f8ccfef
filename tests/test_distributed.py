"""Two processes (gloo, CPU) equal one, in float64 after three steps: DDP and FSDP2, all transforms and rules, twins.

One pair of processes runs all cases; each case is a tiny tanh network of two blocks whose ranks do not divide by two.
Then the Trainer's way: `attach` under data parallelism, evidence, slot events and checkpoints included, in float32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import toy
import warm
from loralign import Recipe, adapt, build, factors, optimizer, peft_config, sites
from loralign.carrier.slot import live_of, trained_of, whole
from loralign.optim.pairs import PairOptimizer
from loralign.train.attach import attach
from loralign.train.driver import drive
from loralign.train.events import apply_plan
from loralign.train.stage import Stage
from loralign.train.task_rows import Task
from loralign.train.task_trainer import TaskTraining
from loralign.train.tasks import run_tasks
from loralign.types import Elements, LoralignError, WorkFailed, ZeroWhere
from trainers import toy_trainer

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora-plus": ("lora-plus", {"ratio": 4.0}),
    "lora-pro": ("lora-pro", {}),
    "lora-pro full": ("lora-pro", {"moments": "full"}),
    "lora-rite": ("lora-rite", {}),
    "riemannian": ("riemannian", {}),
    "lora-fa": ("lora-fa", {}),
    "muon-factors": ("muon-factors", {}),
    "stateless": ("spectral", {"momentum": 0.0}),
    "rm-lora": ("rm-lora", {}),
    "rm-lora update": ("rm-lora", {"mask_target": "update"}),
    "delta-lora": ("delta-lora", {"wait_steps": 0}),
    "sbora-fa": ("sbora-fa", {}),
    "sbora-fb": ("sbora-fb", {"place": 1}),
    "reslora": ("reslora", {}),
    "prolora": ("prolora", {"share_A": 3, "share_B": 2}),
    "rm-lora + lora-rite": ("rm-lora + lora-rite", {}),
    "adalora": ("adalora", {}),
    "dynamic-rank-lora": ("dynamic-rank-lora", {"last": 0.3}),
    "sora": ("sora", {"threshold": 0.5}),
    "beamlora": ("beamlora", {"interval": 1, "keep": 0.5, "until": 2.0}),
    "prilora": ("prilora", {"interval": 2}),
    "lora-ga": ("lora-ga", {"micro_batches": 1}),
    "lora-ga + lora-pro": ("lora-ga + lora-pro", {"micro_batches": 1}),
    "lora-ga + lora-rite": ("lora-ga + lora-rite", {"micro_batches": 1}),
}
TRAINERS: dict[str, dict[str, Any]] = {
    "lora-ga + lora-rite": {"micro_batches": 2},
    "rm-lora + lora-pro": {},
    "delta-lora": {"wait_steps": 1},
    "rac-lora": {"links": 3, "frozen": "bernoulli"},
    "lora-ga + chain-of-lora": {"links": 2, "micro_batches": 2},
    "xgblora": {"fraction": 0.5, "link_steps": 1, "keep_slots": 3},
    "sd-lora": {"tasks": 3},
    "allocating-lora": {"rounds": 1, "first": 0.4, "moved": 3, "scored": 7},
}
WIDTH, ROWS, STEPS, PAIRS = 10, 8, 3, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 14), nn.Linear(14, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, ROWS, WIDTH, generator=draw, dtype=torch.float64)
    return {"x": x, "y": y}


def prepared(case: str) -> tuple[Any, Recipe]:
    name, options = CASES[case]
    made = build(name, options, r=3, alpha=6.0, targets=("up", "down"), weight_decay=0.05)
    assert isinstance(made, Recipe)
    made = replace(made, max_grad_norm=made.max_grad_norm and 0.05)  # so that the clip acts
    torch.manual_seed(0)
    model = adapt(Net().double(), made, [batch(-1), batch(-2)], loss=loss_of).double()
    for k, site in enumerate(sites(model)):  # not the special case B = 0
        B = live_of(site.layer, site.adapter).B
        B.data.add_(0.1 * torch.randn(B.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64))
    for p in model.base_model.model.blocks[1].norm.parameters():  # a tensor outside pairs
        p.requires_grad_(True)
    return model, made


def steps(
    model: Any,
    called: Callable[..., Tensor],
    made: Recipe,
    rank: int,
    world: int,
    save: Callable[[Any, PairOptimizer], object] = lambda *_: None,
) -> tuple[Any, list[int]]:
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    stepper = optimizer(model, made, 1e-2)
    driver = drive(model, made, stepper, STEPS)
    applied = []
    for t in range(STEPS):
        save(model, stepper)
        part = {k: v[own] for k, v in batch(t).items()}
        loss_of(called, part).backward()  # type: ignore[arg-type]
        stepper.step()
        applied.append(stepper.applied)
        driver.after_step()
        stepper.zero_grad()
    return stepper, applied


def outcome(model: Any, stepper: PairOptimizer, applied: list[int]) -> dict[str, Any]:
    """Whole tensors by name, frozen slots included; every rank takes part."""
    found = {n: whole(p).detach().clone() for n, p in trainable(model)}
    for site in sites(model):
        live = live_of(site.layer, site.adapter)
        found |= {f"{site.name}.A0": whole(live.A0).double(), f"{site.name}.B0": whole(live.B0).double()}
    return {"tensors": found, "applied": applied, "reached": len(stepper.reached), "norm": stepper.grad_norm}


def trainable(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def alone(case: str) -> dict[str, Any]:
    model, made = prepared(case)
    return outcome(model, *steps(model, model, made, 0, 1))


def with_ddp(case: str, rank: int) -> dict[str, Any]:
    model, made = prepared(case)
    replica = DistributedDataParallel(model, broadcast_buffers=False)
    return outcome(model, *steps(model, replica, made, rank, 2))


def with_fsdp(case: str, rank: int, save: Callable[[Any, PairOptimizer], object] = lambda *_: None) -> dict[str, Any]:
    model, made = prepared(case)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for _, p in trainable(model))
    return outcome(model, *steps(model, model, made, rank, 2, save))


def with_saves(case: str, rank: int) -> dict[str, Any]:
    """As a checkpoint of a split model is written, where torch has missing state made: before the first step too."""
    gathered: list[int] = []

    def save(model: Any, stepper: PairOptimizer) -> None:
        with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gather:
            get_optimizer_state_dict(model, stepper)
        gathered.append(gather.call_count)

    return {**with_fsdp(case, rank, save), "gathered": gathered}


ENGINES: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "ddp": with_ddp, "fsdp2": with_fsdp, "fsdp2 saved": with_saves
}  # fmt: skip
NOT_SHARDED = {"reslora"}
"""Forms that read other layers' factors."""
SAVED = (
    "lora", "lora-pro", "lora-rite", "riemannian", "lora-fa", "muon-factors", "stateless", "sora", "adalora", "lora-ga",
)  # fmt: skip
RUNS = [(case, engine) for case in CASES for engine in ("ddp", "fsdp2") if engine == "ddp" or case not in NOT_SHARDED]
RUNS += [(case, "fsdp2 saved") for case in SAVED]


def with_trainer(name: str, folder: Path, world: int) -> dict[str, Any]:
    made = build(name, TRAINERS[name], r=3, alpha=6.0)
    assert isinstance(made, Recipe)
    config = peft_config(made, toy.llama())
    trainer = toy_trainer(folder, config, steps=STEPS, save_steps=STEPS, per_device_train_batch_size=4 // world)
    judges = [toy.batch_for(toy.llama(), seed=50)] if name == "allocating-lora" else None
    callback = attach(trainer, made, validation=judges)
    forwards: list[None] = []
    trainer.model.register_forward_pre_hook(lambda m, _: None if m.training else forwards.append(None))
    trainer.train()
    assert callback.optimizer is not None and callback.driver is not None
    tensors = {n: p.detach().clone() for n, p in trainer.model.state_dict().items() if "lora_" in n}
    found = {"forwards": len(forwards), "ranks": callback.driver.ranks(), "applied": callback.optimizer.applied}
    return {"tensors": tensors, "as": type(trainer.model_wrapped).__name__, **found}


def with_tasks(folder: Path, world: int) -> dict[str, Any]:
    """Two tasks of two classes and one for the toy BERT, four rows per step."""
    rows = [
        [{"labels": c + (c and 1) + (not c and i % 2), **part} for i, part in enumerate(parts(c))] for c in range(2)
    ]
    tasks = [Task(str(c), rows[c], rows[c][:3]) for c in range(2)]
    made = build("sd-lora", {"tasks": 2}, r=3)
    assert isinstance(made, Recipe)
    training = TaskTraining(1e-2, steps=2, batch_size=4 // world, mask="seen")
    model = toy.bert()
    found = run_tasks(model, made, tasks, training, folder / "tasks", export_moments=False)
    tensors = {n: p.detach().clone() for n, p in model.state_dict().items() if "classifier" in n}
    for site in sites(model):
        A, B = factors(site)
        tensors[site.name] = B @ A
    return {"tensors": tensors, "matrix": found.matrix}


def parts(seed: int) -> list[dict[str, Tensor]]:
    batch = toy.batch_for(toy.bert(), rows=8, seed=seed)
    return [{key: batch[key][i] for key in ("input_ids", "attention_mask")} for i in range(8)]


def replicas(rank: int, folder: Path) -> str:
    """What is said where the second process holds other weights, as `cpu_ram_efficient_loading` leaves them."""
    made = build("pissa", r=3)
    assert isinstance(made, Recipe)
    trainer = toy_trainer(folder, peft_config(made, toy.llama()), steps=1)
    if rank:
        next(iter(sites(trainer.model))).layer.base_layer.weight.data.zero_()
    try:
        attach(trainer, made)
    except LoralignError as error:
        return str(error)
    return ""


def different_masks(rank: int) -> str:
    """What is said where each process would prune other entries."""
    model, made = prepared("prilora")
    masks = {s.name: torch.zeros(live_of(s.layer, s.adapter).A.shape, dtype=torch.bool) for s in sites(model)}
    masks["blocks.1.up"][0, rank] = True
    try:
        apply_plan(Stage(optimizer(model, made, 1e-2), masks, 0, 1), tuple(Elements(n, "A", n) for n in masks))
    except WorkFailed as error:
        return str(error)
    return ""


def gates_off(rank: int) -> list[bool]:
    """Which gates are zero where each process would switch off another slot of every site."""
    model, made = prepared("sora")
    opt = optimizer(model, made, 1e-2)
    masks = {f"off|{st.key}": torch.arange(st.r).eq(rank).repeat(len(st.sites), 1) for st in opt.moment().stacks}
    apply_plan(Stage(opt, masks, 0, 1), (ZeroWhere("gate", "off"),))
    return [zero for s in sites(model) for zero in trained_of(s.layer, s.adapter)["gate"].eq(0).tolist()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of foreign packages; this process has no pytest to turn them into errors
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[tuple[str, str], Any] = {}
    for case, engine in RUNS:
        found[case, engine] = ENGINES[engine](case, rank)
    for name in TRAINERS:
        found[name, "trainer"] = with_trainer(name, Path(folder, name), 2)
    found["tasks", "trainer"] = with_tasks(Path(folder), 2)
    found["prilora", "masks"] = different_masks(rank)
    found["sora", "gates"] = gates_off(rank)
    found["pissa", "replicas"] = replicas(rank, Path(folder, "replicas"))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair_of_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    warm.together(worker, str(folder), count=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("case", "engine"), RUNS)
def test_two_processes_equal_one(case: str, engine: str, pair_of_processes: list[dict[tuple[str, str], Any]]) -> None:
    start, want = dict(trainable(prepared(case)[0])), alone(case)
    assert all(not torch.equal(want["tensors"][name], p) for name, p in start.items() if "lora_B" in name)
    for found in pair_of_processes:
        mine = found[case, engine]
        assert mine["applied"] == want["applied"] == [PAIRS] * STEPS
        assert mine["reached"] == PAIRS
        assert mine["norm"] == pytest.approx(want["norm"], rel=1e-10)
        assert mine["tensors"].keys() == want["tensors"].keys()
        for name, value in want["tensors"].items():
            assert torch.allclose(mine["tensors"][name], value, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("case", SAVED)
def test_a_save_gathers_nothing_once_all_state_is_there(
    case: str, pair_of_processes: list[dict[tuple[str, str], Any]]
) -> None:
    """Before the first step whether it asks for state is told from the gradients; a form may keep none at all."""
    for found in pair_of_processes:
        first, *later = found[case, "fsdp2 saved"]["gathered"]
        assert first > 0 and later == [0] * (STEPS - 1)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_on_two_processes_equals_one(
    name: str, tmp_path: Path, pair_of_processes: list[dict[tuple[str, str], Any]]
) -> None:
    want = with_trainer(name, tmp_path, 1)
    one, two = (found[name, "trainer"] for found in pair_of_processes)
    assert one["as"] == two["as"] == "DistributedDataParallel"
    assert one["applied"] == two["applied"] == want["applied"] == (7 if name == "xgblora" else 14)
    assert one["tensors"].keys() == two["tensors"].keys() == want["tensors"].keys()
    assert one["ranks"] == two["ranks"] == want["ranks"]
    if name == "allocating-lora":  # 7 slots by 2, shared by two processes
        assert (
            want["forwards"] == 14 and one["forwards"] == two["forwards"] == 8 and len(set(want["ranks"].values())) > 1
        )
    for key, value in want["tensors"].items():
        assert torch.equal(one["tensors"][key], two["tensors"][key]), key
        assert float((one["tensors"][key] - value).abs().max()) < 1e-3 * float(value.abs().max()), key


def test_tasks_on_two_processes_equal_one(tmp_path: Path, pair_of_processes: list[dict[tuple[str, str], Any]]) -> None:
    want = with_tasks(tmp_path, 1)
    one, two = (found["tasks", "trainer"] for found in pair_of_processes)
    assert one["matrix"] == two["matrix"] == want["matrix"]
    for key, value in want["tensors"].items():
        assert torch.equal(one["tensors"][key], two["tensors"][key]), key
        assert float((one["tensors"][key] - value).abs().max()) <= 1e-3 * float(value.abs().max()), key


def test_different_masks_are_refused(pair_of_processes: list[dict[tuple[str, str], Any]]) -> None:
    for found in pair_of_processes:
        assert found["prilora", "masks"] == "the processes computed different element masks at blocks.1.up"


def test_gates_are_switched_off_as_rank_0_says(pair_of_processes: list[dict[tuple[str, str], Any]]) -> None:
    one, two = (found["sora", "gates"] for found in pair_of_processes)
    assert one == two and sum(one) > 1 and one[0]


def test_a_start_from_weights_that_one_process_lacks_is_refused(
    pair_of_processes: list[dict[tuple[str, str], Any]],
) -> None:
    for found in pair_of_processes:
        assert "the processes hold different base weights, and pissa starts from them" in found["pissa", "replicas"]
