"""What full fine-tuning trains: the matrices that an adapter would adapt, as fp32 masters.

Autocast multiplies with them in the dtype of the base. In bf16 itself an update below 2⁻⁹ of a weight is rounded away,
which is most of them at usual rates. At the end they are rounded once, to what every forward of the run computed with.
"""

from __future__ import annotations

import torch
from torch import nn

from loralign.carrier.packed import is_packed
from loralign.carrier.sites import target_weights
from loralign.types import Full, LoralignError


def masters(model: nn.Module, reference: Full) -> dict[str, torch.dtype]:
    """Let these matrices train, in fp32, and nothing else; returns the dtypes that they had."""
    wanted = target_weights(model, reference)
    for name, p in wanted.items():
        if is_packed(p) or not p.is_floating_point():
            raise LoralignError(
                f"{reference.name} trains the matrices themselves, and {name} is stored quantised: load a base that is "
                "not, or train an adapter"
            )
    before = {name: p.dtype for name, p in wanted.items()}
    model.requires_grad_(False)
    for p in wanted.values():
        p.requires_grad_(True)
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return before


def rounded(model: nn.Module, reference: Full, before: dict[str, torch.dtype]) -> None:
    """Give the matrices the dtypes that they had."""
    for name, p in target_weights(model, reference).items():
        p.data = p.data.to(before[name])
