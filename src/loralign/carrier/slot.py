"""Slots inside stock PEFT LoRA layers: the one file that touches PEFT's insides.

Per site the stock Parameters of `lora_A[adapter]` and `lora_B[adapter]` hold the *live* factors. Where there are frozen
slots (a twin, links of a chain) or a form, those two Linears become `SlotLinear`: a buffer `frozen` of the same module
holds the constants, and the class property `weight` returns the *folded* factor, so that PEFT's own merge, save and
`add_weighted_adapter` read live and frozen together; `state_dict()` emits folded tensors, loading unfolds them. The
forward goes through PEFT's per-layer variant slot into `layer.low_rank`. W0 is never written.

Kinds: "A" rows [live; frozen] · "B" columns [live | frozen] · "T" a twin's B side, live = ΔB, frozen = B0:
[B0 + ΔB | ΔB] beside A side [ΔA; A0], so that s·B'·A' = s·((B0 + ΔB)(A0 + ΔA) − B0·A0), without cancellation.

Source: SLOT_STORAGE (measured against four other storages). Uses, beyond PEFT's public API: `LoraVariant`,
`layer.lora_variant`, `layer.frozen_peft_weight_names`, `layer.cast_input_dtype_enabled`; `slot_check` checks them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loralign.carrier.layer import fold_A, fold_B, low_rank
from loralign.types import Factors, Form, Live, LoralignError, WorkFailed

GRID_BITS = 14
"""B0 is stored as a fixed-point number of this many bits below its largest entry: B0 = grid((B0 + ΔB) − ΔB) exactly."""


def to_grid(B: Tensor) -> Tensor:
    """g·round(B/g), g = 2^(⌈log2(max|B|·(1 − 2^−15))⌉ − 14): fp32 sums with |ΔB| ≤ 512·max|B| keep it exactly."""
    top = B.abs().max().item() * (1 - 2.0 ** -(GRID_BITS + 1)) if B.numel() else 0.0
    step = 2.0 ** (math.ceil(math.log2(top)) - GRID_BITS) if top else 1.0
    return torch.round(B.double() / step).mul(step).to(B.dtype)


def _axis(kind: str) -> int:
    return 0 if kind == "A" else 1


class SlotLinear(nn.Linear):
    """A stock LoRA Linear whose `weight` is the folded factor. Made by `_convert`, never constructed."""

    kind: str
    frozen: Tensor
    owner: tuple[Any, str] | None

    @property
    def live(self) -> Tensor:
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def used(self) -> int:
        """Number of frozen slots."""
        return int(self.frozen.shape[_axis(self.kind)])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        # must never raise AttributeError: nn.Module.__getattr__ would then hand out the live factor, silently
        live = self.live
        if isinstance(live, DTensor):
            return live
        if self.owner is not None:
            return effective(*self.owner)[_axis(self.kind)]
        return self.fold(live, self.frozen)

    def fold(self, live: Tensor, frozen: Tensor) -> Tensor:
        if self.kind == "A":
            return fold_A(live, frozen)
        return fold_B(live, frozen, twin=self.kind == "T")

    def unfold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = self.live.shape[_axis(self.kind)]
        if self.kind == "T":
            return weight[:, r:].contiguous(), to_grid(weight[:, :r] - weight[:, r:])
        live, frozen = weight.split([r, weight.shape[_axis(self.kind)] - r], _axis(self.kind))
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

    def _raw(self) -> bool:
        # accelerate compares the dict before sharding with the one after, so both must be unfolded under FSDP
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
        return isinstance(self.live, DTensor) or fsdp

    def _save_to_state_dict(self, dest: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(dest, prefix, keep_vars)
        if self.live.is_meta:
            dest.pop(prefix + "frozen")
        elif not self._raw():
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
        key, axis = prefix + "weight", _axis(self.kind)
        rank = self.live.shape[axis]
        weight, frozen = sd.get(key), sd.pop(prefix + "frozen", None)
        if weight is not None and self.owner is not None:
            del sd[key]  # a folded form cannot be undone; the sidecar beside the file holds the live tensors
            missing.append(key)
        elif weight is not None and weight.shape[axis] != rank:
            if self.kind == "T" and weight.shape[1] != 2 * rank:
                errors.append(f"{key}: rank {weight.shape[1]}, a twin of rank {rank} needs {2 * rank}")
                return
            sd[key], rest = self.unfold(weight)
            frozen = rest if frozen is None else frozen
        elif weight is not None and frozen is None and self.used and not self._raw():
            errors.append(f"{key}: no frozen slots in this file, the model has {self.used}")
            return
        if frozen is not None:  # copied, because DCP loads in place and may hand over self.frozen itself
            self.frozen = frozen.to(self.frozen, copy=True)
        super()._load_from_state_dict(sd, prefix, meta, strict, missing, unexpected, errors)
        for gone in (prefix + "frozen", key if self.owner is not None else ""):
            if gone in missing:
                missing.remove(gone)


class LowRankVariant(LoraVariant):
    """PEFT's per-layer slot filled with `layer.low_rank`; merge and unmerge read the same folded factors."""

    def __init__(self, form: Form, neighbours: Sequence[Any] = ()) -> None:
        self.form = form
        self.neighbours = list(neighbours)

    def supports_lora_conversion(self) -> bool:
        return self.form.exact

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the init wrote the factors after injection."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        side_A, side_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, s = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        x = x if dropout.__class__ is nn.Identity else dropout(x)
        A, B = side_A._parameters["weight"], side_B._parameters["weight"]
        if side_A.__class__ is not SlotLinear:
            return low_rank(result, x, A, B, s)
        if side_A.owner is None:
            A0, B0 = side_A._buffers["frozen"], side_B._buffers["frozen"]
            return low_rank(result, x, A, B, s, A0=A0, B0=B0, twin=side_B.kind == "T")
        return low_rank(result, x, *effective(module, active_adapter), s)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def live_of(layer: Any, adapter: str) -> Live:
    """The live and frozen tensors of one layer, as its form sees them."""
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    extra = {n: getattr(layer, n)[adapter] for n in getattr(layer, "loralign_extra", {}).get(adapter, ())}
    extra = {n.removeprefix("lora_"): p for n, p in extra.items()}
    if not isinstance(side_A, SlotLinear):
        A, B = side_A.weight, side_B.weight
        return Live(A, B, A.new_zeros(0, A.shape[1]), B.new_zeros(B.shape[0], 0), extra)
    return Live(side_A.live, side_B.live, side_A.frozen, side_B.frozen, extra)


def effective(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The folded factors (A (R, d_in), B (d_out, R)), W_eff = W0 + s·B·A; differentiable in the live tensors."""
    variant = layer.lora_variant.get(adapter)
    own = live_of(layer, adapter)
    if isinstance(variant, LowRankVariant) and not variant.form.identity:
        return variant.form.effective(own, [live_of(other, adapter) for other in variant.neighbours])
    twin = getattr(layer.lora_B[adapter], "kind", "") == "T"
    return fold_A(own.A, own.A0), fold_B(own.B, own.B0, twin=twin)


def _convert(linear: nn.Linear, kind: str, frozen: Tensor, owner: tuple[Any, str] | None) -> None:
    linear.__class__ = SlotLinear
    slots = cast(SlotLinear, linear)
    slots.kind = kind
    slots.__dict__["owner"] = owner  # not an attribute of Module's kind: the layer is no child of its own child
    slots.register_buffer("frozen", frozen.detach().to(slots.live.device))


def install(layer: Any, adapter: str, factors: Factors, form: Form, extra: dict[str, Tensor], chain: bool) -> None:
    """Write one site's start, in place: live factors, twin or chain storage, the form's tensors, the variant.

    chain: live slots may be committed to frozen ones later. Raises LoralignError on layers that have no plain
    pair of Linears.
    """
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(side_A, nn.Linear) or not isinstance(side_B, nn.Linear) or side_B._parameters["bias"] is not None:
        raise LoralignError(f"{type(layer).__name__} has no plain pair of factors; leave it out of `targets`")
    A, B = factors.A.to(side_A.weight), factors.B.to(side_B.weight)
    with torch.no_grad():
        side_A.weight.copy_(torch.zeros_like(A) if factors.twin else A)
        side_B.weight.copy_(torch.zeros_like(B) if factors.twin else B)
    owner = None if form.identity else (layer, adapter)
    if factors.twin:
        _convert(side_A, "A", factors.A.float(), owner)
        _convert(side_B, "T", to_grid(factors.B.float()), owner)
    elif chain or owner is not None:
        _convert(side_A, "A", A.new_zeros(0, A.shape[1]), owner)
        _convert(side_B, "B", B.new_zeros(B.shape[0], 0), owner)
    names = []
    for name, value in extra.items():
        names.append(f"lora_{name}")
        if not hasattr(layer, names[-1]):
            setattr(layer, names[-1], nn.ParameterDict())
        getattr(layer, names[-1])[adapter] = nn.Parameter(value.detach().clone().to(A))
    layer.loralign_extra = {**getattr(layer, "loralign_extra", {}), adapter: tuple(names)}
    layer.adapter_layer_names = tuple(dict.fromkeys((*layer.adapter_layer_names, *names)))
    layer.lora_variant[adapter] = LowRankVariant(form)
    layer.cast_input_dtype_enabled = False
    freeze(layer, adapter, tuple({"A": "lora_A", "B": "lora_B"}[f] for f in "AB" if f not in factors.train))


def freeze(layer: Any, adapter: str, names: tuple[str, ...]) -> None:
    """Keep these factors constant, also through PEFT's `set_adapter` and `set_requires_grad`."""
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: names}
    for name in ("lora_A", "lora_B"):
        for parameter in getattr(layer, name)[adapter]._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(name not in names)


def link(layers: dict[str, Any], adapter: str, form: Form) -> None:
    """Give cross-layer forms their neighbours; plain references, outside the module tree."""
    for name, layer in layers.items():
        layer.lora_variant[adapter].neighbours = [layers[n] for n in form.neighbours(name, list(layers))]


def whole(t: Tensor) -> Tensor:
    """The full tensor of a possibly sharded one."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def parted(t: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same on every rank, sharded as `like` is; without communication."""
    if not isinstance(like, DTensor) or isinstance(t, DTensor):
        return t
    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def write(p: Tensor, value: Tensor) -> None:
    """Write a full tensor into a possibly sharded Parameter, keeping its identity."""
    if isinstance(p, DTensor):
        local = distribute_tensor(value.to(p.device), p.device_mesh, p.placements).to_local()
        p.to_local().copy_(local)
    else:
        p.copy_(value)


@torch.no_grad()
def add_frozen(layer: Any, adapter: str, A: Tensor, B: Tensor) -> None:
    """Append constant slots, A (f, d_in) and B (d_out, f), to the frozen ones; W_eff follows as the form says."""
    sides = layer.lora_A[adapter], layer.lora_B[adapter]
    for side, value in zip(sides, (A, B), strict=True):
        if not isinstance(side, SlotLinear):
            raise LoralignError("this adapter has no room for frozen slots: a rule that adds some needs its own form")
        side.frozen = torch.cat([side.frozen, whole(value).to(side.frozen)], _axis(side.kind))


@torch.no_grad()
def commit(layer: Any, adapter: str, fresh: Factors) -> None:
    """Live slots become frozen ones, `fresh` the live link; Parameters keep their identity, W_eff is unchanged."""
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    add_frozen(layer, adapter, side_A.live, side_B.live)
    write(side_A.live, fresh.A.to(side_A.frozen))
    write(side_B.live, fresh.B.to(side_B.frozen))


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(m, LoraLayer) for m in model.modules())
