"""Weights that are stored quantised, known by the layers and not by the config, which models read from GGUF mark too.

torchao's weights say a floating dtype and hold packed numbers; bitsandbytes and others hold integers and multiply them
in kernels. A forward of torchao's keeps the widened copy of every weight until backward:

    forward   y = layer(x)               as it is, to the bit; nothing is kept
    backward  gx = g·dequantise(W)       widened again

Shapes:  x (..., d_in) · y, g (..., d_out) · W (d_out, d_in), frozen
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from loralign.carrier.quantise import as_data


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's."""
    return type(tensor).__module__.startswith("torchao.")


def has_kernels(model: nn.Module) -> bool:
    """Whether layers hold integers as their weights, which kernels multiply in a precision of their own."""
    packed = any(name.endswith("qweight") for name, _ in model.named_buffers())
    return packed or any(not p.is_floating_point() for p in model.parameters())


def is_quantised(model: nn.Module) -> bool:
    return has_kernels(model) or any(is_packed(p) for p in model.parameters())


def while_loaded(model: Any) -> dict[str, Any] | None:
    """The settings by which a model was quantised while it was loaded; None: it was not, its files may have been."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized or not is_quantised(model):
        return None
    return as_data(quantizer.quantization_config)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.Linear.forward(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        W: Tensor = ctx.layer.weight.dequantize()
        return (g @ W.to(g.dtype)).to(ctx.dtype), None


class PackedLinear(nn.Linear):
    """A Linear around a frozen weight of torchao's. Made by `make_lean`, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        y: Tensor = _Widened.apply(x, self)
        return y


def make_lean(model: nn.Module) -> None:
    """Let no forward keep a widened weight; a compiler decides that by itself."""
    for module in model.modules():
        if type(module) is nn.Linear and is_packed(module.weight):
            module.__class__ = PackedLinear


def not_sent(model: nn.Module) -> None:
    """DDP, where it wraps the model, leaves torchao's weights as each process loaded them: it cannot send them."""
    names = [name for name, p in model.named_parameters() if is_packed(p)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
