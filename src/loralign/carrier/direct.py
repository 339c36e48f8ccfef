"""The straight way from a LoRA layer to its variant.

PEFT's forward reads the dtype of `lora_A.weight`, for which the slots would be folded, and a form's factors made, once
more in every forward.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor

from loralign.carrier.slot import LowRankVariant


class DirectLinear(Linear):
    """PEFT's LoRA layer around a Linear; the same, but that our variants are called at once while no others are active.
    Made by `make_direct`, never constructed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        variants = self.lora_variant
        active = [name for name in self.active_adapters if name in self.lora_A]
        ours = all(variants.get(name).__class__ is LowRankVariant for name in active)
        if args or kwargs or self.disable_adapters or self.merged or not ours:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        for name in active:
            result = variants[name].forward(self, active_adapter=name, x=x, result=result)
        return result.to(dtype)


def make_direct(layer: Any) -> None:
    """Layers around quantised weights stay as they are."""
    if layer.__class__ is Linear:
        layer.__class__ = DirectLinear
