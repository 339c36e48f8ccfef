"""Slots, factors and what may happen to them; data and protocols, no logic.

    W_eff = W0 + Σ_j ν_j b_j a_j      a_j: row of A, b_j: column of B, ν_j: s for a live slot, constant for a frozen one

A slot is *live* (it trains), *frozen* (a constant), *dead* (zeroed for good), *unborn* (zero, waiting for an `On`), or
live with the value zero, for now (`Zero`): that one goes on training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from loralign.types.needs import Train


@dataclass(frozen=True)
class Start:
    """What an init returns for one site.

    A: (r, d_in). B: (d_out, r). own: values of a form's own tensors by name, where the init sets other ones than the
    form does. twin: the adapter trains around (A, B) and frozen slots cancel it, W_eff(0) = W0 + s(BA − BA) = W0;
    without a twin the form's product must be zero. train: the factors that receive updates.
    """

    A: Tensor
    B: Tensor
    twin: bool = False
    train: Train = "AB"
    own: Mapping[str, Tensor] = field(default_factory=dict)


class Operator(Protocol):
    """A factor M (m, n) that is not necessarily held as a matrix: A (r, d_in), or B (d_out, r).

    Implementations: `maths.operators` (Dense, Gather, Scatter).
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., n) -> x·Mᵀ (..., m), differentiable, in the dtype of x."""
        ...

    def add_to(self, base: Tensor, x: Tensor, s: float, *, writable: bool = False) -> Tensor:
        """base (..., m) + s·x·Mᵀ; writable: nobody else keeps `base`, the result may be written into it."""
        ...

    def dense(self) -> Tensor:
        """M (m, n), differentiable."""
        ...


class Live(NamedTuple):
    """The tensors of one site as a form sees them, differentiable.

    A: (r, d_in). B: (d_out, r). A0, B0: frozen slots, (f, d_in) and (d_out, f), f may be 0, their ν in B0. own: the
    form's trained and constant tensors by name. shared: tensors that belong to the model. links: how many frozen slots
    each commit left, oldest first.
    """

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor
    own: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = {}
    links: tuple[int, ...] = ()


class Pair(NamedTuple):
    """Two factors of one site as a transform sees them: values, never live storage of a twin.

    A: (r, d_in). B: (d_out, r). s: scale. train: factors that receive updates. name: the site.
    """

    name: str
    A: Tensor
    B: Tensor
    s: float
    train: Train


class Grad(NamedTuple):
    """A gradient or an update of a pair; None for a factor that does not train."""

    A: Tensor | None
    B: Tensor | None


class SiteShape(NamedTuple):
    """A site as a rule sees it before the first step."""

    name: str
    r: int
    d_out: int
    d_in: int
    s: float


State = dict[str, dict[str, Tensor]]
"""Optimizer state of one pair: {"A": {...}, "B": {...}}; tensors only, changed in place by `update`."""

RuleState = dict[str, Tensor]
"""What a rule remembers, tensors by name; kept by the driver, in checkpoints too, and changed in place by the rule."""

Named = Mapping[tuple[str, str], Tensor]
"""Tensors by (site, name): "A" and "B" as a `Pair` has them, and a form's own trained tensors."""


class Stack(NamedTuple):
    """Sites of one shape as one, so that what happens at every step takes a few calls for all of them.

    key: of the shape ("8x64x32"); a run's stacks have the same keys throughout, and different ones. sites: their names.
    tensors: by name, at least fp32, row k of each (n, ...) is that of `sites[k]`; not to be written to. grads: as
    `tensors`, zeros where there is none; only what a `Moment` holds has them. at: which sites of the moment's stack of
    this key these are, where a step leaves some out; None: all.
    """

    key: str
    sites: tuple[str, ...]
    r: int
    tensors: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = {}
    at: tuple[int, ...] | None = None


class InputSquares(NamedTuple):
    """squares: Σx² (n, d_in) of the inputs of these n sites, of one width."""

    sites: tuple[str, ...]
    squares: Tensor


Joint = Sequence[Mapping[str, Tensor]]
"""One mapping for each stack given: rows (n, ...) by the tensor's name; what is not named is left as it is."""


# ----------------------------------------------------------------------------------------- verbs: what happens to slots


@dataclass(frozen=True)
class Off:
    """Slots die: zeroed, never trained again. Of a twin: back to their start, which adds nothing."""

    site: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Unborn:
    """Slots wait: zero and without training until an `On`; capacity that a rule may hand out later."""

    site: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class On:
    """Slots come alive: a fresh row of A, uniform as LoRA's start, keyed by (seed, step, site), a zero column of B."""

    site: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Zero:
    """Entries of a tensor become zero and go on training: rows of A, columns of B, entries of a form's own tensor."""

    site: str
    name: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class ZeroWhere:
    """Entries of a form's own tensors become zero and go on training where the rule's state holds True under
    "<mask>|<key of a stack>", (n, r). Every process makes its masks, and those of rank 0 are carried out: where a rule
    plans it at most of its steps, the host need not wait for the device to know them."""

    name: str
    mask: str


@dataclass(frozen=True)
class Copy:
    """Slots `to` become copies of slots `source`, rows of A and columns of B, as they are, or as the rule's state
    holds them under "<snapshot>|<site>|A" and "…|B"."""

    site: str
    to: tuple[int, ...]
    source: tuple[int, ...]
    snapshot: str = ""


@dataclass(frozen=True)
class Set:
    """Entries of a form's own tensor get these values; their moments are cleared."""

    site: str
    name: str
    slots: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Prox:
    """x ← sign(x)·max(|x| − threshold, 0) on a form's own tensor of these sites; moments stay. Every process carries
    out its own, which is the same: a rule plans it after every step."""

    sites: tuple[str, ...]
    name: str
    threshold: float


@dataclass(frozen=True)
class Freeze:
    """The live slots as they are join the frozen ones with weight ν: + ν·B·A; they go on training."""

    site: str
    weight: float


@dataclass(frozen=True)
class Elements:
    """Entries of a factor become zero where the rule's state holds True under `mask`; computed on every process and
    compared, not broadcast."""

    site: str
    name: str
    mask: str


Verb = Off | Unborn | On | Zero | ZeroWhere | Copy | Set | Prox | Freeze | Elements
Plan = tuple[Verb, ...]
"""Numbers and names only: planned on rank 0, broadcast as text, carried out in order, each verb in place."""


@dataclass(frozen=True)
class SlotChange:
    """What a plan did to the slots of one site, for whoever keeps state per slot. off: dead or unborn now. fresh: new
    values. copied: (to, source) pairs; source −1 where the values come from a snapshot."""

    off: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    copied: tuple[tuple[int, int], ...] = ()
