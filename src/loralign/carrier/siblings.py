"""Layers that read one input make one product with all their A: h = x·[A_q; A_k; A_v]ᵀ, in compiled blocks.

Three thin products read x three times, in forward and for the gradients of A, and their gradients of x are three
tensors of its size to be summed; one product does each of it once. Which layers belong together is seen in a call of
their block. Not under activation checkpointing, where one layer may leave nothing for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loralign.carrier.layer import fold_A, fold_B
from loralign.carrier.slot import LowRankVariant
from loralign.carrier.storage import SlotLinear


class Siblings:
    """The layers of one input, in the order of their calls; holds what it computed from the first to the last."""

    def __init__(self, layers: Sequence[Any], adapter: str) -> None:
        self.layers, self.adapter = list(layers), adapter
        self.x: Tensor | None = None
        self.parts: list[Tensor] = []

    def features(self, layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x·Aᵀ of one of the layers, with its frozen slots."""
        if self.x is not x:
            factors = [_whole_A(other, self.adapter).to(dtype) for other in self.layers]
            h = nn.functional.linear(x.to(dtype), torch.cat(factors))
            self.x, self.parts = x, list(h.split([A.shape[0] for A in factors], dim=-1))
        place = [other is layer for other in self.layers].index(True)
        h = self.parts[place]
        if place == len(self.layers) - 1:
            self.x, self.parts = None, []
        return h

    def forward(self, layer: Any, x: Tensor, base: Tensor, s: float) -> Tensor:
        """base + s·x·Aᵀ·Bᵀ."""
        side = layer.lora_B[self.adapter]
        frozen, twin = (side.frozen, side.kind == "T") if isinstance(side, SlotLinear) else (None, False)
        B = fold_B(side._parameters["weight"], frozen, twin=twin).to(base.dtype)
        return torch.add(base, nn.functional.linear(self.features(layer, x, base.dtype), B), alpha=s)


def _whole_A(layer: Any, adapter: str) -> Tensor:
    side = layer.lora_A[adapter]
    return fold_A(side._parameters["weight"], side.frozen if isinstance(side, SlotLinear) else None)


def share_inputs(block: nn.Module, others: Sequence[nn.Module], call: Callable[[], Any]) -> None:
    """Let layers of one input share their product with A in a block and others of its kind.

    call: runs the block, as it is, on an input such as it gets.
    """
    alike = [b for b in others if type(b) is type(block) and not _checkpoints(b)]
    shared = _of_one_input(block, call) if alike else []
    for one in alike:
        inside = dict(one.named_modules())
        for names in shared:
            _join([inside.get(name) for name in names])


def _checkpoints(block: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in block.modules())


def apart(blocks: Sequence[nn.Module]) -> None:
    """Every layer by itself again."""
    for layer in (m for block in blocks for m in block.modules() if isinstance(m, LoraLayer)):
        for variant in layer.lora_variant.values():
            if isinstance(variant, LowRankVariant):
                variant.siblings = None


def _of_one_input(block: nn.Module, call: Callable[[], Any]) -> list[list[str]]:
    """Names of the adapted layers that were given the same tensor."""
    seen: list[tuple[Tensor, str]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((args[0], name)) if args else None)
        for name, layer in block.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for _, name in seen]
    groups: dict[int, list[str]] = {}
    for x, name in seen:
        if names.count(name) == 1:  # an expert that is called again has other rows
            groups.setdefault(id(x), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _join(layers: Sequence[Any]) -> None:
    """Let these layers share where they can: plain factors, no dropout, one adapter."""
    adapters = {name for layer in layers if isinstance(layer, LoraLayer) for name in layer.lora_variant}
    if len(adapters) != 1 or not all(isinstance(layer, LoraLayer) for layer in layers):
        return
    (adapter,) = adapters
    variants = [layer.lora_variant.get(adapter) for layer in layers]
    if not all(isinstance(v, LowRankVariant) and v.form.facts.identity for v in variants):
        return
    if not all(isinstance(layer.lora_dropout[adapter], nn.Identity) for layer in layers):
        return
    shared = Siblings(layers, adapter)
    for variant in variants:
        variant.siblings = shared
