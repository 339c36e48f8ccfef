"""A backbone's forward and its backward as two CUDA graphs, replayed inside of any loss: `train.compile: auto`.

    hidden = F(inputs)   |   head, loss, metrics, whatever looks at numbers: as ever   |   gradients = B(dL/dhidden)

Of every shape the first call runs as it is, at the second one F and B are recorded, the third is a trial: on another
batch than was recorded, outputs and gradients beside those of the calls as they are, and how long both take. Replays
are taken where the numbers agree and time is saved. Between F and its B no other recording runs: a second forward
before the first one's backward runs as it is. What speaks against recordings is said in one line.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from loralign.carrier.abilities import drops_layers
from loralign.carrier.together import anew
from loralign.data.read import first_line
from loralign.train.beside import Room, apart, foreign_hook, put_back, seconds, states, unseen
from loralign.train.compiled import ROUNDING, Blocks
from loralign.train.recorder import MOST, Batch, Outputs, Record, Recorder, Replayed, cuda_graph

log = logging.getLogger("loralign")
KIND = "training"
HELD = "last_hidden_state"
AUTOCAST = "autocast"
"""The key under which its state travels with a batch."""
PLAIN = (Tensor, bool, int, float, str, NoneType)
TRIAL = 2
"""The call after recording that is the trial: the first is of the batch that was recorded."""
WORTH = 0.985
"""Of the time of the calls as they are, at most, for replays to be taken."""
Clock = Callable[[Callable[[], object]], float]


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The part of an adapted Transformers model below its head; None where there is none."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    if not isinstance(base, PreTrainedModel) or base.base_model is base:
        return None
    found: nn.Module = base.base_model
    return found


@dataclass
class Both:
    """F and B of one shape. They share memory with the recordings of other shapes: outputs hold until one of those is
    replayed."""

    hidden: Tensor
    forward: Callable[[], None]
    given: Tensor
    grads: Outputs
    backward: Callable[[], None]
    make: Callable[[Tensor], Any]
    """The model's own output around the hidden states."""
    calls: int = 0
    runs: int = 0
    """Forwards so far: what is kept for backward is the last one's."""
    taken: bool = True
    """Whether its replays are: the trial decides."""

    def run(self) -> Flight:
        self.forward()
        self.runs += 1
        return Flight(self, self.runs)


@dataclass(eq=False)
class Flight:
    """A forward whose backward is still to come."""

    both: Both
    run: int
    done: bool = False

    def back(self, grad: Tensor) -> list[Tensor | None]:
        if self.done or self.both.runs != self.run:
            raise RuntimeError("backward through a recorded forward whose values are gone: call backward once for each")
        self.done = True
        self.both.given.copy_(grad)
        self.both.backward()
        live = [g for g in self.both.grads if g is not None]
        copies = iter(torch._foreach_mul(live, 1) if live else ())
        return [None if g is None else next(copies) for g in self.both.grads]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *trained: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.both.hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.flight.back(grads[0]))


class Backbone:
    """A backbone's calls in training: as they are, on trial, or replayed.

    blocks: whether its layers run compiled. clock: seconds of work, for the trial.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks | None = None, record: Record | None = None, clock: Clock | None = None
    ) -> None:
        self.model, self.blocks = model, blocks
        self.part = backbone_of(model)
        given = signature(self.part.forward).parameters.values() if self.part is not None else ()
        self.names = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]  # some heads give the ids by place
        self.record = record or self._cuda_graph
        self.clock = clock or seconds
        self.recorder: Recorder[Both | None] = Recorder(model)
        self.room = Room(model)
        self.hooks, self.foreign = -1, ""
        """How many hooks there had been when they were last looked at; one that a replay would not call."""
        self.told: set[str] = set()
        """Such hooks, said once."""
        self.flight: Callable[[], Flight | None] = lambda: None
        self.pool: tuple[Any, Any] | None = None  # of the model as it is wired

    def unfit(self) -> str:
        """Why nothing is recorded, as far as that is known without trying; else ""."""
        if self.part is None:
            return "it is no adapted Transformers model with a part below its head"
        if drops_layers(self.part):
            return "it skips layers by chance"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return "several processes train"
        return ""

    def start(self) -> None:
        """From the next call on."""
        assert self.part is not None
        self.part._compiled_call_impl = self._call

    def restore(self) -> None:
        """Leave the model as it was before, and give the memory back."""
        if self.part is not None:
            self.part._compiled_call_impl = None
        self.recorder.recordings, self.pool = {}, None

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self.part is not None
        if len(args) <= len(self.names):
            args, kwargs = (), dict(zip(self.names, args, strict=False)) | kwargs
        both = None if args or not self._trains(kwargs) else self.recorder.of(KIND, kwargs | _autocast(), self._both)
        if both is None or not both.taken:
            return self.part._call_impl(*args, **kwargs)
        both.calls += 1
        if both.calls < TRIAL:
            return self.part._call_impl(**kwargs)
        if both.calls == TRIAL:
            self._decide(both, kwargs)
            return self.part._call_impl(**kwargs)
        flight = both.run()
        self.flight = weakref.ref(flight)
        return both.make(_Replay.apply(flight, *self.recorder.wiring.trained))

    def _trains(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this is a forward of training, whose backward may be replayed."""
        assert self.part is not None
        if KIND in self.recorder.refused or not self.part.training or not torch.is_grad_enabled():
            return False
        flying = self.flight()
        if flying is not None and not flying.done:
            return False
        self.room.begin()
        return not self._watched() and not any(isinstance(v, Tensor) and v.requires_grad for v in kwargs.values())

    def _watched(self) -> bool:
        """Whether a hook of others sits on the model, which a replay would not call."""
        if self.foreign or RemovableHandle.next_id != self.hooks:
            self.hooks, self.foreign = RemovableHandle.next_id, foreign_hook(self.model)
        if self.foreign and self.foreign not in self.told:
            self.told.add(self.foreign)
            log.warning("%s runs one kernel at a time while %s", KIND, self.foreign)
        return bool(self.foreign)

    def _speaks_against(self) -> str:
        """Why nothing is recorded now, "" where something is."""
        if self.recorder.rewired > MOST:
            return f"the model was changed {self.recorder.rewired} times"
        checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if checkpoints and (self.blocks is None or self.blocks.why):
            return "it checkpoints activations, and its blocks are not compiled"
        return ""

    def _both(self, batch: Batch) -> Both | None:
        """F and B on tensors that stay; None: there is no room for them, beside those of other shapes."""
        if why := self._speaks_against():
            raise RuntimeError(why)
        if why := self.room.lacking():
            log.info("batches of one shape are not recorded: %s", why)
            return None
        kwargs = {k: v for k, v in batch.items() if k != AUTOCAST}
        if held := [k for k, v in kwargs.items() if not isinstance(v, PLAIN)]:
            raise RuntimeError(f"its part below the head gets {held[0]}, whose tensors would be those of this batch")
        latest: dict[str, Any] = {}

        def forward() -> Outputs:
            latest["output"] = output = self._as_it_is(kwargs)
            return [output[HELD]]

        def backward() -> Outputs:
            return self._gradients(latest["output"][HELD], given)

        torch.clear_autocast_cache()  # a cast that was made before would not be made again
        try:
            (hidden,), replay = self.record(forward)
            assert hidden is not None
            output = latest["output"]
            if not isinstance(output, ModelOutput) or [k for k, v in output.items() if v is not None] != [HELD]:
                raise RuntimeError("its part below the head returns more than hidden states")
            given = torch.zeros_like(hidden)
            grads, replay_back = self.record(backward)
        finally:
            torch.clear_autocast_cache()
            latest.clear()
        kind = type(output)
        return Both(hidden.detach(), replay, given, grads, replay_back, lambda h: kind(**{HELD: h}))

    def _gradients(self, hidden: Tensor, grad: Tensor) -> Outputs:
        """Of what trains, as `backward` computes them, which runs outside of autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.autograd.grad(hidden, self.recorder.wiring.trained, grad, allow_unused=True)

    def _as_it_is(self, kwargs: Mapping[str, Any]) -> Any:
        """The part's own call, as a forward by itself inside of the one that runs."""
        assert self.part is not None
        with anew(self.model):
            return self.part._call_impl(**kwargs)

    def _cuda_graph(self, work: Callable[[], Outputs]) -> Replayed:
        if self.pool is None or self.pool[0] is not self.recorder.wiring:
            self.pool = self.recorder.wiring, torch.cuda.graph_pool_handle()
        return cuda_graph(work, self.pool[1])

    def _decide(self, both: Both, kwargs: Mapping[str, Any]) -> None:
        """Whether replays are taken, on a batch that was not recorded."""
        try:
            with unseen(self.model):
                off, before, after = self._trial(both, kwargs)
        except Exception as error:  # whatever it is: the part runs as it is next, and raises what is its own
            self.recorder.refuse(KIND, f"its trial failed: {first_line(error)[:120]}")
            return
        if off > 2 * ROUNDING.get(both.hidden.dtype, 0.03):
            self.recorder.refuse(KIND, f"a replay's numbers differ by {off:.1e} of their norm")
            return
        shape = " × ".join(map(str, both.hidden.shape[:-1]))
        told = f"{shape} tokens: forward and backward take {1e3 * before:.1f} ms, replayed {1e3 * after:.1f}"
        both.taken = after <= WORTH * before
        log.info("%s", told if both.taken else f"{told}, so they are not")

    def _trial(self, both: Both, kwargs: Mapping[str, Any]) -> tuple[float, float, float]:
        """By how much of its norm a replay's worst tensor differs, and seconds as it is and replayed."""
        source = torch.Generator(both.hidden.device).manual_seed(0)
        grad = torch.randn(both.hidden.shape, generator=source, device=both.hidden.device).to(both.hidden.dtype)
        found: list[list[Tensor | None]] = [[], []]

        def as_it_is() -> None:
            hidden = self._as_it_is(kwargs)[HELD]
            found[0] = [hidden.detach(), *self._gradients(hidden, grad)]

        def replayed() -> None:
            flight = both.run()
            hidden = both.hidden.clone()
            found[1] = [hidden, *flight.back(grad)]

        drawn = states()
        before = self.clock(as_it_is)
        put_back(drawn)
        after = self.clock(replayed)
        off = apart(*found)
        return off, min(before, self.clock(as_it_is)), min(after, self.clock(replayed))


def _autocast() -> dict[str, Any]:
    on = {k: torch.is_autocast_enabled(k) for k in ("cuda", "cpu")}
    return {AUTOCAST: tuple((k, torch.get_autocast_dtype(k)) for k, v in on.items() if v)}
