"""A classification head drawn afresh by the seed alone: all arms of a comparison start with the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from loralign.maths.draws import keyed_generator


@torch.no_grad()
def draw_head(modules: Sequence[nn.Linear], seed: int) -> None:
    """Weights N(0, 0.02²), biases zero."""
    for i, module in enumerate(modules):
        draw = torch.randn(tuple(module.weight.shape), generator=keyed_generator(seed, "head", 0, str(i)))
        module.weight.copy_(0.02 * draw)
        if module.bias is not None:
            module.bias.zero_()


def linears(model: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """The linear layers of these modules."""
    return [m for name in names for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear)]
