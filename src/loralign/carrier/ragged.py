"""Layers that differ in their number of slots alone run one piece of compiled code.

Ranks grow with depth, links of a chain leave more slots in some layers than in others. torch.compile takes the sizes of
Parameters and buffers for constants, so a block would be compiled for every rank by itself. Where tensors of one place
in blocks of one type differ in size, the axis in which they do is left open; so is the number of slots that links left.
All other sizes stay constants. 0 and 1 are compiled for by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

OPEN: Mapping[str, Any] = {"force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False}
"""Dynamo's settings under which an axis of a Parameter or of a buffer may be left open."""


def leave_open(t: Tensor, axis: int) -> None:
    """Code that is compiled from now on takes t with any size of this axis."""
    maybe_mark_dynamic(t, axis)


def leave_ranks_open(blocks: Sequence[nn.Module]) -> None:
    """For blocks that carry their adapters, before they are compiled."""
    places: dict[tuple[type, str], list[Tensor]] = {}
    for block in blocks:
        for name, t in _adapters(block):
            places.setdefault((type(block), name), []).append(t)
    for alike in places.values():
        if len({t.dim() for t in alike}) > 1:
            continue
        for axis, sizes in enumerate(zip(*(t.shape for t in alike), strict=True)):
            if len(set(sizes)) > 1:
                for t in alike:
                    leave_open(t, axis)


def _adapters(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What LoRA layers hold besides their base weights, by its place in the block."""
    for place, layer in block.named_modules():
        if isinstance(layer, LoraLayer):
            for name, child in layer.named_children():
                if name != "base_layer":
                    held = (*child.named_parameters(), *child.named_buffers())
                    yield from ((f"{place}.{name}.{of}", t) for of, t in held)
