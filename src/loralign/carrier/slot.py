"""Slots inside stock PEFT LoRA layers: what a form computes, how a start is written.

Per site the stock Parameters of `lora_A[adapter]` and `lora_B[adapter]` hold the *live* factors. Where there are frozen
slots (a twin, links of a chain) or a form, those two Linears become `SlotLinear` (`storage.py`). The forward goes
through PEFT's per-layer variant slot into `layer.low_rank`, or into the form's operators. W0 is never written.

Source: SLOT_STORAGE. Uses, beyond PEFT's public API: `LoraVariant`, `layer.lora_variant`,
`layer.frozen_peft_weight_names`, `layer.cast_input_dtype_enabled`, `BufferDict`; `slot_check` checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loralign.carrier.layer import applied, fold_A, fold_B, low_rank, watched
from loralign.carrier.storage import SlotLinear, convert, to_grid
from loralign.types import Form, Live, LoralignError, Operator, Start, Train


class LowRankVariant(LoraVariant):
    """PEFT's per-layer slot filled with `layer.low_rank`; merge and unmerge read the same folded factors."""

    def __init__(self, form: Form, shared: Mapping[str, nn.Parameter], neighbours: Sequence[Any] = ()) -> None:
        self.form = form
        self.shared = shared
        self.neighbours = list(neighbours)
        self.path: Any = None
        """What hands inputs from layer to layer (`path.py`); None for forms that stay in their layer."""
        self.handed: Any = None
        """What this layer handed on in the forward that runs."""
        self.together: Any = None
        """What makes the factors of all layers at once (`together.py`); None for forms that make one by one."""
        self.siblings: Any = None
        """The layers that share this one's input in compiled blocks (`siblings.py`); None: it is by itself."""
        self.links: tuple[int, ...] = ()
        """How many frozen slots each commit left, oldest first."""
        self.train: Train = "AB"
        """The factors that train in this link."""

    def supports_lora_conversion(self) -> bool:
        return self.form.facts.exact

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the init wrote the factors after injection."""

    def operators(self, layer: Any, adapter: str) -> tuple[Operator, Operator]:
        """What the form makes of the layer's tensors, A (R, d_in) and B (d_out, R)."""
        made: tuple[Operator, Operator] | None = self.together.of(layer) if self.together is not None else None
        if made is not None:
            return made
        live, others = live_of(layer, adapter), [live_of(other, adapter) for other in self.neighbours]
        kind = live.A.device.type
        # a form's own products, such as a norm, are of the factors' precision; `plan` traces on meta, which has no
        # autocast, and torch 2.11's dynamo does not know `is_autocast_available`
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.form.factors(live, others)
        return self.form.factors(live, others)

    def dense(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = self.operators(layer, adapter)
        like = layer.lora_A[adapter]._parameters["weight"]
        return A.dense().to(like), B.dense().to(like)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        side_A, side_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, s = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        fresh = not watched(module)
        if side_A.__class__ is SlotLinear and side_A.owner is not None:
            variant = module.lora_variant[active_adapter]
            if variant.path is not None:
                return variant.path.forward(module, active_adapter, x, result, writable=fresh)
            A, B = variant.operators(module, active_adapter)
            return applied(result, x, A, B, s, dropout, writable=fresh)
        siblings = module.lora_variant[active_adapter].siblings if torch.compiler.is_compiling() else None
        if siblings is not None:
            y: Tensor = siblings.forward(module, x, result, s)
            return y
        x = x if dropout.__class__ is nn.Identity else dropout(x)
        A, B = side_A._parameters["weight"], side_B._parameters["weight"]
        if side_A.__class__ is not SlotLinear:
            return low_rank(result, x, A, B, s, writable=fresh)
        A0, B0 = side_A._buffers["frozen"], side_B._buffers["frozen"]
        return low_rank(result, x, A, B, s, A0=A0, B0=B0, twin=side_B.kind == "T", writable=fresh)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class _CastForOthers:
    """PEFT's switch "cast x to the dtype of A": off while only our adapters are active, which cast by themselves."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __bool__(self) -> bool:
        ours = self.layer.lora_variant
        return not all(isinstance(ours.get(name), LowRankVariant) for name in self.layer.active_adapters)


TRAINED, CONSTANT = "loralign_trained", "loralign_constant"
"""Attributes of a layer: {adapter: names of the form's own tensors}."""


def trained_of(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The form's own trained tensors of one layer, by name."""
    return {n: getattr(layer, f"lora_{n}")[adapter] for n in getattr(layer, TRAINED, {}).get(adapter, ())}


def constants_of(layer: Any, adapter: str) -> dict[str, Tensor]:
    """The form's own constant tensors of one layer, by name."""
    return {n: getattr(layer, f"loralign_{n}")[adapter] for n in getattr(layer, CONSTANT, {}).get(adapter, ())}


def shared_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that the form keeps once for the whole model, by name."""
    return dict(getattr(model, "lora_shared", {}) or {})


def form_of(layer: Any, adapter: str) -> Form | None:
    """The form that a layer's adapter was installed with, None before that."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return variant.form if isinstance(variant, LowRankVariant) else None


def live_of(layer: Any, adapter: str) -> Live:
    """The live and frozen tensors of one layer, as its form sees them."""
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    own = {**trained_of(layer, adapter), **constants_of(layer, adapter)}
    variant = layer.lora_variant.get(adapter)
    shared = getattr(variant, "shared", {})
    if not isinstance(side_A, SlotLinear):
        A, B = side_A.weight, side_B.weight
        return Live(A, B, A.new_zeros(0, A.shape[1]), B.new_zeros(B.shape[0], 0), own, shared)
    return Live(side_A.live, side_B.live, side_A.frozen, side_B.frozen, own, shared, variant.links)


def effective(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The folded factors (A (R, d_in), B (d_out, R)), W_eff = W0 + s·B·A; differentiable in the live tensors."""
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, LowRankVariant) and not variant.form.facts.identity:
        return variant.dense(layer, adapter)
    own = live_of(layer, adapter)
    twin = getattr(layer.lora_B[adapter], "kind", "") == "T"
    return fold_A(own.A, own.A0), fold_B(own.B, own.B0, twin=twin)


@dataclass(frozen=True)
class Own:
    """A form's tensors for one site, and those of the model that all sites share."""

    trained: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, nn.Parameter] = field(default_factory=dict)


def share(model: nn.Module, form: Form) -> Mapping[str, nn.Parameter]:
    """Give the model the form's shared tensors, once; they stand beside its layers and in no sharded block. Looked up
    in what is returned, they are found also after somebody replaced them."""
    values = form.shared()
    if values and not hasattr(model, "lora_shared"):
        model.lora_shared = nn.ParameterDict({n: nn.Parameter(v.detach().clone()) for n, v in values.items()})
    found: Any = getattr(model, "lora_shared", {})
    return found


def install(layer: Any, adapter: str, start: Start, form: Form, own: Own, *, chain: bool, turns: bool = False) -> None:
    """Write one site's start, in place: live factors, twin or chain storage, the form's tensors, the variant.

    chain: live slots may be committed to frozen ones later. turns: the factor that rests may train in a later link, so
    it stays in autograd. Raises LoralignError on layers that have no plain
    pair of Linears.
    """
    side_A, side_B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(side_A, nn.Linear) or not isinstance(side_B, nn.Linear) or side_B._parameters["bias"] is not None:
        raise LoralignError(f"{type(layer).__name__} has no plain pair of factors; leave it out of `targets`")
    A, B = start.A.to(side_A.weight), start.B.to(side_B.weight)
    if not form.facts.stock:  # nobody reads them
        A, B = torch.zeros_like(A), torch.zeros_like(B)
    with torch.no_grad():
        side_A.weight.copy_(torch.zeros_like(A) if start.twin else A)
        side_B.weight.copy_(torch.zeros_like(B) if start.twin else B)
    owner = None if form.facts.identity else (layer, adapter)
    if start.twin:
        convert(side_A, "A", start.A.float(), owner)
        convert(side_B, "T", to_grid(start.B.float()), owner)
    elif chain or owner is not None:
        convert(side_A, "A", A.new_zeros(0, A.shape[1]), owner)
        convert(side_B, "B", B.new_zeros(B.shape[0], 0), owner)
    _give(layer, adapter, own, A)
    layer.lora_variant[adapter] = LowRankVariant(form, own.shared)
    layer.lora_variant[adapter].train = start.train
    layer.cast_input_dtype_enabled = _CastForOthers(layer)
    trains = form.facts.stock if turns else set(start.train) & set(form.facts.stock)
    never = tuple({"A": "lora_A", "B": "lora_B"}[f] for f in "AB" if f not in trains)
    keep_constant(layer, adapter, never)


def _give(layer: Any, adapter: str, own: Own, like: Tensor) -> None:
    """Put the form's own tensors on the layer: trained ones as PEFT's adapter weights, constants as buffers."""
    for name, value in own.trained.items():
        if not hasattr(layer, f"lora_{name}"):
            setattr(layer, f"lora_{name}", nn.ParameterDict())
        getattr(layer, f"lora_{name}")[adapter] = nn.Parameter(value.detach().clone().to(like))
    for name, value in own.constants.items():
        if not hasattr(layer, f"loralign_{name}"):
            setattr(layer, f"loralign_{name}", BufferDict(persistent=False))
        getattr(layer, f"loralign_{name}")[adapter] = value.detach().clone().to(like.device)
    setattr(layer, TRAINED, {**getattr(layer, TRAINED, {}), adapter: tuple(own.trained)})
    setattr(layer, CONSTANT, {**getattr(layer, CONSTANT, {}), adapter: tuple(own.constants)})
    names = (f"lora_{name}" for name in own.trained)
    layer.adapter_layer_names = tuple(dict.fromkeys((*layer.adapter_layer_names, *names)))


def keep_constant(layer: Any, adapter: str, names: tuple[str, ...]) -> None:
    """Keep these stock factors without gradient, also through PEFT's `set_adapter` and `set_requires_grad`."""
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: names}
    for name in ("lora_A", "lora_B"):
        for parameter in getattr(layer, name)[adapter]._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(name not in names)


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


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(m, LoraLayer) for m in model.modules())
