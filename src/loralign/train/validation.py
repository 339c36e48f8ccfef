"""The loss on validation rows with some slots switched off, for rules that decide by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import whole, write
from loralign.types import Batch, Loss


def validation_loss(model: PeftModel, batches: Sequence[Batch], loss: Loss) -> Callable[[], Mapping[str, Any]]:
    """() -> {"loss": masks -> mean loss}, what `Moment` offers.

    masks: site -> bool (r,), True where a slot stays; sites that are not named stay as they are. In evaluation mode,
    without gradients; the factors, the mode and torch's randomness are as before afterwards.
    """

    @torch.no_grad()
    def measured(masks: Mapping[str, Tensor]) -> float:
        training, random = model.training, torch.get_rng_state()
        kept = {}
        for site in sites(model):
            if site.name in masks:
                layer: Any = site.layer
                p = layer.lora_B[site.adapter]._parameters["weight"]
                kept[site.name] = (p, whole(p).clone())
                write(p, kept[site.name][1] * masks[site.name].to(p.device, p.dtype))
        model.eval()
        try:
            values = [float(loss(model, batch)) for batch in batches]
        finally:
            for p, value in kept.values():
                write(p, value)
            model.train(training)
            torch.set_rng_state(random)
        return sum(values) / len(values)

    return lambda: {"loss": measured}
