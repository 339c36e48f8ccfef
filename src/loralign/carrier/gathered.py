"""A state dict in which live and frozen slots stand apart, as FSDP2 and accelerate gather it, folded for PEFT."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralign.carrier.slot import constants_of, trained_of
from loralign.carrier.storage import SlotLinear
from loralign.types import Live, LoralignError

SIDES = ("lora_A", "lora_B")


def fold_gathered(model: nn.Module, adapter: str, state: dict[str, Tensor]) -> None:
    """Replace the live factors in `state` by folded ones: by their slots, or by what the form makes of its tensors."""
    apart: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A and f"{name}.lora_A.{adapter}.frozen" in state:
            if any(isinstance(state[f"{name}.{side}.{adapter}.weight"], DTensor) for side in SIDES):
                raise LoralignError("sharded model: pass state_dict=accelerator.get_state_dict(model)")
            apart[name] = layer
    seen = {id(layer): _live(name, layer, adapter, state) for name, layer in apart.items()}
    for name, layer in apart.items():
        live, folded = seen[id(layer)], []
        side_A: SlotLinear = layer.lora_A[adapter]
        if side_A.owner is not None:
            variant = layer.lora_variant[adapter]
            made = variant.form.factors(live, [seen[id(other)] for other in variant.neighbours])
            folded = [factor.dense().to(live.A) for factor in made]
        else:
            folded = [side_A.folded(live.A, live.A0), layer.lora_B[adapter].folded(live.B, live.B0)]
        for side, value in zip(SIDES, folded, strict=True):
            state[f"{name}.{side}.{adapter}.weight"] = value.detach()


def _live(name: str, layer: Any, adapter: str, state: dict[str, Tensor]) -> Live:
    """The tensors of one layer, taken out of the state where PEFT knows no such name."""
    A, B = (state[f"{name}.{side}.{adapter}.weight"] for side in SIDES)
    A0, B0 = (state.pop(f"{name}.{side}.{adapter}.frozen").to(A.device) for side in SIDES)
    own = {n: state[f"{name}.lora_{n}.{adapter}"] for n in trained_of(layer, adapter)}
    own |= {n: value.to(A.device) for n, value in constants_of(layer, adapter).items()}
    variant = layer.lora_variant[adapter]
    shared = {n: state[f"base_model.lora_shared.{n}"] for n in getattr(variant, "shared", {})}
    return Live(A, B, A0, B0, own, shared, variant.links)
