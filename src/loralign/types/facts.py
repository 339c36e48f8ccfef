"""What parts declare of themselves; data, no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loralign.types.needs import Train
from loralign.types.slots import Live, Operator


@dataclass(frozen=True)
class Facts:
    """What a part declares of itself. `plan` and the drivers read facts and ask nothing else of a part."""

    # of any part
    needs_no_dropout: bool = False
    """It is wrong under dropout."""

    # of an init
    turns: bool = False
    """The factor that trains may differ from link to link: both stay in autograd, and one rests by a mask."""

    # of a transform
    accepts: frozenset[str] = frozenset()
    """"one_sided" pairs, "gated" factors, "bf16" factors, "sharded" factors (parts of them), several "shapes" in a
    group, "slots" that change (`on_slots` knows what to do); "elementwise": every number steps by itself."""
    global_scalars: bool = False
    """`prepare` returns scalars that all groups must have before any `update`; else groups are released one by one."""
    transient: float = 0.0
    """Bytes of a step at its fullest moment beside the updates themselves, over the bytes of the trained factors; of a
    rule too. Measured (`tests/test_optim_memory.py`); `plan` counts with it."""

    # of a form
    stock: str = "AB"
    """Which of PEFT's own tensors A and B train: "AB", "A", "B" or ""."""
    identity: bool = False
    """(A, B) are the stock tensors with their frozen slots: nothing is computed."""
    exact: bool = True
    """The folded factors compute the same function as training did."""
    commits: bool = False
    """`factors` appends frozen slots unchanged to what it makes of the live tensors, so that links can be committed."""
    gated: bool = False
    """A trained gate stands between A and B."""
    tied: bool = False
    """Entries of A or B are shared: no pairwise transform and no gradient start fits them."""
    cross_layer: bool = False
    """`factors` reads other sites."""
    path: Literal["", "inputs", "features"] = ""
    """In training the neighbours' "inputs" x, or "features" A·x, are added to the site's own; `factors` is what is
    merged and exported."""
    together: Callable[[Sequence[Live]], Sequence[tuple[Operator, Operator]]] | None = None
    """`factors` of many sites, whose tensors have equal shapes, in as few calls as one site's; None: one by one."""
    per_slot: frozenset[str] = frozenset()
    """The form's own trained tensors that have one entry per slot, along their first axis."""
    link: Callable[[Live], tuple[Tensor, Tensor]] | None = None
    """It weighs the links of a chain (`Live.links`): A and B that a link leaves of its live tensors, before its weight;
    None: what `factors` makes of them, without a weight."""
    weights: str = ""
    """Of such a form: its shared tensor with one entry per link; the live link's is entry `len(links)`."""
    switches: frozenset[str] = frozenset()
    """Those of `per_slot` whose zeros switch a slot off: such slots are left out of exports."""
    shares: bool = False
    """Its gate shares the rank out among the slots (a softmax, which is never zero)."""
    own_lr: float = 1.0
    """Learning rate of the form's own tensors over that of A."""
    own_decay: bool = False
    """Weight decay acts on the form's own tensors too."""

    version: int = 1
    """Of what `factors` makes of stored tensors; a compact file of another version is not read."""

    # of a form or a rule
    least_rank: int = 1
    """Fewest slots that it can work with."""
    least_option: str = ""
    """The name of the option that says so."""

    # of a rule
    events: bool = False
    """`step` plans something sooner or later, so somebody must call it after every optimizer step."""
    allocates: bool = False
    """It decides which slots live."""
    wait_steps: int | None = None
    """It rests for so many optimizer steps, the name of the option that says so; None: it acts from the first on."""
    freezes: int = 0
    """Frozen slots per live one that it adds."""
    needs_gate: bool = False
    """It switches slots by a gate of the form, named "gate"."""
    needs_shares: bool = False
    """It weighs slots by the form's gate as shares of the rank."""
    slots: Callable[[Mapping[str, int]], Mapping[str, int]] | None = None
    """{module: the recipe's rank} -> {module: slots to insert}; s stays that of the recipe's rank. None: as many."""
    forwards: Callable[[int], int] | None = None
    """slots at the start -> forwards of the validation rows in the whole run."""
    too_short: Callable[[int], str] | None = None
    """(optimizer steps of the run, or of a link of it) -> why its schedule cannot act in them, with the mend; "" where
    it can."""
    acts_by: Callable[[int], int] | None = None
    """(optimizer steps of the run, or of a link of it) -> the step after which its schedule must have acted: its last
    event, or the first of those that go on. The driver sees to it."""

    # of an outer loop
    trains: Train = "AB"
    """Factors that train in one episode or another."""
    narrows: bool = False
    """Some episode trains fewer slots than the rank."""
