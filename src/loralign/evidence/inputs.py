"""Σx² of every site's input features over the micro-batches of an optimizer step, for rules that weigh by them.

x is read in forward, once for all sites that share it (q, k and v do), and counted when the gradient comes back:
gradient checkpointing, which runs forward twice, counts once, evaluations count nothing. Rows that the model's
attention mask leaves out (padding) are left out. Sums are over all processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from loralign.carrier.layer import first_input, tap
from loralign.types import InputSquares, Site

MASKS = ("attention_mask", "decoder_attention_mask")


class InputTap:
    """Hooks on the model and its sites' layers; `taken` hands out what was seen since the last call.

    Sums are changed in place, so that a recorded step adds to them too.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.place()
        both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.masks: dict[str, Tensor] = {}
        self.shared: tuple[Callable[[], Any], list[str]] = (lambda: None), []
        """The input that was read last, and the sites that it belongs to."""
        self.hooks = [m.register_forward_pre_hook(self._batch, with_kwargs=True) for m in _given_masks(model)]
        for site in sites:
            mask = MASKS[both and "decoder" in site.name.split(".")]
            self.hooks.append(site.layer.register_forward_hook(self._hook(site.name, mask), with_kwargs=True))

    def place(self) -> None:
        """Sums of zero, where the layers are now: a Trainer moves and shards a model that has its hooks already."""
        alike: dict[tuple[int, torch.device, torch.dtype], list[str]] = {}
        for site in self.sites:
            p = next(site.layer.parameters())
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            alike.setdefault((site.d_in, p.device, wide), []).append(site.name)
        self.sums: dict[str, Tensor] = {}
        self.joint: list[tuple[tuple[str, ...], Tensor]] = []
        for (d_in, device, wide), names in alike.items():
            joint = torch.zeros(len(names), d_in, dtype=wide, device=device)
            self.joint.append((tuple(names), joint))
            self.sums.update(zip(names, joint.unbind(), strict=True))

    def _batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = {name: kwargs[name] for name in MASKS if name in kwargs}
        if found or isinstance(model, PeftModel):
            self.masks = {name: m for name, m in found.items() if isinstance(m, Tensor) and m.dim() == 2}

    def _hook(self, name: str, mask: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not (layer.training and torch.is_grad_enabled() and y.requires_grad):
                return None
            x = first_input(args, kwargs)
            if torch.compiler.is_compiling():  # which traces no hook on y, and needs none: it recomputes what is cheap
                return tap(y, x, y.new_zeros(()), lambda delta, x: self._add([name], self._traced(delta, x, mask)))
            last, names = self.shared
            if last() is x:
                names.append(name)
                return None
            names, found = [name], norms(x, self.masks.get(mask))
            self.shared = weakref.ref(x), names
            y.register_hook(lambda delta: self._add(names, found))
            return None

        return hook

    def _traced(self, delta: Tensor, x: Tensor, mask: str) -> Tensor:
        """In compiled code a gradient of zero counts nothing: a block's trial has it."""
        return norms(x, self.masks.get(mask)) * delta.any()

    def _add(self, names: Sequence[str], norms: Tensor) -> None:
        for name in names:
            self.sums[name].addcmul_(norms, norms)

    def taken(self) -> list[InputSquares]:
        """Of the sites of each width, summed over all processes; the sums start again."""
        found = []
        for names, joint in self.joint:
            seen = joint.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(seen)
            found.append(InputSquares(names, seen))
            joint.zero_()
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _given_masks(model: nn.Module) -> list[nn.Module]:
    """The model, and its part below the head, which is what is given the recorded tensors where steps are replayed."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = getattr(base, "base_model", base)
    return [model] if inner is base else [model, inner]


def norms(x: Tensor, mask: Tensor | None) -> Tensor:
    """‖X_k‖ (d_in,) over the rows that a mask (rows, tokens) leaves in; one pass where there is none."""
    rows = x.detach().reshape(-1, x.shape[-1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    used = None if mask is None or mask.numel() != len(rows) else mask.reshape(-1).to(rows.device)
    if not rows.is_cuda:  # slow there, while products are quick
        used = torch.ones(len(rows), dtype=wide) if used is None else used.to(wide)
        return (used @ rows.to(wide).square()).sqrt()
    rows = rows if used is None else rows * used.to(rows.dtype)[:, None]
    return torch.linalg.vector_norm(rows, dim=0, dtype=wide)
