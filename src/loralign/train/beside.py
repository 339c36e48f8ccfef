"""Runs of a model beside its steps, which must leave no trace, what is compared in them, and their memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loralign.evidence.inputs import sums_in

KNOWN_HOOKS = ("loralign", "peft", "transformers", "accelerate")
"""Packages whose hooks do what they do on the device, or see to it themselves."""


def apart(plain: list[Tensor | None], found: list[Tensor | None]) -> float:
    """The largest ‖found − plain‖ / ‖plain‖ of some tensors, of small ones beside a tenth of the middle norm."""
    if [t is None for t in plain] != [t is None for t in found]:
        return float("inf")
    norms, offs = [], []
    for a, b in zip(plain, found, strict=True):
        if a is not None and b is not None:
            norms.append(a.float().norm())
            offs.append((b.float() - a.float()).norm())
    sizes = torch.stack(norms[1:]) if norms[1:] else torch.zeros(1)
    scales = torch.cat([norms[0][None], sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))])
    worst = torch.stack(offs) / scales.clamp_min(1e-30)
    return float("inf") if not bool(torch.isfinite(worst).all()) else float(worst.max())


def foreign_hook(model: nn.Module) -> str:
    """Of whom the model has hooks, which a recording would not call; "" where it knows them all."""
    for m in model.modules():
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        for hook in (h for some in hooks for h in some.values()):
            package = str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
            if package not in KNOWN_HOOKS:
                return f"a hook of {package!r} sits on {type(m).__name__}"
    for name, p in model.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return f"a hook sits on {name}"
    return ""


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Within: the model may be called; generators, buffers and sums are as before afterwards."""
    kept = [(t, t.clone()) for t in (*model.buffers(), *sums_in(model))]
    drawn = states()
    try:
        yield
    finally:
        put_back(drawn)
        with torch.no_grad():
            for t, before in kept:
                if not torch.equal(t, before):  # others may have been saved for a backward that is to come
                    t.copy_(before)


def states() -> tuple[Tensor, list[Tensor]]:
    """Of the global generators."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def put_back(drawn: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(drawn[0])
    if drawn[1]:
        torch.cuda.set_rng_state_all(drawn[1])


def seconds(work: Callable[[], object]) -> float:
    """Of the wall, until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Room:
    """A GPU's memory for recordings: each keeps its activations, and evaluation and whatever else runs needs as much
    again. Judged by the steps of this run, from the first one on torch counts its peak anew."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.begun = model, False

    def begin(self) -> None:
        """Before a step."""
        if not self.begun and (device := self._gpu()):
            torch.cuda.reset_peak_memory_stats(device)
        self.begun = True

    def lacking(self) -> str:
        """Why one more recording is one too many, "" where there is room for it."""
        if not (device := self._gpu()):
            return ""
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        need = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0]
        return "" if 2 * need < free else f"{free / 2**30:.1f} GiB are free, two steps need {2 * need / 2**30:.1f}"

    def _gpu(self) -> torch.device | None:
        device = next(self.model.parameters()).device
        return device if device.type == "cuda" else None
