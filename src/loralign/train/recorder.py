"""Work on batches as CUDA graphs: of one shape it is recorded once and replayed from then on.

A small model's step is thousands of kernels that a GPU runs faster than a host can name them. Of every shape the first
call runs as it is, the second is recorded, later ones are copied into its inputs and replayed. A recording holds
addresses: where a tensor of the model is another one than it was (a chain's knot), it is made afresh. What cannot be
recorded, because the host looks at a number in the middle of it, runs as it is, and that is said once for each kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from loralign.data.read import first_line

log = logging.getLogger("loralign")
Made = TypeVar("Made")
Batch = Mapping[str, Any]
Outputs = Sequence[Tensor | None]
Replayed = tuple[Outputs, Callable[[], None]]
"""Outputs, and what computes them again from what the inputs hold then."""
Record = Callable[[Callable[[], Outputs]], Replayed]
"""Records work."""

MOST = 8
"""Shapes that are recorded, of each kind: every recording keeps memory."""


def without_compiling() -> Any:
    """Within: what is compiled already runs, what would be compiled raises a RuntimeError. A compiler that runs while
    kernels are recorded launches its own, which spoils the recording and the generators after it."""
    return torch.compiler.set_stance("fail_on_recompile")


def recovers(version: str = torch.__version__) -> bool:
    """Whether torch goes on after a recording that failed. Before 2.12 its allocator stays in it, and raises when it
    next gives memory back (pytorch issue 180395)."""
    return tuple(map(int, version.split(".")[:2])) >= (2, 12)


def cuda_graph(work: Callable[[], Outputs], pool: Any = None) -> Replayed:
    """Record the work, which is not executed; replaying it fills the outputs. pool: memory that recordings share."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generators = [(g, g.clone_state()) for g in torch.cuda.default_generators]
    broken: list[BaseException] = []
    try:
        with without_compiling(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                outputs = work()
            except BaseException as error:
                broken.append(error)
                raise
    except BaseException as error:
        torch.cuda.set_stream(stream)  # where ending it fails as well, torch stays on the recording's own
        for generator, state in generators:  # a recording that failed may leave them waiting for its end
            generator.graphsafe_set_state(state)
        raise (broken[0] if broken else error) from None  # what its end says is no reason
    return outputs, graph.replay


class Wiring:
    """Which tensors a model holds, to notice that one of them was replaced, freed, frozen or thawed."""

    def __init__(self, model: nn.Module) -> None:
        holders = [held for m in model.modules() for held in (m._parameters, m._buffers)]
        self.seen = [
            (held, name, t, t.data_ptr(), t.requires_grad)
            for held in holders
            for name, t in held.items()
            if t is not None
        ]
        self.trained: list[Tensor] = list({id(t): t for *_, t, _, trained in self.seen if trained}.values())

    def holds(self) -> bool:
        return all(
            held.get(name) is t and t.data_ptr() == at and t.requires_grad == trained
            for held, name, t, at, trained in self.seen
        )


@dataclass(frozen=True)
class Recording(Generic[Made]):
    """Static inputs, and what was made of them."""

    inputs: Mapping[str, Tensor]
    made: Made


class Recorder(Generic[Made]):
    """The recordings of one model, by kind and shapes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wiring, self.rewired = Wiring(model), 0
        self.recordings: dict[Any, Recording[Made] | None] = {}
        """None: seen once."""
        self.refused: set[str] = set()
        """Kinds that are not recorded any more."""

    def trained(self) -> list[Tensor]:
        """What trains now; where the model was changed, everything is recorded afresh."""
        if not self.wiring.holds():
            self.wiring, self.rewired, self.recordings = Wiring(self.model), self.rewired + 1, {}
        return self.wiring.trained

    def of(self, kind: str, batch: Batch, make: Callable[[Batch], Made]) -> Made | None:
        """What `make` recorded on a batch of this shape, its inputs filled with this one; None: it is to run as it is.

        make: records work on the batch that it is given, whose tensors stay where they are.
        """
        self.trained()
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        key = (kind, *((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, repr(v)) for k, v in batch.items()))
        if kind in self.refused or self._first(key):
            return None
        known = self.recordings[key] or self._recorded(kind, batch, tensors, make)
        if known is None:
            return None
        self.recordings[key] = known
        for name, value in tensors.items():
            known.inputs[name].copy_(value)
        return known.made

    def refuse(self, kind: str, why: str) -> None:
        """Run this kind as it is from now on, and say why."""
        self.refused.add(kind)
        self.recordings = {key: known for key, known in self.recordings.items() if key[0] != kind}
        log.warning("%s runs one kernel at a time, because its step cannot be recorded: %s", kind, why)

    def _first(self, key: Any) -> bool:
        """Whether this shape was never seen, or is one too many."""
        if key in self.recordings:
            return False
        if sum(k[0] == key[0] for k in self.recordings) < MOST:
            self.recordings[key] = None
        return True

    def _recorded(
        self, kind: str, batch: Batch, tensors: Mapping[str, Tensor], make: Callable[[Batch], Made]
    ) -> Recording[Made] | None:
        inputs = {name: value.clone() for name, value in tensors.items()}
        try:
            return Recording(inputs, make({**batch, **inputs}))
        except Exception as error:  # whatever it is: the work runs as it is next, and raises what is its own
            self.refuse(kind, first_line(error)[:160])
            return None
