"""From a name to a recipe: the parts of a method, or of a mix, with their options."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from loralign.methods.fields import checked_fields
from loralign.methods.form.plain import plain
from loralign.methods.init.kaiming import kaiming
from loralign.methods.outer.once import once
from loralign.methods.table import method
from loralign.methods.transform.adamw import adamw
from loralign.types import Full, LoralignError, Method, Recipe, over_rank

log = logging.getLogger("loralign")

DEFAULTS: Mapping[str, Callable[..., Any]] = {"init": kaiming, "form": plain, "transform": adamw, "outer": once}
"""What a method is made of on the axes that it leaves alone: plain LoRA."""


def build(name: str, options: Mapping[str, Any] | None = None, **fields: Any) -> Recipe | Full:
    """The recipe of one id or of a mix such as "lora-ga + lora-rite".

    options: arguments of the methods' factories (gamma, betas, …), routed by name. fields: of `Recipe` (r, alpha, …);
    where they are not given, the method's own, then `Recipe`'s defaults.
    Raises LoralignError on an unknown name or option, and where two methods want the same axis.
    """
    if not isinstance(name, str):
        raise LoralignError(f"build() takes a method's name such as 'lora-ga', or a mix as one text, not {name!r:.60}")
    if not isinstance(options, Mapping | None):
        raise LoralignError(f"build() takes options as a dictionary, {{name: value}}, not {options!r:.60}")
    lines = [method(part) for part in name.split("+")]
    label = " + ".join(line.id for line in lines)
    if twice := next((line.id for line in lines if lines.count(line) > 1), ""):
        raise LoralignError(f"{label} names {twice} twice: name it once")
    for line in lines:
        if line.renamed:
            _say_renamed(line.id, line.renamed)
    if any(line.reference for line in lines):
        if len(lines) > 1 or options:
            raise LoralignError("`full` trains the matrices themselves: it takes no options and mixes with nothing")
        fields = checked_fields(label, fields, ())
        kept = ("targets", "exclude", "seed", "weight_decay", "max_grad_norm")
        return Full(name=label, optimizer=lines[0].optimizer, **{k: v for k, v in fields.items() if k in kept})
    chosen = {axis: _one(lines, axis, default) for axis, default in DEFAULTS.items()}
    rules = [rule for line in lines for rule in line.rules]
    unused = dict(options or {})
    made = {axis: _call(factory, unused) for axis, factory in chosen.items()}
    made_rules = tuple(_call(rule, unused) for rule in rules)
    known = sorted({p for f in (*chosen.values(), *rules) for p in inspect.signature(f).parameters})
    for key in (k for k in unused if k not in known):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
        raise LoralignError(f"{label} has no option {key!r}; {hint}")
    scale = _one(lines, "scale", over_rank)
    for line in lines:
        fields = {**line.fields, **fields}
    return Recipe(**made, rules=made_rules, scale=scale, name=label, **checked_fields(label, fields, known))


@cache
def _say_renamed(old: str, new: str) -> None:
    """Once a process: a study builds each of its arms several times."""
    log.warning("%s goes with the next release: use %s, which grew out of it", old, new)


def _one(lines: Sequence[Method], axis: str, default: Callable[..., Any]) -> Callable[..., Any]:
    wanted = [(line.id, getattr(line, axis)) for line in lines if getattr(line, axis) is not None]
    if len({factory for _, factory in wanted}) > 1:
        raise LoralignError(f"{' and '.join(i for i, _ in wanted)} both set the {axis}: a mix takes one of them")
    return wanted[0][1] if wanted else default


def _call(factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    taken = {k: v for k, v in options.items() if k in inspect.signature(factory).parameters}
    return factory(**taken)
