"""The start-up check that the installed PEFT works as `slot.py` expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from loralign.carrier.layer import fold_A, fold_B
from loralign.carrier.slot import Own, install
from loralign.maths.operators import Dense
from loralign.types import Draw, Facts, Live, Operator, Start, Weight, WorkFailed


@torch.no_grad()
def self_test() -> None:
    """Attach a twin to a toy layer, run, merge, unmerge and save; raises where this PEFT does not behave (2 ms)."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 3, bias=False)

    state = torch.get_rng_state()
    toy: Any = inject_adapter_in_model(LoraConfig(r=1, lora_alpha=2, target_modules=["map"]), Toy())
    layer, x = toy.map, torch.arange(8.0).view(2, 4)
    base = layer.base_layer(x)
    install(layer, "default", Start(torch.ones(1, 4), torch.ones(3, 1), twin=True), _PlainForm(), Own(), chain=False)
    same = torch.equal(layer(x), base)
    layer.lora_B["default"].live.add_(0.5)
    moved = base + 2 * (x @ torch.ones(4, 1)) @ torch.full((1, 3), 0.5)
    forward = torch.allclose(layer(x), moved)
    width = 1 if layer.lora_B["default"].raw else 2  # FSDP wants live and frozen apart
    saved = tuple(layer.state_dict()["lora_B.default.weight"].shape) == (3, width)
    layer.merge()
    merged = torch.allclose(layer(x), moved)
    layer.unmerge()
    torch.set_rng_state(state)
    if not (same and forward and saved and merged and torch.allclose(layer(x), moved)):
        raise WorkFailed("this version of PEFT changed its layer variants; install peft>=0.21,<0.22 (tested: 0.21.2)")


class _PlainForm:
    """The form of the toy layer: its twin's folded factors."""

    facts = Facts(identity=True)

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    constants = trained

    def shared(self) -> Mapping[str, Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        return Dense(fold_A(own.A, own.A0)), Dense(fold_B(own.B, own.B0, twin=True))
