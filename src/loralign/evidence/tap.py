"""Run a model with taps on its adapted layers: δ and x of every layer, no weight gradient, no trace left behind.

A tap hands over the input x (T, d_in) of a layer and the gradient δ (T, d_out) of its output during backward; the
gradient of the layer's weight is G = δᵀ·x. This is right with accumulation, both kinds of gradient checkpointing, a
module used twice in a forward, the first block (whose input needs no gradient) and quantised bases; no weight ever
requires a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralign.carrier.layer import first_input, tap
from loralign.carrier.storage import SlotLinear
from loralign.evidence.partial import Partial
from loralign.maths.draws import keyed_generator
from loralign.maths.given import said
from loralign.types import Batch, LoralignError, Loss, Site, WorkFailed

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
Sink = Callable[[Site, Tensor, Tensor], None]
"""Called with (site, δ (T, d_out), x (T, d_in)) once per use of the module and micro-batch."""


@dataclass(frozen=True)
class Spent:
    """What evidence cost on this rank. Tokens count every forward and backward pass over them."""

    micro_batches: int = 0
    """Forward and backward passes of one micro-batch."""
    tokens: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    """Sketches, factors or gradients held at the fullest moment, optimizer state included."""
    cached: bool = False
    """A fact: read from the cache; the numbers are those of the run that filled it."""

    def __str__(self) -> str:
        parts = [f"{self.micro_batches} micro-batches, {self.tokens} tokens"] if self.micro_batches else []
        parts += [f"{self.seconds:.1f} s"]
        parts += [f"state of {self.state_bytes / 2**20:.1f} MiB"] if self.state_bytes else []
        return f"{', '.join(parts)}{' (from the cache)' if self.cached else ''}"


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that Transformers models return."""
    loss: Tensor = model(**batch).loss
    return loss


def token_count(batch: Batch) -> int:
    """Tokens that are not padding; rows where there are no tokens.

    A batch of pairs (ORPO: chosen_…, rejected_…) is the sum of its sequences; prompt_… is a part of these.
    """
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and not k.startswith("prompt_")}
    masks = [v for k, v in tensors.items() if k.endswith("attention_mask") and v.dim() == 2]
    if masks:
        return sum(int(m.sum()) for m in masks)
    ids = [v for k, v in tensors.items() if k.endswith("input_ids")]
    if ids:
        return sum(v.numel() for v in ids)
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)


@contextmanager
def tapped(sites: Sequence[Site], sink: Sink) -> Iterator[None]:
    """Within: every backward through the model calls `sink` for each of these layers."""
    anchors: dict[torch.device, Tensor] = {}
    handles = []

    def hook(site: Site) -> Callable[..., Tensor]:
        def deliver(g: Tensor, x: Tensor) -> None:
            sink(site, g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))

        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            anchor = anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
            return tap(output, first_input(args, kwargs), anchor, deliver)

        return forward_hook

    for site in sites:
        handles.append(site.layer.register_forward_hook(hook(site), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_idle_adapters(sites: Sequence[Site]) -> Iterator[None]:
    """Within: adapters that add exactly nothing (fresh ones, B = 0) are not computed."""
    idle = []
    for site in sites:
        B: Any = site.layer.lora_B[site.adapter]  # type: ignore[index]
        if not isinstance(B, SlotLinear) and not bool(B.weight.any()):
            idle.append(site.layer)
    for layer in idle:
        layer.enable_adapters(False)  # type: ignore[operator]
    try:
        yield
    finally:
        for layer in idle:
            layer.enable_adapters(True)  # type: ignore[operator]


@contextmanager
def _checkpointing_works(model: nn.Module) -> Iterator[None]:
    """Within: gradient checkpointing, where switched on, acts: training mode, and embeddings that require gradients."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    handle = embedding.register_forward_hook(lambda m, a, out: out.requires_grad_(True)) if embedding else None
    model.train()
    try:
        yield
    finally:
        if handle:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def ready(model: nn.Module, sites: Sequence[Site], *, asleep: bool = True) -> Iterator[None]:
    """Within: nothing of the model requires a gradient; afterwards everything is as before.

    asleep: idle adapters are not computed, which shows as "disabled" to whoever asks the layers. Otherwise adapters
    stay as PEFT's `disable_adapter` leaves them, requiring gradients: a checkpointed forward is then recomputed alike.
    """
    kept = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    for p in kept:
        p.grad = None
    try:
        with _without_idle_adapters(sites if asleep else ()), _checkpointing_works(model):
            for name, p in model.named_parameters():
                p.requires_grad_(not asleep and p.requires_grad and ".lora_" in name)
            yield
    finally:
        for p, (flag, grad) in kept.items():
            p.requires_grad_(flag)
            p.grad = grad


def _scalar(value: Any) -> Tensor:
    """A loss as its caller is to hand it out."""
    if value is None:
        raise LoralignError(
            "the model returned no loss: give the batches `labels`, or pass loss=(model, batch) -> Tensor"
        )
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else said(value)
        raise LoralignError(f"`loss` must return one number as a tensor, the mean over the batch, not {what}")
    return value


class Passes:
    """Forward and backward passes through one model, under the autocast in force when this was made; and their cost."""

    def __init__(self, model: nn.Module, loss: Loss, seed: int = 0, progress: Progress | None = None) -> None:
        self.model, self.loss, self.seed = model, loss, seed
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.device = next(model.parameters()).device
        kind = self.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.partial = Partial(None)
        self.tokens, self.micro_batches, self.state_bytes = 0, 0, 0
        self._start = time.perf_counter()

    @property
    def spent(self) -> Spent:
        return Spent(self.micro_batches, self.tokens, time.perf_counter() - self._start, self.state_bytes)

    def holds(self, tensors: Sequence[Tensor]) -> None:
        """Note the bytes of state that are alive now."""
        self.state_bytes = max(self.state_bytes, sum(t.numel() * t.element_size() for t in tensors))

    def _loss(self, batch: Batch, index: int) -> Tensor:
        torch.manual_seed(keyed_generator(self.seed, "evidence", index).initial_seed())
        if not isinstance(batch, Mapping):
            raise LoralignError(f"a batch is a dictionary of what the model takes, not {said(batch)}")
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        kind, dtype, on = self.autocast
        with torch.autocast(kind, dtype, enabled=on):
            return _scalar(self.loss(self.model, moved))

    @torch.no_grad()
    def value(self, batch: Batch) -> float:
        """The loss of a micro-batch, forward only."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return float(self._loss(batch, 0))

    def backward(self, batch: Batch, index: int, share: float = 1.0) -> float:
        """One micro-batch forward and backward; returns its loss. The same index sees the same dropout masks."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            value = self._loss(batch, index)
            if not value.requires_grad:
                raise LoralignError("the loss has no gradient: `loss` must compute it from the model, without detach()")
            if not torch.isfinite(value):
                raise WorkFailed(f"the loss of evidence micro-batch {index} is {value.item()}: look for broken rows")
            (value * share).backward()
        self.micro_batches += 1
        self.tokens += token_count(batch)
        return float(value.detach())

    def __call__(self, sites: Sequence[Site], batches: Sequence[Batch], sink: Sink, what: str, first: int = 0) -> None:
        """Every micro-batch once, with taps on these sites; first: index of the first one."""
        with ready(self.model, sites), tapped(sites, sink):
            for i, batch in enumerate(batches):
                self.backward(batch, first + i)
                self.progress(what, i + 1, len(batches))
