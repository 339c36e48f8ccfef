"""A backbone's forward and its backward as two CUDA graphs, replayed from any loss and any loop.

    hidden = F(inputs)   |   loss, metrics, whatever looks at numbers: as ever   |   gradients = B(dL/dhidden)

A small model's step is thousands of kernels that a GPU runs faster than a host can name them. Of every shape the first
calls run as they are and are timed; where the host was the slower one and memory allows, F and B are recorded and from
then on replayed. Recordings hold addresses: where a tensor of the model is another one than it was (a chain's knot, a
frozen slot more), they are made afresh. Between F and its B no other recording runs: a second forward before the first
one's backward runs as it is. What cannot be recorded runs as it is, and that is said once.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from loralign.carrier.abilities import drops_layers
from loralign.train.captured import MOST, Outputs, Record, Wiring, cuda_graph

log = logging.getLogger("loralign")
BEFORE = 2
"""Calls of a shape that run before it is timed."""
TIMED = 3
BOUND = 0.5
"""Host time over GPU time of a forward from which recording pays: the rest of a step needs the host too."""
HELD = "last_hidden_state"


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The part of an adapted Transformers model below its head; None where there is none, or layers are skipped."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    if not isinstance(base, PreTrainedModel) or base.base_model is base or drops_layers(base):
        return None
    found: nn.Module = base.base_model
    return found


def keeps_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether keys and values are kept, as in generation; by the names of old and new Transformers."""
    return any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))


@dataclass
class Timed:
    """What is known of a shape before it is recorded."""

    calls: int = 0
    host: list[float] = field(default_factory=list)
    events: list[tuple[Any, Any]] = field(default_factory=list)

    def bound(self) -> float:
        """Host time over GPU time, of the middle calls."""
        if not self.events:
            return 1.0
        return 1e3 * sorted(self.host)[len(self.host) // 2] / self.ms()

    def ms(self) -> float:
        """GPU time of the middle call."""
        for _, end in self.events:
            end.synchronize()
        found = sorted(begin.elapsed_time(end) for begin, end in self.events)
        return found[len(found) // 2] if found else math.inf


@dataclass
class Recording:
    """Static inputs and outputs, and what computes the ones from the others."""

    inputs: Mapping[str, Tensor]
    hidden: Tensor
    forward: Callable[[], None]
    given: Tensor
    grads: Outputs
    backward: Callable[[], None]
    make: Callable[[Tensor], Any]
    """The model's own output around the hidden states."""
    before: Timed
    """Calls that were not replayed."""
    after: Timed = field(default_factory=Timed)
    """Replays."""
    sure: bool = False
    """Whether they were found to be the faster ones."""
    runs: int = 0
    """Forwards so far: what is kept for backward is the last one's."""


class Flight:
    """A forward whose backward is still to come."""

    def __init__(self, recording: Recording) -> None:
        recording.runs += 1
        self.recording, self.run, self.done = recording, recording.runs, False

    def back(self, grad: Tensor) -> list[Tensor | None]:
        known = self.recording
        if known.runs != self.run:
            raise RuntimeError("backward through a recorded forward that a later one has overwritten")
        known.given.copy_(grad)
        known.backward()
        self.done = True
        live = [g for g in known.grads if g is not None]
        copies = iter(torch._foreach_mul(live, 1) if live else ())  # the next replay overwrites them
        return [None if g is None else next(copies) for g in known.grads]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *trained: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.recording.hidden.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.flight.back(grads[0]))


class Recorded:
    """The backbone's calls: as they are, timed, or replayed."""

    def __init__(self, model: nn.Module, backbone: nn.Module, record: Record | None = None, timed: int = TIMED) -> None:
        self.model, self.backbone, self.timed = model, backbone, timed
        self.record = record or self._cuda_graph
        self.wiring = Wiring(model)
        self.known: dict[Any, Timed | Recording] = {}
        self.why = ""
        """Why nothing is recorded; "" while something may be."""
        self.flight: weakref.ref[Flight] | None = None
        self.pool: Any = None

    def start(self) -> None:
        """From the next call on."""
        self.backbone._compiled_call_impl = self._call

    def restore(self) -> None:
        self.backbone._compiled_call_impl = None
        self.known = {}

    def stop(self, why: str) -> None:
        """Run as it is from now on."""
        self.why, self.known = why, {}
        log.info("the model's steps are not recorded as CUDA graphs: %s", why)

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.backbone._call_impl
        flying = self.flight() if self.flight is not None else None
        if self.why or not self._trains(args, kwargs) or (flying is not None and not flying.done):
            return plain(*args, **kwargs)
        if not self.wiring.holds():
            self.wiring, self.known, self.pool = Wiring(self.model), {}, None
        key = _key(kwargs)
        known = self.known.get(key)
        if isinstance(known, Recording):
            return self._replayed(known, kwargs) if self._pays(known) else plain(**kwargs)
        if known is None:
            if len(self.known) >= MOST:
                return plain(**kwargs)
            known = self.known[key] = Timed()
        known.calls += 1
        if known.calls <= BEFORE:
            return plain(**kwargs)
        if len(known.host) < self.timed:
            return _timed(known, lambda: plain(**kwargs))
        if known.bound() < BOUND:
            self.stop("the GPU is the slower one")
            return plain(**kwargs)
        made = self._recorded(kwargs, known)
        if made is None:
            return plain(**kwargs)
        self.known[key] = made
        return self._replayed(made, kwargs)

    def _trains(self, args: Any, kwargs: Mapping[str, Any]) -> bool:
        if args or not self.backbone.training or not torch.is_grad_enabled() or keeps_cache(kwargs):
            return False
        return not any(isinstance(v, Tensor) and v.requires_grad for v in kwargs.values())

    def _replayed(self, known: Recording, kwargs: Mapping[str, Any]) -> Any:
        for name, static in known.inputs.items():
            static.copy_(kwargs[name])
        if len(known.after.events) < self.timed:
            _timed(known.after, known.forward)
        else:
            known.forward()
        flight = Flight(known)
        self.flight = weakref.ref(flight)
        return known.make(_Replay.apply(flight, *self.wiring.trained))

    def _pays(self, known: Recording) -> bool:
        """Whether replays are the faster ones: in recordings Transformers makes a mask that it may do without."""
        if not known.sure and len(known.after.events) == self.timed:
            known.sure = True
            if self.timed and known.after.ms() > known.before.ms():
                self.stop(f"a replay takes {known.after.ms():.1f} ms, a call {known.before.ms():.1f}")
        return not self.why

    def _recorded(self, kwargs: Mapping[str, Any], before: Timed) -> Recording | None:
        if why := self._no_room():
            self.stop(why)
            return None
        inputs = {k: v.clone() for k, v in kwargs.items() if isinstance(v, Tensor)}
        latest: dict[str, Any] = {}

        def forward() -> Outputs:
            with torch.autocast(self._device, **_autocast(self._device)):
                latest["output"] = output = self.backbone._call_impl(**{**kwargs, **inputs})
            return [output[HELD]]

        def backward() -> Outputs:
            wanted = self.wiring.trained
            return torch.autograd.grad(latest["output"][HELD], wanted, given, allow_unused=True)

        try:
            (hidden,), replay = self.record(forward)
            output = latest["output"]
            if not isinstance(output, ModelOutput) or [k for k, v in output.items() if v is not None] != [HELD]:
                raise RuntimeError("the backbone returns more than hidden states")
            assert hidden is not None
            given = torch.zeros_like(hidden)
            grads, replay_back = self.record(backward)
        except (RuntimeError, torch.AcceleratorError) as error:
            self.stop(str(error).splitlines()[0][:160])
            return None
        finally:
            latest.clear()
        kind = type(output)
        return Recording(inputs, hidden, replay, given, grads, replay_back, lambda h: kind(**{HELD: h}), before)

    @property
    def _device(self) -> str:
        return next(self.model.parameters()).device.type

    def _cuda_graph(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return cuda_graph(work, self.pool)

    def _no_room(self) -> str:
        """Activations of a recording stay; evaluation and whatever else runs needs as much again."""
        if self._device != "cuda":
            return ""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        need = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0]
        return "" if 2 * need < free else f"{free / 2**30:.1f} GiB are free, two steps need {2 * need / 2**30:.1f}"


def _timed(known: Timed, work: Callable[[], Any]) -> Any:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    started = time.perf_counter()
    made = work()
    known.host.append(time.perf_counter() - started)
    end.record()
    known.events.append((begin, end))
    return made


def _autocast(device: str) -> dict[str, Any]:
    """As it is now, without its cache: what it would keep there has no fixed address."""
    on = torch.is_autocast_enabled(device)
    return {"enabled": on, "dtype": torch.get_autocast_dtype(device), "cache_enabled": False}


def _key(kwargs: Mapping[str, Any]) -> Any:
    parts = [(k, (v.shape, v.dtype) if isinstance(v, Tensor) else repr(v)) for k, v in sorted(kwargs.items())]
    return (*parts, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
