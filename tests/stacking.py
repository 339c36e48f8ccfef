"""Stacks of a few tensors by (site, name), as the optimizer hands them to rules, and a rule's answer by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loralign.types import Joint, Named, Stack


def stacks_of(tensors: Named) -> list[Stack]:
    """Sites of the same names and shapes together, in their order."""
    sites: dict[str, dict[str, Tensor]] = {}
    for (site, name), X in tensors.items():
        sites.setdefault(site, {})[name] = X
    alike: dict[object, list[str]] = {}
    for site, own in sites.items():
        alike.setdefault(tuple((name, X.shape) for name, X in own.items()), []).append(site)
    made = []
    for k, names in enumerate(alike.values()):
        joint = {name: torch.stack([sites[site][name] for site in names]) for name in sites[names[0]]}
        r = joint["A"].shape[1] if "A" in joint else joint["B"].shape[2]
        made.append(Stack(str(k), tuple(names), r, joint))
    return made


def by_name(stacks: Sequence[Stack], joint: Joint | None) -> dict[tuple[str, str], Tensor]:
    """Rows of what a rule answered."""
    found: dict[tuple[str, str], Tensor] = {}
    for stack, answer in zip(stacks, joint or [], strict=True):
        for name, rows in answer.items():
            found.update({(site, name): row for site, row in zip(stack.sites, rows, strict=True)})
    return found
