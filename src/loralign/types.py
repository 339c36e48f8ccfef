"""The types of loralign: data and protocols, no logic.

Letters everywhere: W (d_out, d_in), A (r, d_in), B (d_out, r), s the scale, G = dL/dW_eff (d_out, d_in),
gA = s·Bᵀ·G, gB = s·G·Aᵀ, and W_eff = W0 + s·B·A for a plain adapter.

An adapter is a set of rank-1 *slots* (row of A, column of B): live slots train, frozen slots are constants,
dead slots are zero and never train. Every method is a rule about slots on one of five axes:

    init       what the live (and twin) slots hold before step 0
    form       which tensors train and how they become (A, B)
    transform  how gradients of a pair become updates of the pair
    rules      penalties, masks and slot events during training
    outer      episodes: commit live slots to frozen ones, start again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Train = Literal["AB", "A", "B"]
"""Which factors of a pair train."""

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


# --------------------------------------------------------------------------------------------------- sites and factors


@dataclass(frozen=True)
class Weight:
    """A frozen base weight, read only by those who need its values."""

    name: str
    """Path of the module inside the base model, for instance `model.layers.3.self_attn.q_proj`."""
    shape: tuple[int, int]
    """(d_out, d_in), also where the module stores the transpose (Conv1D)."""
    read: Callable[[], Tensor]
    """Returns W (d_out, d_in), fp32, dequantised; costs a copy."""


@dataclass(frozen=True)
class Site:
    """One adapted linear map: the PEFT layer, its adapter and the shapes."""

    name: str
    layer: nn.Module
    adapter: str
    d_out: int
    d_in: int
    r: int
    s: float


@dataclass(frozen=True)
class Factors:
    """What an init returns for one site; the product starts at s·B·A, a twin's is cancelled by frozen slots.

    A: (r, d_in). B: (d_out, r). twin: the adapter trains around (A, B) and W_eff(0) = W0 + s(BA − BA) = W0;
    without a twin B·A must be zero. train: the factors that receive updates.
    """

    A: Tensor
    B: Tensor
    twin: bool = False
    train: Train = "AB"


class Draw(Protocol):
    """Keyed randomness: the same (seed, purpose, step, module) gives the same generator on every machine and rank."""

    def __call__(self, purpose: str, step: int = 0) -> torch.Generator: ...


# ---------------------------------------------------------------------------------------------- what a method must know


@dataclass(frozen=True)
class Nothing:
    """The init or rule is computed from W, r and s alone."""

    draws: int = 0
    """Micro-batches that the collector takes."""


@dataclass(frozen=True)
class Sketch:
    """How the gradient is sketched: never formed, state of width·r·(d_out + d_in) numbers per site."""

    width: int = 8
    """Columns kept, in multiples of r; more than per_rank, so that the quality can be estimated."""
    passes: int = 1
    """Over the same micro-batches: the first compresses the running sum, each further one is half a power iteration."""
    exact_above: float = 0.1
    """Sites where the exact directions could hold more than this share of the gradient's energy in addition to what the
    sketch's hold, by its own estimate, are treated exactly; 1: none."""
    held_out: int = 1
    """Further micro-batches, on which only the captured share is measured; 0: not measured."""


@dataclass(frozen=True)
class TopGradient:
    """The leading k = per_rank·r singular triples of the initial gradient G, averaged over micro-batches."""

    per_rank: int = 2
    micro_batches: int = 8
    sketch: Sketch | None = None
    """None: the exact gradient, one layer's at a time, summed on the CPU. Otherwise how to sketch it."""

    @property
    def draws(self) -> int:
        return self.micro_batches + (self.sketch.held_out if self.sketch else 0)


@dataclass(frozen=True)
class Preheated:
    """The leading r triples of a temporary adapter's product after `steps` optimizer steps at rank R.

    steps = 0: no step is taken; two passes over different halves of the micro-batches sketch the gradient at width R.
    """

    rank: Callable[[int], int]
    """R as a function of r."""
    steps: int
    train: Train
    """The factors of the temporary adapter that move; the others stay random with orthonormal rows or columns."""
    micro_batches: int = 32
    """Drawn; the steps cycle through them."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    lr: float | None = None
    """Peak learning rate of the preheat's AdamW; None: plain LoRA's prior."""

    @property
    def draws(self) -> int:
        return self.micro_batches


@dataclass(frozen=True)
class CommonSubspace:
    """Directions that several sources share: adapters, deltas between checkpoints, or weights."""

    sources: tuple[str, ...] = ()
    """Folders of adapters or of checkpoints, or one basis file; (): the layers of the model itself."""
    base: str | None = None
    """Folder of the checkpoint that `sources` were fine-tuned from: their deltas are the sources."""
    side: Literal["left", "right", "auto"] = "auto"
    """The side whose directions are wanted: left belongs in B, right in A; auto: where the sources agree more."""
    width: int = 32
    """Leading directions taken from each source."""
    draws: int = 0


@dataclass(frozen=True)
class Activations:
    """Second moments of the module inputs over n micro-batches."""

    micro_batches: int = 8

    @property
    def draws(self) -> int:
        return self.micro_batches


Need = Nothing | TopGradient | Preheated | CommonSubspace | Activations
NOTHING = Nothing()


@dataclass(frozen=True)
class Directions:
    """Evidence about one site: singular triples, best first, and how much of the whole they hold.

    U: (d_out, k) or None. S: (k,). V: (d_in, k) or None; None for the side that is not known. captured: share of the
    measured thing's energy in these directions, in [0, 1]. held_out: the same share of data that they were not computed
    from. quality: their energy over that of the best k directions, estimated from below; 1 where exact. All None where
    unknown. exact: no sketch was involved. note: what to tell the user.
    """

    U: Tensor | None
    S: Tensor
    V: Tensor | None
    captured: float | None = None
    exact: bool = True
    note: str = ""
    held_out: float | None = None
    quality: float | None = None


# ------------------------------------------------------------------------------------------------------------- the axes


@runtime_checkable
class Init(Protocol):
    """What the live slots (and their frozen twin) hold before step 0."""

    @property
    def needs(self) -> Need: ...

    def largest_rank(self, d_out: int, d_in: int) -> int | None:
        """The largest r that it can start on a matrix of this shape, None: any. Asked before anything is spent."""
        ...

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Factors: ...


class Live(NamedTuple):
    """The trained tensors of one site as a form sees them, differentiable.

    A: (r, d_in). B: (d_out, r). A0, B0: frozen slots, (f, d_in) and (d_out, f), f may be 0. extra: the form's own
    tensors by name.
    """

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor
    extra: Mapping[str, Tensor]


@runtime_checkable
class Form(Protocol):
    """Which tensors train and how they become the factors (A, B) that forward, merge and export all read."""

    @property
    def identity(self) -> bool:
        """A fact: (A, B) are the stock tensors with their frozen slots, nothing is computed."""
        ...

    @property
    def exact(self) -> bool:
        """A fact: the folded factors compute the same function as training did."""
        ...

    def extra(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        """Initial values of the form's own trainable tensors; stored on the layer as `lora_<name>`."""
        ...

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        """Other sites whose live tensors `effective` reads, nearest first (only cross-layer forms have any)."""
        ...

    def effective(self, own: Live, others: Sequence[Live]) -> tuple[Tensor, Tensor]:
        """(A (R, d_in), B (d_out, R)) so that W_eff = W0 + s·B·A; differentiable in the live tensors."""
        ...


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


State = dict[str, dict[str, Tensor]]
"""Optimizer state of one pair: {"A": {...}, "B": {...}}; tensors only, changed in place by `update`."""


@dataclass(frozen=True)
class Ctx:
    """What a transform or rule may know of the step: rates of A and B, 1-based step, summed scalars, keyed draws."""

    lr_A: float
    lr_B: float
    step: int
    scalars: Mapping[str, Tensor]
    draw: Callable[[str, str], torch.Generator]
    """draw(purpose, module name) -> generator keyed by (seed, purpose, step, name): equal on every rank."""


@runtime_checkable
class Transform(Protocol):
    """Gradients of pairs to updates of pairs; a pure function of its arguments, batched over pairs of one shape (of one
    rank, where it accepts "shapes")."""

    @property
    def accepts(self) -> frozenset[str]:
        """Facts for the combination table: "one_sided", "gated", "bf16", "zero", "sharded" (factors may be parts),
        "shapes" (pairs of several shapes in one call)."""
        ...

    @property
    def lr_ratio(self) -> float:
        """lr of B over lr of A."""
        ...

    def init(self, pair: Pair) -> State: ...

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        """Scalars that are summed over all groups before any update, for instance a global norm squared.

        What `update` of the same group needs again may come along under a key that no other group has.
        """
        ...

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        """One update per pair, to be *added* to the live tensors; the learning rate is already in it."""
        ...

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        """Adjust one pair's state after slots were switched, revived or copied."""
        ...


@dataclass(frozen=True)
class SlotPlan:
    """What happens to the slots of one site at an event. Indices are positions of live slots in [0, r).

    off: slots that die (zeroed, never trained again until `on`). on: slots that come alive with a fresh row of A and
    a zero column of B. copy: (destination, source) pairs. rows: (row of A, column of B) values for `on` and `copy`
    destinations, by slot; a copy without values takes the source's present ones. zero_elements: (r, d_in) mask of
    entries of A set to 0. values: new values of a form's extra tensors by name. prox: soft threshold per extra tensor.
    frozen: rows of A (f, d_in) and columns of B (d_out, f) that join the frozen slots.
    """

    off: tuple[int, ...] = ()
    on: tuple[int, ...] = ()
    copy: tuple[tuple[int, int], ...] = ()
    rows: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    zero_elements: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    prox: Mapping[str, float] = field(default_factory=dict)
    frozen: tuple[Tensor, Tensor] | None = None


Plan = Mapping[str, SlotPlan]
"""Site name to what happens there; computed on rank 0 and broadcast."""


@dataclass(frozen=True)
class Moment:
    """What a rule sees at an event: the step just taken, pairs with their gradients, extra tensors, dead slots."""

    step: int
    total_steps: int
    pairs: Sequence[Pair]
    grads: Mapping[str, Grad]
    extra: Mapping[str, Mapping[str, Tensor]]
    dead: Mapping[str, frozenset[int]]
    draw: Callable[[str, str], torch.Generator]


@runtime_checkable
class Rule(Protocol):
    """A penalty, a mask or slot events. Masks are multiplied in; None means all ones.

    A rule that rests for some steps says so in an attribute `wait_steps`, named like the option that sets it: whoever
    plans or begins a run that ends before it acts is told (`plan.idle`).
    """

    @property
    def needs(self) -> Need: ...

    def penalty_grad(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None:
        """Gradient of the regulariser, added before clipping."""
        ...

    def grad_mask(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None: ...

    def update_mask(self, pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad] | None: ...

    def event(self, moment: Moment) -> Plan | None:
        """Slot changes after this optimizer step, or None."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Episode:
    """One link of an outer loop, as plain data, so that a stopped run resumes without replay.

    index: 0-based. steps: optimizer steps of the link. sites: names that train, None for all. train: the trained
    factors. init: of this link's live slots. reset: clear optimizer state at its start. warm_up_steps: learning-rate
    re-warm-up. task: name of the task, for continual learning.
    """

    index: int
    steps: int
    sites: tuple[str, ...] | None = None
    train: Train = "AB"
    init: Init | None = None
    reset: bool = True
    warm_up_steps: int = 0
    task: str = ""


@runtime_checkable
class Outer(Protocol):
    """Episodes by number; pure. Committing slots and collecting evidence belong to the driver."""

    def episode(self, index: int, total_steps: int, sites: Sequence[str]) -> Episode | None: ...


# ------------------------------------------------------------------------------------------------------------- recipes


def over_rank(alpha: float, r: int) -> float:
    """s = alpha / r."""
    return alpha / r


def over_sqrt_rank(alpha: float, r: int) -> float:
    """s = alpha / √r (rsLoRA, arXiv 2312.03732)."""
    return float(alpha / r**0.5)


@dataclass(frozen=True)
class Recipe:
    """One point in the product of the five axes, with the fair defaults that every method shares."""

    init: Init
    form: Form
    transform: Transform
    outer: Outer
    rules: tuple[Rule, ...] = ()
    scale: Callable[[float, int], float] = over_rank
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Module name (or suffix) to rank, where it differs from r."""
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global clip; 0 switches it off."""
    name: str = "lora"


@dataclass(frozen=True)
class Full:
    """The reference: full fine-tuning of the same matrices that a recipe would adapt."""

    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    name: str = "full"


ExportClass = Literal["exact", "exact at rank 2r", "exact, ragged ranks", "exact, rank grows", "lossy", "none"]


@dataclass(frozen=True)
class LrPrior:
    """A starting point for the learning rate, stated as lr·s at hidden size 2000: lr = lr_s/s · (2000/hidden)^power."""

    lr_s: float | None
    source: str
    power: float = 0.781


@dataclass(frozen=True)
class Method:
    """One line of the table: which factories it puts on which axes (None: plain LoRA's), and its provenance."""

    id: str
    summary: str
    arxiv: str
    export: ExportClass
    prior: LrPrior
    init: Callable[..., Init] | None = None
    form: Callable[..., Form] | None = None
    transform: Callable[..., Transform] | None = None
    rules: tuple[Callable[..., Rule], ...] = ()
    outer: Callable[..., Outer] | None = None
    scale: Callable[[float, int], float] | None = None
    reference: bool = False
    """A fact: no adapter at all, the matrices themselves train."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Recipe` that the method sets where the user does not, for instance its own clipping."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named settings, for instance those of the paper."""
    unverified: str = ""
    """Non-empty for reconstructions of papers that could not be read in full."""


class LoralignError(Exception):
    """Bad input or an impossible combination, said in one sentence with the mend (exit code 2)."""


class WorkFailed(LoralignError):
    """The work itself failed: diverged, out of disk, a method that did not act (exit code 1)."""


class VerificationFailed(LoralignError):
    """A written adapter does not compute what it should (exit code 3)."""


Batches = Iterable[Batch]
