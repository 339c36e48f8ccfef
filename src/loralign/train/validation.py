"""The loss on validation rows with some slots switched off, for rules that decide by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import whole, write
from loralign.maths.draws import keyed_generator
from loralign.types import Batch, LoralignError, Loss, Recipe, Validation


def apart(train: Any, recipe: Any) -> tuple[Any, Any]:
    """(training rows, rows for the recipe's rule to decide by or None), drawn by the seed: no row is in both."""
    rules = recipe.rules if isinstance(recipe, Recipe) else ()
    count = max((rule.needs.rows for rule in rules if isinstance(rule.needs, Validation)), default=0)
    if not count:
        return train, None
    if len(train) < 2 * count:
        raise LoralignError(
            f"{recipe.name} keeps {count} rows apart to decide by, and there are {len(train)}: lower `options.rows` "
            "or give more rows"
        )
    order = torch.randperm(len(train), generator=keyed_generator(recipe.seed, "validation rows")).tolist()
    return train.select(sorted(order[count:])), train.select(sorted(order[:count]))


def batches(rows: Any, collate: Callable[[list[Any]], Batch], size: int, device: torch.device) -> list[Batch]:
    """The rows as the model takes them, `size` at a time."""
    found = [rows[k] for k in range(len(rows))]
    made = [collate(found[k : k + size]) for k in range(0, len(found), size)]
    return [{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()} for batch in made]


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
