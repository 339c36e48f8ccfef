"""How one factor of a site is stored: `SlotLinear`, a stock LoRA Linear whose `weight` is the folded factor.

The stock Parameter holds the *live* slots, a buffer `frozen` of the same module the constants; the class property
`weight` shadows the Parameter, so PEFT's own merge, save and `add_weighted_adapter` read live and frozen together;
`state_dict()` emits folded tensors, loading unfolds them.

Kinds: "A" rows [live; frozen] · "B" columns [live | frozen] · "T" a twin's B side, live = ΔB, frozen = [B0 | H]:
[B0 + ΔB | ΔB | H] beside A side [ΔA; A0; H_A], so that s·B'·A' = s·((B0 + ΔB)(A0 + ΔA) − B0·A0 + H·H_A), without
cancellation; H, H_A are the committed links of a chain.

Source: SLOT_STORAGE (measured against four other storages).
"""

from __future__ import annotations

import math
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralign.carrier.layer import fold_A, fold_B
from loralign.types import WorkFailed

GRID_BITS = 14
"""B0 is stored as a fixed-point number of this many bits below its largest entry: B0 = grid((B0 + ΔB) − ΔB) exactly."""


def to_grid(B: Tensor) -> Tensor:
    """g·round(B/g), g = 2^(⌈log2(max|B|·(1 − 2^−15))⌉ − 14): fp32 sums with |ΔB| ≤ 512·max|B| keep it exactly."""
    top = B.abs().max().item() * (1 - 2.0 ** -(GRID_BITS + 1)) if B.numel() else 0.0
    step = 2.0 ** (math.ceil(math.log2(top)) - GRID_BITS) if top else 1.0
    return torch.round(B.double() / step).mul(step).to(B.dtype)


def will_be_split() -> bool:
    """Whether accelerate was asked for FSDP, which it says by the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def axis_of(kind: str) -> int:
    return 0 if kind == "A" else 1


class SlotLinear(nn.Linear):
    """A stock LoRA Linear whose `weight` is the folded factor. Made by `convert`, never constructed."""

    kind: str
    frozen: Tensor
    owner: tuple[Any, str] | None
    """(layer, adapter) where the layer's form computes the factors; None: they are the stock tensors and slots."""

    @property
    def live(self) -> Tensor:
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def used(self) -> int:
        """Number of frozen slots."""
        return int(self.frozen.shape[axis_of(self.kind)])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        # must never raise AttributeError: nn.Module.__getattr__ would then hand out the live factor, silently
        live = self.live
        if isinstance(live, DTensor):
            return live
        if self.owner is not None:
            layer, adapter = self.owner
            return cast(Tensor, layer.lora_variant[adapter].dense(layer, adapter)[axis_of(self.kind)])
        return self.fold(live, self.frozen)

    def fold(self, live: Tensor, frozen: Tensor) -> Tensor:
        if self.kind == "A":
            return fold_A(live, frozen)
        return fold_B(live, frozen, twin=self.kind == "T")

    def unfold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = self.live.shape[axis_of(self.kind)]
        if self.kind == "T":
            live = weight[:, r : 2 * r]
            return live.contiguous(), torch.cat([to_grid(weight[:, :r] - live), weight[:, 2 * r :]], dim=1)
        live, frozen = weight.split([r, weight.shape[axis_of(self.kind)] - r], axis_of(self.kind))
        return live.contiguous(), frozen.contiguous()

    def folded(self, live: Tensor, frozen: Tensor | None = None) -> Tensor:
        """What a stock file holds; raises where the twin's B0 could not be recovered from it."""
        frozen = self.frozen if frozen is None else frozen
        live = live.detach().to(frozen.dtype) if self.kind == "T" else live.detach()
        weight = self.fold(live, frozen)
        if self.kind == "T" and not torch.equal(self.unfold(weight)[1], frozen.to(weight.device)):
            grown = 2 ** (22 - GRID_BITS)
            raise WorkFailed(f"the update of B has outgrown the start by more than {grown} times: the run has diverged")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> SlotLinear:
        keep = self.frozen  # constants never change dtype and never go to meta (cpu_ram_efficient_loading does that)
        super()._apply(fn, recurse)
        new = self._buffers["frozen"]
        self._buffers["frozen"] = keep if new is None or new.is_meta else keep.to(new.device)
        return self

    @property
    def raw(self) -> bool:
        """Live and frozen slots go apart into `state_dict()`."""
        # accelerate compares the dict before sharding with the one after, so both must be unfolded under FSDP
        return isinstance(self.live, DTensor) or will_be_split()

    def _save_to_state_dict(self, dest: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(dest, prefix, keep_vars)
        if self.live.is_meta:
            dest.pop(prefix + "frozen")
        elif not self.raw:
            owned = self.owner is not None
            dest[prefix + "weight"] = self.weight.detach() if owned else self.folded(self.live)
            del dest[prefix + "frozen"]

    def _load_from_state_dict(
        self,
        sd: dict[str, Any],
        prefix: str,
        meta: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        key, axis = prefix + "weight", axis_of(self.kind)
        rank = self.live.shape[axis]
        weight, frozen = sd.get(key), sd.pop(prefix + "frozen", None)
        if weight is not None and self.owner is not None and not self.raw:
            del sd[key]  # a folded form cannot be undone; the sidecar beside the file holds the live tensors
        elif weight is not None and weight.shape[axis] != rank:
            if self.kind == "T" and weight.shape[1] < 2 * rank:
                errors.append(f"{key}: rank {weight.shape[1]}, a twin of rank {rank} needs {2 * rank}")
                return
            sd[key], rest = self.unfold(weight)
            frozen = rest if frozen is None else frozen
        elif weight is not None and frozen is None and self.used and not self.raw:
            if self.kind == "T":
                errors.append(f"{key}: no frozen slots in this file, the model has {self.used}")
                return
            frozen = self.unfold(weight)[1]  # a chain before its first knot
        if frozen is not None:  # copied, because DCP loads in place and may hand over self.frozen itself
            self.frozen = frozen.to(self.frozen, copy=True)
        super()._load_from_state_dict(sd, prefix, meta, strict, missing, unexpected, errors)
        for gone in (prefix + "frozen", key if self.owner is not None else ""):
            if gone in missing:
                missing.remove(gone)


def convert(linear: nn.Linear, kind: str, frozen: Tensor, owner: tuple[Any, str] | None) -> None:
    """Turn a stock Linear into a `SlotLinear`, or a `SlotLinear` into one of another kind; the Parameter stays."""
    linear.__class__ = SlotLinear
    slots = cast(SlotLinear, linear)
    slots.kind = kind
    slots.__dict__["owner"] = owner  # not an attribute of Module's kind: the layer is no child of its own child
    slots.register_buffer("frozen", frozen.detach().to(slots.live.device))
