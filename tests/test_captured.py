"""Recorded steps of trials, with a recording that a CPU can replay: the work again, into the same output tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loralign.compare.captured import Steps
from loralign.compare.runner import Resident
from loralign.train.recorder import MOST, Outputs, cuda_graph
from loralign.train.settled import Settled
from test_compare_run import never, on_a_cpu, timeless, trial
from tiny_study import SMALL, load, write_study


def again(work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """As a CUDA graph does it: nothing runs while it is recorded, outputs have one address."""
    outputs: list[Any] = []

    def replay() -> None:
        made = work()
        if not outputs:
            outputs[:] = [None if t is None else t.detach().clone() for t in made]
        for kept, t in zip(outputs, made, strict=True):
            if kept is not None and t is not None:
                kept.copy_(t.detach())

    return outputs, replay


class Counted:
    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        outputs, replay = again(work)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return outputs, counted


@on_a_cpu
@pytest.mark.parametrize(
    ("arm", "options", "micro"),
    [
        ("full", {}, 8),
        ("lora", {}, 2),
        ("prilora", {"interval": 2}, 4),
        ("chain-of-lora", {"links": 2}, 8),
    ],
    ids=["full", "micro-batches", "inputs", "knot"],
)
def test_replayed_steps_are_the_steps(arm: str, options: dict[str, Any], micro: int, tmp_path: Path) -> None:
    train = {**SMALL, "steps": 8, "eval_every": 4, "micro_batch_size": micro}
    arms = [] if arm in ("full", "lora") else [{"method": arm, "options": options}]
    resident = Resident(load(write_study(tmp_path, arms=arms, train=train)))
    plain = resident.run(trial(arm), never)
    resident.record = counted = Counted()
    recorded = resident.run(trial(arm), never)
    assert timeless(recorded) == timeless(plain)
    assert counted.recorded >= 2 and counted.replayed > 4


@on_a_cpu
def test_batches_with_fewer_rows_are_not_recorded(tmp_path: Path) -> None:
    """An epoch's last one, and those of its evaluations, though they come again."""
    resident = Resident(load(write_study(tmp_path, train={**SMALL, "steps": 22, "eval_every": 11})))
    rows = len(resident.task.train)
    assert rows % 8 and 2 * (rows // 8 + 1) < 22 and len(resident.task.test) % 8
    plain = resident.run(trial("lora"), never)
    resident.record = counted = Counted()
    assert timeless(resident.run(trial("lora"), never)) == timeless(plain)
    assert counted.recorded == 2


def test_a_settled_model_drops_the_gradients_of_what_it_holds_now() -> None:
    """Of tensors that came later or rest by now, too; one that two modules share counts once."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    settled = Settled(model)
    model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.zeros(2))
    assert [id(p) for p in settled.parameters()] == [id(p) for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    model[0].bias.requires_grad_(False)
    assert all(p.grad is not None for p in model.parameters())
    settled.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@on_a_cpu
def test_the_trainer_goes_through_all_modules_once_for_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    plain = nn.Module.zero_grad
    monkeypatch.setattr(nn.Module, "zero_grad", lambda self, *args: (called.append(self), plain(self, *args)))
    Resident(load(write_study(tmp_path))).run(trial("lora"), never)
    assert len(called) == 1  # before the first step


@on_a_cpu
def test_what_cannot_be_recorded_runs_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resident = Resident(load(write_study(tmp_path)))
    plain = resident.run(trial("lora"), never)

    def broken(work: Callable[[], Outputs]) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    resident.record = broken
    assert timeless(resident.run(trial("lora"), never)) == timeless(plain)
    said = [r.getMessage() for r in caplog.records if "cannot be recorded" in r.getMessage()]
    assert [line.split(" runs ")[0] for line in said] == ["training", "evaluation"]
    assert all(line.endswith("operation not permitted when stream is capturing") for line in said)


def test_a_recording_is_made_afresh_where_a_tensor_was_replaced_or_frozen() -> None:
    model, counted = nn.Linear(2, 2), Counted()
    model.register_buffer("frozen", torch.zeros(2))
    recorder = Steps(model, counted)

    def work(batch: Any) -> Outputs:
        return [model(batch["x"]) + model.frozen]

    def run() -> torch.Tensor:
        (y,) = recorder.run("training", work, {"x": torch.ones(1, 2)})
        assert y is not None
        return y.clone()

    first = [run() for _ in range(4)]
    assert all(torch.equal(first[0], y) for y in first) and (counted.recorded, counted.replayed) == (1, 3)
    model.frozen = torch.ones(2)
    assert torch.equal(run(), first[0] + 1) and torch.equal(run(), first[0] + 1)
    assert torch.equal(run(), first[0] + 1) and counted.recorded == 2
    model.weight.requires_grad_(False)
    for _ in range(3):
        run()
    assert counted.recorded == 3


def test_shapes_beyond_the_most_are_not_recorded() -> None:
    counted, model = Counted(), nn.Linear(2, 2)
    recorder = Steps(model, counted)
    for _ in range(2):
        for rows in range(1, MOST + 4):
            recorder.run("training", lambda batch: [model(batch["x"])], {"x": torch.ones(rows, 2)})
    assert counted.recorded == MOST


class Graph:
    """A CUDA graph as far as `cuda_graph` sees it."""

    def replay(self) -> None:
        pass


def test_a_recording_that_failed_leaves_the_stream_and_says_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context enters a stream of its own and leaves it only where the recording could be ended."""
    now = ["main"]

    @contextmanager
    def graph(graph: Graph, **_: Any) -> Iterator[None]:
        now[0] = "recording"
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))

    def work() -> Outputs:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph(work)
    assert now == ["main"]
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graph(lambda: [])
    assert now == ["main"]


def test_nothing_is_compiled_while_a_step_is_recorded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, counted = Doubled(2, 2), Counted()
    model.compile(dynamic=False, backend="eager")

    def guarded(work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        cuda_graph(work)
        return counted(work)

    def run(recorder: Steps, later: int) -> None:
        """later: rows of a batch that the second call of a shape makes of its own, as a mask made in a recording is."""
        calls = iter([2, later, 2, 2])
        for _ in range(2):
            recorder.run("training", lambda batch: [model(torch.ones(next(calls), 2))], {"x": torch.ones(1)})

    run(Steps(model, guarded), later=2)
    assert counted.recorded == 1 and "cannot be recorded" not in caplog.text
    run(Steps(model, guarded), later=3)
    assert counted.recorded == 1 and "cannot be recorded" in caplog.text
    torch._dynamo.reset()
