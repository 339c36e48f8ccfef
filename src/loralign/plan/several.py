"""What one of several GPUs holds: under FSDP2 its share of the parameters and the blocks that are whole for a moment.

    shards        parameters / N, buffers (frozen slots) whole
    gathered      two decoder blocks, one at work and the next one, and the larger of the embedding and the head with
                  its norm, in the dtype of the products
    gradients     / N; whole where several micro-batches are summed, since they are exchanged after the last one
    state, step   / N where every number steps by itself, else whole on each: a pair is gathered to be stepped
    activations   of the own micro-batch

Without FSDP (DDP) each holds everything, and the gradients once more in the buckets that are exchanged.
Left out are the buffers of NCCL and what the allocator keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from loralign.plan.trace import Step

E = TypeVar("E", bound=Any)


@dataclass(frozen=True)
class Layout:
    """gpus: how many. sharded: by FSDP2; else DDP."""

    gpus: int = 1
    sharded: bool = False

    def part(self, count: int) -> int:
        return -(-count // self.gpus)


ALONE = Layout()


@dataclass(frozen=True)
class Load:
    """What one process without company holds beside its weights and its state."""

    activations: int
    """Gradients left out."""
    gradients: int
    stepping: int
    """Of the optimizer's step, gradients included."""
    constant: int
    """Frozen slots, and what masters need beyond the shards of the weights; on each GPU."""
    apart: bool
    """Every number steps by itself."""


def spread(whole: E, model: nn.Module, step: Step, layout: Layout, load: Load) -> E:
    """The estimate of one GPU of several."""
    if layout.gpus == 1:
        return whole
    if not layout.sharded:
        held = whole.weights_bytes + whole.adapter_bytes + whole.optimizer_bytes
        moment = load.activations + load.gradients
        peak = held + load.gradients + max(moment, load.stepping)
        return replace(whole, activation_bytes=moment + load.gradients, peak_bytes=peak)
    shards = sharded_bytes(model, layout) + load.constant
    live = 0 if not whole.adapter_bytes else layout.part(load.gradients) + load.constant
    summed = load.gradients if step.micro_batches > 1 else layout.part(load.gradients)
    state = layout.part(whole.optimizer_bytes) if load.apart else whole.optimizer_bytes
    stepping = layout.part(load.stepping) if load.apart else load.stepping + load.gradients + summed
    gathered, moment = gathered_bytes(model, step), load.activations + summed
    return replace(
        whole,
        weights_bytes=shards - live,
        adapter_bytes=live,
        optimizer_bytes=state,
        activation_bytes=moment,
        gathered_bytes=gathered,
        start_bytes=0,
        peak_bytes=shards + state + max(gathered + moment, stepping),
    )


def gathered_bytes(model: nn.Module, step: Step) -> int:
    """Of what FSDP2, as accelerate wraps a Transformers model, holds whole at its fullest moment."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    inside = {id(p) for block in blocks for p in block.parameters()}
    found: Any = model
    ends = [found.get_input_embeddings(), found.get_output_embeddings()]
    embedding = sum(_size(p, step) for p in (ends[0].parameters() if ends[0] is not None else ()))
    outside = sum(_size(p, step) for p in _once(model.parameters()) if id(p) not in inside)
    tied = ends[0] is not None and ends[1] is not None and ends[0].weight is ends[1].weight
    units = [sum(_size(p, step) for p in _once(block.parameters())) for block in blocks]
    return 2 * max(units, default=0) + (outside if tied or not units else max(embedding, outside - embedding))


def sharded_bytes(model: nn.Module, layout: Layout) -> int:
    """Parameters by share, buffers whole."""
    parameters = sum(layout.part(p.numel()) * p.element_size() for p in _once(model.parameters()))
    return parameters + sum(b.numel() * b.element_size() for b in _once(model.buffers()))


def _size(p: Tensor, step: Step) -> int:
    return p.numel() * (2 if step.bf16 and p.is_floating_point() else p.element_size())


def _once(tensors: Iterable[Any]) -> list[Any]:
    return list({id(t): t for t in tensors}.values())
