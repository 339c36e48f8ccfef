"""What layers hand to later ones within one forward of the model: inputs, or features A·x.

    inputs     x_n ← x_n + x_{n−1}                  (x_n + x_n at the start of a chain)
    features   A_n·x_n ← A_n·x_n + Σ_k A_{n−k}·x_{n−k}

From neighbour to neighbour, and no further than where the input or output size changes; features end where their number
changes, too, for there is no sum of them.

Held from the start of the model's forward to its end and no longer, so backward keeps what autograd keeps. A layer that
runs outside of it, as under activation checkpointing, has no inputs of the others, and says so.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loralign.carrier.direct import make_direct
from loralign.carrier.layer import low_rank
from loralign.carrier.slot import constants_of
from loralign.carrier.storage import SlotLinear
from loralign.carrier.together import Pass, Together
from loralign.maths.operators import Dense
from loralign.types import Form, LoralignError

REFUSED = (
    "this method hands inputs from layer to layer, which activation checkpointing does not compute again: switch "
    "gradient_checkpointing off, or use `shortcut: bs`, which needs no inputs of other layers"
)


class Handed:
    """What one layer left in this forward, None before that. It stands beside the layer, not in a table of all layers:
    compiled code would be made for the layer's own key in it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


class Path(Pass):
    """The inputs or features of one forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.begun = False
        self.handed: list[Handed] = []
        """Of every layer."""

    def begin(self, model: nn.Module) -> None:
        if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise LoralignError(REFUSED)
        self.begun = True

    def end(self) -> None:
        self.begun = False
        for handed in self.handed:
            handed.value = None

    def held(self) -> Any:
        return self.begun, [handed.value for handed in self.handed], super().held()

    def hold(self, held: Any) -> None:
        self.begun, values, rest = held
        for handed, value in zip(self.handed, values, strict=True):
            handed.value = value
        super().hold(rest)

    def joined(self, variant: Any, adapter: str, own: Tensor) -> Tensor:
        """`own` and what the layers before it left in this forward."""
        if not self.begun:
            raise LoralignError(REFUSED)
        variant.handed.value = own
        before = [other.lora_variant[adapter].handed.value for other in variant.neighbours]
        found = [value for value in before if value is not None]
        if any(other.shape != own.shape for other in found):
            raise LoralignError(
                "this method adds inputs of one layer to another's, and these see different rows (experts, another "
                "length): use `shortcut: bs`"
            )
        if self.kind == "inputs" and not before:
            found = [own]
        return own + sum(other.to(own.device) for other in found) if found else own

    def forward(self, layer: Any, adapter: str, x: Tensor, base: Tensor, *, writable: bool) -> Tensor:
        """base + s·B·A·(joined inputs), or base + s·B·(joined features)."""
        side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
        dropout, s, variant = layer.lora_dropout[adapter], layer.scaling[adapter], layer.lora_variant[adapter]
        if self.kind == "inputs":
            _note(layer, adapter, x)
            x = dropout(self.joined(variant, adapter, x))
            return low_rank(base, x, side_A.live, side_B.live, s, writable=writable)
        h = Dense(side_A.live).matmul(dropout(x).to(base.dtype))
        _note(layer, adapter, h)
        return Dense(side_B.live).add_to(base, self.joined(variant, adapter, h), s)


@torch.no_grad()
def _note(layer: Any, adapter: str, value: Tensor) -> None:
    """Remember the norm of what a training forward saw, the oldest one makes room."""
    if layer.training:
        kept = constants_of(layer, adapter)
        norms, seen = kept["norms"], kept["seen"]
        norms.index_copy_(0, (seen % norms.numel()).view(1), value.norm().view(1).to(norms))
        seen.add_(1)


def wire(model: PeftModel, layers: dict[str, Any], adapter: str, form: Form) -> None:
    """The way from layer to variant, the neighbours of cross-layer forms, and all layers for forms that make many
    factors at once; plain references, outside the module tree."""
    path = Path(form.facts.path) if form.facts.path else None
    together = Together(list(layers.values()), adapter, form) if form.facts.together else None
    for during in (p for p in (path, together) if p is not None):
        during.watch(model.base_model)
        during.watch(model.get_base_model())  # `generate` calls it alone
    for name, layer in layers.items():
        variant = layer.lora_variant[adapter]
        variant.together = together
        make_direct(layer)
        variant.neighbours = [layers[n] for n in form.neighbours(name, list(layers))]
        if path is not None:
            variant.neighbours = _linked(layer, variant.neighbours, adapter, path.kind)
            variant.path, variant.handed = path, Handed()
            path.handed.append(variant.handed)


def _linked(layer: Any, before: list[Any], adapter: str, kind: str) -> list[Any]:
    own = _sizes(layer, adapter, kind)
    return list(takewhile(lambda other: _sizes(other, adapter, kind) == own, before))


def _sizes(layer: Any, adapter: str, kind: str) -> tuple[int, ...]:
    A: SlotLinear = layer.lora_A[adapter]
    (r, d_in), d_out = A.live.shape, layer.lora_B[adapter].live.shape[0]
    return (d_in, d_out, r) if kind == "features" else (d_in, d_out)
