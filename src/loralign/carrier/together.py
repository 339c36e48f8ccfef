"""What is known only while the model's forward runs, and the factors of all layers made in few calls there.

A form that repeats numbers makes a factor from smaller tensors in every forward. One layer after the other that is many
small kernels, which a GPU waits for; layers of one shape together need as many calls as one of them. What was made
lives until the forward is over: a layer that runs later, as under activation checkpointing, makes its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralign.carrier.slot import live_of
from loralign.types import Form, Live, Operator


class Pass:
    """From the start of a model's forward to its end, the outermost where models are nested."""

    def __init__(self) -> None:
        self.owner: nn.Module | None = None
        """The outermost of the modules whose forward runs."""

    def begin(self, model: nn.Module) -> None:
        """Before the forward."""

    def end(self) -> None:
        """After it, also where it raised."""

    def held(self) -> Any:
        """What `hold` restores."""
        return dict(vars(self))

    def hold(self, held: Any) -> None:
        vars(self).update(held)

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.open)
        model.register_forward_hook(self.close, always_call=True)

    def open(self, model: nn.Module, args: Any) -> None:
        if self.owner is None:
            self.begin(model)
            self.owner = model

    def close(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.owner is model:
            self.owner = None
            self.end()


@contextmanager
def anew(model: nn.Module) -> Iterator[None]:
    """Within: a forward by itself inside of the model's one that runs; what that one knows is as before afterwards."""
    hooks = (hook for m in model.modules() for hook in m._forward_pre_hooks.values())
    passes = {p for p in (getattr(hook, "__self__", None) for hook in hooks) if isinstance(p, Pass)}
    kept = [(p, p.held()) for p in passes]
    for p in passes:
        p.end()
        if p.owner is not None:
            p.begin(p.owner)
    try:
        yield
    finally:
        for p, before in kept:
            p.hold(before)


Factors = tuple[Operator, Operator]


class Made(NamedTuple):
    """The factors of one layer, and the state of the tensors that they were made from."""

    factors: Factors
    tensors: Sequence[Tensor]
    versions: Sequence[int]


class Together(Pass):
    """The factors of one forward, by layer; made when the first layer asks."""

    def __init__(self, layers: Sequence[Any], adapter: str, form: Form) -> None:
        super().__init__()
        self.layers, self.adapter, self.form = layers, adapter, form
        self.made: dict[int, Made] | None = None
        self.recorded = False
        """Whether autograd saw it."""

    def end(self) -> None:
        self.made = None

    def of(self, layer: Any) -> Factors | None:
        """None: the layer makes its own, since no forward of the model runs, or since it is a replica's."""
        if self.owner is None or torch.compiler.is_compiling():  # the compiler fuses what a layer does by itself
            return None
        if self.made is None or self.recorded != torch.is_grad_enabled():  # reentrant checkpointing switches it off
            self.made, self.recorded = self._make(), torch.is_grad_enabled()
        found = self.made.get(id(layer))
        if found is None or found.versions != [t._version for t in found.tensors]:
            return None
        return found.factors

    def _make(self) -> dict[int, Made]:
        groups: dict[Any, dict[int, Live]] = {}
        for layer in self.layers:
            live = live_of(layer, self.adapter)
            if any(isinstance(t, DTensor) or t.is_inference() for t in live.own.values()):
                return {}  # sharded ones are whole only while their own block runs; the others count no versions
            like = tuple((n, t.shape, t.dtype, t.device) for n, t in live.own.items())
            groups.setdefault((live.A.shape, live.B.shape, like), {})[id(layer)] = live
        found = {}
        for sites in groups.values():
            assert self.form.facts.together is not None
            factors = self.form.facts.together(list(sites.values()))
            for (key, live), made in zip(sites.items(), factors, strict=True):
                tensors = list(live.own.values())
                found[key] = Made(made, tensors, [t._version for t in tensors])
        return found
