"""What a recipe says beside its axes: rank, scale, targets and the like, checked where a recipe is built."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from annotated_types import Interval

from loralign.maths.bounds import Share, outside
from loralign.maths.given import native
from loralign.types import LoralignError

Rank = Annotated[int, Interval(ge=1, le=10**6)]
NUMBERS: Mapping[str, Any] = {
    "r": Rank,
    "alpha": Annotated[float, Interval(ge=1e-6, le=1e6)] | None,
    "dropout": Share,
    "seed": Annotated[int, Interval(ge=0, lt=2**32)],
    "weight_decay": Annotated[float, Interval(ge=0, le=1e9)],
    "max_grad_norm": Annotated[float, Interval(ge=0, le=1e9)],
}
KNOWN = (*NUMBERS, "targets", "exclude", "ranks")
ELSEWHERE = {
    "rank": "it is `r` here",
    "lora_alpha": "it is `alpha` here",
    "lora_dropout": "it is `dropout` here",
    "target_modules": "it is `targets` here",
    "exclude_modules": "it is `exclude` here",
    "rank_pattern": "it is `ranks` here",
    "lr": "learning rates go to loralign.optimizer(…, lr=…), or to the trainer's arguments",
    "learning_rate": "learning rates go to loralign.optimizer(…, lr=…), or to the trainer's arguments",
}
"""Names of PEFT, of recipe files and of trainers."""


def checked_fields(label: str, fields: Mapping[str, Any], options: Collection[str]) -> dict[str, Any]:
    """The fields as a recipe holds them; lists become tuples, numpy's numbers Python's.

    options: names of the method's own, which belong elsewhere. Raises LoralignError, which names what belongs there.
    """
    for name in fields:
        if name not in KNOWN:
            raise LoralignError(f"a recipe has no field {name!r}: {_instead(label, name, options)}")
    found = {name: native(value) for name, value in fields.items()}
    for name in NUMBERS.keys() & found.keys():
        if wrong := outside(NUMBERS[name], found[name]):
            raise LoralignError(f"{name} must be {wrong}, not {found[name]!r:.60}")
    for name in ("targets", "exclude"):
        if name in found and not (name == "targets" and isinstance(found[name], str)):
            found[name] = _names(name, found[name])
    if "ranks" in found:
        found["ranks"] = _ranks(found["ranks"])
    return found


def _instead(label: str, name: str, options: Collection[str]) -> str:
    if name in options:
        return f"it is an option of {label}: build({label!r}, {{{name!r}: …}})"
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    near = difflib.get_close_matches(name, KNOWN, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(KNOWN)}"


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value):
        return tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    what = "a list of endings of module names" + (", a regular expression or 'all-linear'" * (name == "targets"))
    raise LoralignError(f"{name} must be {what}, such as ['q_proj', 'v_proj'], not {value!r:.60}")


def _ranks(value: Any) -> Mapping[str, int]:
    if not isinstance(value, Mapping):
        raise LoralignError(
            f"ranks must be a dictionary of module names' endings, such as {{'down_proj': 32}}, not {value!r:.60}"
        )
    found = {key: native(rank) for key, rank in value.items()}
    for key, rank in found.items():
        if wrong := outside(Rank, rank):
            raise LoralignError(f"ranks[{key!r:.60}] must be {wrong}, not {rank!r:.60}")
    return found
