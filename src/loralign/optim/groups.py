"""The parameter groups of `PairOptimizer`, and which precisions of factors it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from loralign.carrier.slot import form_of, trained_of
from loralign.types import Facts, LoralignError, Site, Transform


def groups(
    sites: Iterable[Site],
    rest: Mapping[str, nn.Parameter],
    shared: Mapping[str, nn.Parameter],
    transform: Transform,
    lr: float,
    rest_lr: float | None,
    decay: float,
) -> list[dict[str, Any]]:
    """Roles: "A" and "B", every site's factors, whether they train now or not; "form", a form's own tensors; "rest",
    with decay and without (vectors). Names beside the tensors; those of a form are "<site>|<tensor>".
    """
    factors: dict[str, dict[str, nn.Parameter]] = {"A": {}, "B": {}}
    own: dict[str, nn.Parameter] = {f"|{name}": p for name, p in shared.items()}
    facts = Facts()
    for site in sites:
        layer: Any = site.layer
        for role, side in (("A", "lora_A"), ("B", "lora_B")):
            factors[role][site.name] = getattr(layer, side)[site.adapter]._parameters["weight"]
        own.update({f"{site.name}|{name}": p for name, p in trained_of(layer, site.adapter).items()})
        form = form_of(layer, site.adapter)
        facts = form.facts if form is not None else facts
    if not any(p.requires_grad for named in (*factors.values(), own) for p in named.values()):
        raise LoralignError("no factor of the adapter trains: load it with is_trainable=True or adapt again")
    _check_precision(factors, transform)
    others = {
        1.0: {n: p for n, p in rest.items() if p.dim() > 1},
        0.0: {n: p for n, p in rest.items() if p.dim() < 2},
    }
    made = [
        _group("A", factors["A"], lr, decay),
        _group("B", factors["B"], lr * transform.lr_ratio, decay),
        _group("form", own, lr * facts.own_lr, decay * facts.own_decay),
        *(_group("rest", ps, lr if rest_lr is None else rest_lr, decay * keep) for keep, ps in others.items()),
    ]
    return [group for group in made if group["params"]]


def _check_precision(factors: Mapping[str, Mapping[str, nn.Parameter]], transform: Transform) -> None:
    for name, p in (item for side in factors.values() for item in side.items()):
        if p.dtype in (torch.bfloat16, torch.float16) and "bf16" not in transform.facts.accepts:
            raise LoralignError(
                f"{name} has factors in {str(p.dtype).removeprefix('torch.')}, and this method multiplies small "
                "numbers of them, which half precision rounds away: keep the adapter in fp32 (PEFT's default, "
                "autocast_adapter_dtype=True), or use the transform adamw"
            )


def _group(role: str, named: Mapping[str, nn.Parameter], lr: float, decay: float) -> dict[str, Any]:
    return {"params": list(named.values()), "names": list(named), "role": role, "lr": lr, "weight_decay": decay}
