"""Σx² of every site's input features over the micro-batches of an optimizer step, for rules that weigh by them.

x is read in forward, once for all sites that share it (q, k and v do), and counted at the end of the backward that
reaches it: gradient checkpointing, which runs forward twice, counts once, evaluations count nothing. Rows that the
model's attention mask leaves out (padding) are left out. Sums are over all processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd import Variable

from loralign.carrier.layer import first_input, tap
from loralign.types import InputSquares, Site

MASKS = ("attention_mask", "decoder_attention_mask")


class Reading:
    """The hook of one site's layer, and its sum (d_in,), which is changed in place: a recorded step adds to it too."""

    def __init__(self, tap: InputTap, mask: str) -> None:
        self.tap, self.mask = tap, mask
        self.squares: Tensor

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        if not (layer.training and torch.is_grad_enabled() and y.requires_grad):
            return None
        x = first_input(args, kwargs)
        if torch.compiler.is_compiling():  # which traces no hook on y, and needs none: it recomputes what is cheap
            return tap(y, x, y.new_zeros(()), lambda delta, x: self.add(norms(x, self.tap.masks.get(self.mask))))
        last, readings = self.tap.shared
        if last() is x:
            readings.append(self)
            return None
        readings, found = [self], norms(x, self.tap.masks.get(self.mask))
        self.tap.shared = weakref.ref(x), readings
        assert y.grad_fn is not None  # a hook on the node is called without y's own
        y.grad_fn.register_prehook(partial(self.tap.reached, readings, found))
        return None

    def add(self, norms: Tensor) -> None:
        self.squares.addcmul_(norms, norms)


class InputTap:
    """Hooks on the model and its sites' layers; `taken` hands out what was seen since the last call."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.readings = [Reading(self, MASKS[both and "decoder" in site.name.split(".")]) for site in self.sites]
        self.place()
        self.masks: dict[str, Tensor] = {}
        self.shared: tuple[Callable[[], Any], list[Reading]] = (lambda: None), []
        """The input that was read last, and who read it."""
        self.due: list[tuple[list[Reading], Tensor]] = []
        """Whom the backward that runs has reached; counted at its end, in one call."""
        self.hooks = [m.register_forward_pre_hook(self._batch, with_kwargs=True) for m in _given_masks(model)]
        for site, reading in zip(self.sites, self.readings, strict=True):
            self.hooks.append(site.layer.register_forward_hook(reading, with_kwargs=True))

    def place(self) -> None:
        """Sums of zero, where the layers are now: a Trainer moves and shards a model that has its hooks already."""
        alike: dict[tuple[int, torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for site, reading in zip(self.sites, self.readings, strict=True):
            p = next(site.layer.parameters())
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            reading.squares = torch.zeros(site.d_in, dtype=wide, device=p.device)
            alike.setdefault((site.d_in, p.device, wide), []).append((site.name, reading.squares))
        self.joint = list(alike.values())

    def reached(self, readings: list[Reading], norms: Tensor, deltas: Sequence[Tensor | None]) -> None:
        """The gradient is back where an input was read."""
        if norms.is_cuda and torch.cuda.is_current_stream_capturing():  # the recording adds by itself
            for reading in readings:
                reading.add(norms)
            return
        if not self.due:
            engine: Any = Variable._execution_engine
            engine.queue_callback(self.count)
        self.due.append((readings, norms))

    def count(self) -> None:
        """Add what is due; nothing, where that was done before."""
        due, self.due = self.due, []
        pairs = [(reading, norms) for readings, norms in due for reading in readings]
        if len({id(reading) for reading, _ in pairs}) < len(pairs):  # one call must not write a sum twice
            for reading, norms in pairs:
                reading.add(norms)
        elif pairs:
            each = [norms for _, norms in pairs]
            torch._foreach_addcmul_([reading.squares for reading, _ in pairs], each, each)

    def _batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.count()  # of a backward that failed
        found = {name: kwargs[name] for name in MASKS if name in kwargs}
        if found or isinstance(model, PeftModel):
            self.masks = {name: m for name, m in found.items() if isinstance(m, Tensor) and m.dim() == 2}

    def taken(self) -> list[InputSquares]:
        """Of the sites of each width, summed over all processes; the sums start again."""
        self.count()
        found = []
        for joint in self.joint:
            names, sums = zip(*joint, strict=True)
            seen = torch.stack(sums)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(seen)
            found.append(InputSquares(names, seen))
            torch._foreach_zero_(list(sums))
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def sums_in(block: nn.Module) -> list[Tensor]:
    """The sums of a block's sites, which whoever runs it beside the steps puts back."""
    hooks = [hook for module in block.modules() for hook in module._forward_hooks.values()]
    return [hook.squares for hook in hooks if isinstance(hook, Reading)]


def _given_masks(model: nn.Module) -> list[nn.Module]:
    """The model, and its part below the head, which is what is given the recorded tensors where steps are replayed."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = getattr(base, "base_model", base)
    return [model] if inner is base else [model, inner]


def norms(x: Tensor, mask: Tensor | None) -> Tensor:
    """‖X_k‖ (d_in,) over the rows that a mask (rows, tokens) leaves in; one pass where there is none."""
    x, wide = x.detach(), torch.promote_types(x.dtype, torch.float32)
    used = None if mask is None or mask.numel() * x.shape[-1] != x.numel() else mask.reshape(-1).to(x.device)
    if x.is_cuda and used is None and x.dim() > 1:  # as it is: every call is the host's, who may be the slower one
        return torch.linalg.vector_norm(x, dim=tuple(range(x.dim() - 1)), dtype=wide)
    rows = x.reshape(-1, x.shape[-1])
    if not x.is_cuda:  # slow there, while products are quick
        used = torch.ones(len(rows), dtype=wide) if used is None else used.to(wide)
        return (used @ rows.to(wide).square()).sqrt()
    rows = rows if used is None else rows * used.to(rows.dtype)[:, None]
    return torch.linalg.vector_norm(rows, dim=0, dtype=wide)
