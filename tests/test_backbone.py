"""Recorded backbones, with a recording that a CPU can replay: steps are the steps, what speaks against it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loralign
import toy
from loralign.carrier.storage import SlotLinear
from loralign.carrier.together import Together
from loralign.train import quick
from loralign.train.backbone import KIND, Backbone, Both
from loralign.train.beside import Room, unseen
from loralign.train.recorder import MOST, Outputs, recovers
from test_compiled import SEEN, Loop, batch, losses_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Replays:
    """A recording that a CPU can replay: the work again, into the same output tensors. What it changes while it is
    recorded is put back, since a CUDA graph executes nothing then."""

    def __init__(self, model: nn.Module, *, wrong: float = 1.0, stale: bool = False) -> None:
        self.model, self.wrong, self.stale = model, wrong, stale
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.recorded += 1
        with unseen(self.model):
            kept = [None if t is None else t.detach().clone() for t in work()]

        def replay() -> None:
            self.replayed += 1
            for k, t in zip(kept, () if self.stale else work(), strict=not self.stale):
                if k is not None and t is not None:
                    k.copy_(t.detach() * self.wrong)

        return kept, replay


def quick_clock() -> Callable[[Callable[[], object]], float]:
    """A clock on which replays are the faster ones: of as it is, replayed, and both again."""
    told = iter([1.0, 0.5] * 1000)

    def clock(work: Callable[[], object]) -> float:
        work()
        return next(told)

    return clock


def record(model: nn.Module, by: Any, clock: Any = None) -> Backbone:
    made = Backbone(model, None, by, clock or quick_clock())
    assert made.unfit() == ""
    made.start()
    return made


def taken(found: Backbone) -> list[Both]:
    made = [known.made for known in found.recorder.recordings.values() if known is not None]
    return [both for both in made if both is not None and both.runs > 2]


@pytest.mark.parametrize("form", ["plain", "twins", "inputs", "chain", "shared", "cross-layer", "features"])
def test_replayed_backbones_are_the_steps(form: str) -> None:
    plain, loop = Loop(form).run(10), Loop(form)
    counted = Replays(loop.model)
    found = record(loop.model, counted)
    assert loop.run(10) == pytest.approx(plain, rel=1e-6)
    assert KIND not in found.recorder.refused and taken(found)
    assert counted.recorded == (4 if form == "chain" else 2)  # a knot replaces frozen slots: recorded afresh


def grads(loop: Loop, by: Any, run: Callable[[Any], None]) -> tuple[list[Tensor], Backbone | None]:
    """Of a loop without an optimizer, its third forward and later ones replayed."""
    found = record(loop.model, by(loop.model)) if by else None
    torch.manual_seed(2)
    run(loop.model)
    return [p.grad for p in loop.model.parameters() if p.grad is not None], found


def several(model: Any) -> None:
    for _ in range(6):
        model(**batch()).loss.backward()


def replaying() -> tuple[Loop, Replays, Backbone]:
    """A loop whose backbone is replayed by now."""
    loop = Loop("plain")
    counted = Replays(loop.model)
    found = record(loop.model, counted)
    several(loop.model)
    return loop, counted, found


def two_forwards(model: Any) -> None:
    for _ in range(4):
        model(**batch()).loss.backward()
    one, two = model(**batch()).loss, model(**batch()).loss
    two.backward()
    one.backward()


@pytest.mark.parametrize("run", [several, two_forwards])
def test_gradients_add_up(run: Callable[[Any], None]) -> None:
    """Of micro-batches, and of a second forward before the first one's backward."""
    plain, _ = grads(Loop("plain"), None, run)
    recorded, found = grads(Loop("plain"), Replays, run)
    assert found is not None and taken(found)
    for a, b in zip(plain, recorded, strict=True):
        torch.testing.assert_close(a, b)


def test_a_head_that_gives_the_ids_by_their_place_replays_too() -> None:
    plain, recorded = Loop("plain"), Loop("plain")
    for loop in (plain, recorded):
        loop.model = loralign.adapt(toy.gpt2(), loop.recipe).train()
        loop.model.config.use_cache = False
    found = record(recorded.model, Replays(recorded.model))
    assert recorded.run(6) == pytest.approx(plain.run(6), rel=1e-6) and taken(found)


def test_each_shape_has_its_recording_and_compiled_blocks_are_recorded_too() -> None:
    plain, loop = Loop("plain").run(10, (8, 6)), Loop("plain")
    blocks = loralign.compile(loop.model, backend=SEEN)
    found = record(loop.model, Replays(loop.model))
    assert loop.run(10, (8, 6)) == pytest.approx(plain, rel=1e-5)
    assert len(taken(found)) == 2 and blocks.why == ""
    torch._dynamo.reset()


def test_a_shape_without_room_leaves_the_others_their_recordings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, loop = Loop("plain").run(10, (8, 6)), Loop("plain")
    said = iter(["", "1.0 GiB are free, two steps need 2.0"])
    found = record(loop.model, Replays(loop.model))
    monkeypatch.setattr(found.room, "lacking", lambda: next(said))
    with caplog.at_level(logging.INFO, "loralign"):
        assert loop.run(10, (8, 6)) == pytest.approx(plain, rel=1e-6)
    assert len(taken(found)) == 1 and KIND not in found.recorder.refused
    assert caplog.text.count("are not recorded: 1.0 GiB are free") == 1


def test_dropout_is_drawn_anew_in_every_replay() -> None:
    plain, loop = Loop("plain", dropout=0.3).run(8), Loop("plain", dropout=0.3)
    found = record(loop.model, Replays(loop.model))
    assert loop.run(8) == pytest.approx(plain, rel=1e-6) and taken(found)


def test_a_backward_of_values_that_are_gone_raises() -> None:
    loop = Loop("plain")
    found = record(loop.model, Replays(loop.model))
    several(loop.model)
    assert taken(found)
    loss = loop.model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fp32", "bf16"])
def test_a_trainer_of_rows_replays(bf16: bool, tmp_path: Path) -> None:
    """Micro-batches, evaluations and activation checkpoints of TRL's defaults, the state of autocast as it is there."""
    more: dict[str, Any] = {"bf16": bf16, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    plain, trainer = (trainer_of(tmp_path / name, False, **more) for name in ("plain", "replayed"))
    blocks = [quick.quicken(one, packing=False, seed=0, backend=SEEN, short=1) for one in (plain, trainer)]
    found = Backbone(trainer.model, blocks[1], Replays(trainer.model), quick_clock())
    assert found.unfit() == ""
    found.start()
    expected = losses_of(plain)
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)
    assert taken(found) and KIND not in found.recorder.refused
    evals = [[e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (plain, trainer)]
    assert evals[1] == pytest.approx(evals[0], rel=1e-6) and len(evals[0]) == 2
    found.restore()
    torch._dynamo.reset()


def test_gradients_that_were_handed_out_stay() -> None:
    loop = Loop("plain")
    found = record(loop.model, Replays(loop.model))
    several(loop.model)
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loop.model(**batch()).loss, trained)
    before = [g.clone() for g in first]
    torch.autograd.grad(loop.model(**batch()).loss, trained)
    assert taken(found) and all(map(torch.equal, first, before))


def test_a_recording_is_a_forward_of_its_own() -> None:
    """What the layers of one forward share is not left for the one that runs, whose values it does not have."""
    loop = Loop("shared")
    counted, left = Replays(loop.model), []
    hooks = [hook for m in loop.model.modules() for hook in m._forward_pre_hooks.values()]
    together = next(p for p in (getattr(hook, "__self__", None) for hook in hooks) if isinstance(p, Together))

    def by(work: Callable[[], Outputs]) -> Any:
        made = counted(work)
        left.append(together.made)
        return made

    record(loop.model, by)
    several(loop.model)
    assert left == [None, None] and together.owner is None


def test_a_model_that_does_not_train_runs_as_it_is() -> None:
    loop, counted, found = replaying()
    before = counted.replayed
    loop.model.eval()(**batch()).loss.backward()
    with torch.no_grad():
        loop.model.train()(**batch())
    assert taken(found) and counted.replayed == before > 0


def test_a_forward_under_another_autocast_is_another_recording() -> None:
    loop, counted, found = replaying()
    before = counted.replayed
    with torch.autocast("cpu", torch.bfloat16):
        loop.model(**batch()).loss.backward()
    assert taken(found) and counted.replayed == before and len(found.recorder.recordings) == 2


# ----------------------------------------------------------------------------------------------- what speaks against it


def refused(caplog: pytest.LogCaptureFixture, loop: Loop, by: Any = None, clock: Any = None, steps: int = 6) -> str:
    """What is said of a loop whose losses are the plain ones."""
    plain = Loop("plain").run(steps)
    with caplog.at_level(logging.INFO, "loralign"):
        found = record(loop.model, by or Replays(loop.model), clock)
        assert loop.run(steps) == pytest.approx(plain, rel=1e-6)
    assert not taken(found)
    lines = [r.getMessage() for r in caplog.records if "replayed" in r.getMessage() or "recorded:" in r.getMessage()]
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def broken(work: Callable[[], Outputs]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert refused(caplog, Loop("plain"), broken).endswith("recorded: operation not permitted when stream is capturing")


def test_a_replay_that_fails_on_trial_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop("plain")
    counted = Replays(loop.model)

    def by(work: Callable[[], Outputs]) -> Any:
        return counted(work)[0], lambda: [][0]

    assert refused(caplog, loop, by).endswith("its trial failed: list index out of range")


def test_tensors_inside_of_an_argument_are_no_input_of_a_recording(caplog: pytest.LogCaptureFixture) -> None:
    """They would stay those of the batch that was recorded."""
    loop = Loop("plain")
    part, found = loop.model.get_base_model().model, record(loop.model, Replays(loop.model))
    for _ in range(3):
        part(input_ids=batch()["input_ids"], marks=(torch.ones(2),))
    assert KIND in found.recorder.refused and "gets marks, whose tensors" in caplog.text


def test_replays_with_other_numbers_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop("plain")
    assert "numbers differ by" in refused(caplog, loop, Replays(loop.model, wrong=1.01))


def test_a_recording_that_holds_its_batch_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """What was read from the batch on the host would be the same in every replay: the trial is another batch."""
    loop = Loop("plain")
    assert "numbers differ by" in refused(caplog, loop, Replays(loop.model, stale=True))


def test_replays_that_save_no_time_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def even(work: Callable[[], object]) -> float:
        work()
        return 0.25

    said = refused(caplog, Loop("plain"), clock=even)
    assert said == "2 × 8 tokens: forward and backward take 250.0 ms, replayed 250.0, so they are not"


def test_while_a_hook_of_others_is_there_steps_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """From the start, or from the middle of a run on; every call of it is one of the hook, and it is said once."""
    plain, loop, seen = Loop("plain"), Loop("plain"), list[int]()
    layer = loop.model.get_base_model().model.layers[0]
    counted = Replays(loop.model)
    found = record(loop.model, counted)
    for steps, hooked in ((2, True), (4, False), (1, True), (2, False), (1, True), (2, False)):
        hook = layer.register_forward_hook(lambda *_: seen.append(1)) if hooked else None
        before, replayed = len(seen), counted.replayed
        assert loop.run(steps) == pytest.approx(plain.run(steps), rel=1e-6)
        assert len(seen) - before == (steps if hooked else 0)
        assert (counted.replayed > replayed) == (not hooked)
        if hook is not None:
            hook.remove()
    assert taken(found) and KIND not in found.recorder.refused and counted.recorded == 2
    said = (
        f"training runs one kernel at a time while a hook of {__name__.partition('.')[0]!r} sits on LlamaDecoderLayer"
    )
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [said]


def test_a_hook_on_a_gradient_that_comes_later_is_called(caplog: pytest.LogCaptureFixture) -> None:
    loop, seen = Loop("plain"), []
    found = record(loop.model, Replays(loop.model))
    several(loop.model)
    assert taken(found)
    next(p for p in loop.model.parameters() if p.requires_grad).register_hook(lambda g: seen.append(1))
    loop.model(**batch()).loss.backward()
    assert seen == [1] and "a hook sits on base_model" in caplog.text


def test_room_is_judged_by_the_steps_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process needed before, loading or collecting evidence, does not count."""
    gib, peak = 2**30, [60]

    def reset(device: Any) -> None:
        peak[0] = 10

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0] * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    room = Room(nn.Linear(2, 2))
    monkeypatch.setattr(room, "_gpu", lambda: torch.device("cuda"))
    room.begin()
    peak[0] += 4  # a step
    room.begin()
    assert room.lacking() == ""
    peak[0] += 12
    assert room.lacking() == "30.0 GiB are free, two steps need 32.0"


def test_the_first_step_of_a_run_is_where_its_peak_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop("plain")
    found = record(loop.model, Replays(loop.model))
    loop.model.eval()
    loop.model(**batch())
    assert not found.room.begun
    loop.model.train()
    loop.model(**batch()).loss.backward()
    assert found.room.begun


def test_a_model_that_changes_all_the_time_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop("twins")
    found = record(loop.model, Replays(loop.model))
    side = next(m for m in loop.model.modules() if isinstance(m, SlotLinear))
    for _ in range(2 * MOST):
        side.frozen = side.frozen.clone()
        for _ in range(2):
            loop.model(**batch()).loss.backward()
    assert KIND in found.recorder.refused and f"the model was changed {MOST + 1} times" in caplog.text


def test_checkpointed_blocks_are_recorded_where_they_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    plain, loop = Loop("plain").run(6), Loop("plain", checkpointing=True)
    assert "checkpoints activations" in refused(caplog, loop)
    loop = Loop("plain", checkpointing=True)
    blocks = loralign.compile(loop.model, backend=SEEN)
    found = Backbone(loop.model, blocks, Replays(loop.model), quick_clock())
    found.start()
    assert loop.run(6) == pytest.approx(plain, rel=1e-5) and taken(found)
    torch._dynamo.reset()


def test_what_is_known_before_a_step_is_said() -> None:
    assert Backbone(nn.Linear(2, 2)).unfit() == "it is no adapted Transformers model with a part below its head"


def test_restoring_leaves_the_model_as_it_was() -> None:
    loop = Loop("plain")
    found = record(loop.model, Replays(loop.model))
    several(loop.model)
    found.restore()
    assert found.part is not None and found.part._compiled_call_impl is None and not found.recorder.recordings


def test_recordings_wait_for_a_torch_that_recovers() -> None:
    assert [recovers(v) for v in ("2.8.0", "2.11.0+cu130", "2.12.0", "2.13.0+cpu", "3.0.1")] == [
        False,
        False,
        True,
        True,
        True,
    ]
