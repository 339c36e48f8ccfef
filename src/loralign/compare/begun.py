"""A study as its journal was begun: a report needs no model and no rows, what began under old rules keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loralign.compare.identity import translated
from loralign.compare.spec import Arm, Spec
from loralign.compare.store import JOURNAL, begun_with
from loralign.types import LoralignError


def as_begun(spec: Spec, *, reading: bool = False) -> Spec:
    """The spec, with the rules of a journal from before starts were charged, where it is one.

    reading: nothing will run. Fingerprints and the centres of the grids are then the journal's.
    """
    if not (spec.output / JOURNAL).is_file():
        if reading:
            raise LoralignError(f"no study in {spec.output}: run it first, without --report")
        return spec
    known = begun_with(spec.output)
    old = known.get("settings", {})
    if old and translated(old) is not old:
        spec = _under_old_rules(spec, translated(old), known)
    return _as_recorded(spec, known) if reading else spec


def _under_old_rules(spec: Spec, old: Mapping[str, Any], known: Mapping[str, Any]) -> Spec:
    """As it ran: no fewer steps for a start that reads, one seed per rate, the grids as far as they were extended."""
    return replace(
        spec,
        charge=old["train.charge"],
        choice_seeds=old["rates.seeds"],
        finalists=old["rates.finalists"],
        prune=old["rates.give_up"],
        rates=old["rates.count"],
        ratio=old["rates.ratio"],
        extensions=max(0, known["rates tried"] - old["rates.count"]),
        baseline_seeds=spec.seeds,
    )


def _as_recorded(spec: Spec, known: Mapping[str, Any]) -> Spec:
    names = ("model", "task.train", "task.valid", "task.test")
    content = {k: v for k, v in known.get("settings", {}).items() if k in names}
    return replace(spec, content=content, arms=tuple(_arm(arm, known) for arm in spec.arms), reading=True)


def _arm(arm: Arm, known: Mapping[str, Any]) -> Arm:
    """With the centre of its grid, and what was known of it then: priors change."""
    tuned = known.get(f"tuned {arm.name}", {}).items()
    return replace(arm, lr=known.get(f"arm {arm.name}", {}).get("lr", arm.lr), tuned_on=tuple(tuned))
