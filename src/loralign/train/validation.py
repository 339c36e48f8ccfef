"""The loss on validation rows with some slots switched off, for rules that decide by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import whole, write
from loralign.maths.draws import keyed_generator
from loralign.train.undisturbed import same_randomness
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
    return _chosen(train, sorted(order[count:])), _chosen(train, sorted(order[:count]))


def _chosen(rows: Any, places: list[int]) -> Any:
    return rows.select(places) if hasattr(rows, "select") else [rows[k] for k in places]


def batches(rows: Any, collate: Callable[[list[Any]], Batch], size: int, device: torch.device) -> list[Batch]:
    """The rows as the model takes them, `size` at a time."""
    found = [rows[k] for k in range(len(rows))]
    made = [collate(found[k : k + size]) for k in range(0, len(found), size)]
    return [{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()} for batch in made]


def validation_loss(
    model: PeftModel,
    batches: Sequence[Batch],
    loss: Loss,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[], Mapping[str, Any]]:
    """() -> {"losses": (masks, masks, …) -> mean losses}, what `Moment` offers.

    masks: site -> bool (r,), True where a slot stays; sites that are not named stay as they are. In evaluation mode,
    without gradients; the factors, the mode and all randomness are as before afterwards, what a trainer counts is where
    `within` puts it back. Processes that hold the whole model share the masks, each takes as many forwards as the
    others (a loss may gather over processes).
    """

    @torch.no_grad()
    def measured(masks: Sequence[Mapping[str, Tensor]]) -> list[float]:
        training, switch, mine = model.training, _Switch(model), _share(model, len(masks))
        values = torch.zeros(len(masks), dtype=torch.float64)
        model.eval()
        with same_randomness(), within():
            try:
                for k in mine:
                    switch.to(masks[k])
                    values[k] = sum(float(loss(model, batch)) for batch in batches) / len(batches)
            finally:
                switch.to({})
                model.train(training)
        return _together(values, mine).tolist()

    return lambda: {"losses": measured}


class _Switch:
    """Slots of a model switched off, by zeros in B, and on again; only what differs from before is written."""

    def __init__(self, model: PeftModel) -> None:
        self.B: dict[str, Tensor] = {}
        for site in sites(model):
            layer: Any = site.layer
            self.B[site.name] = layer.lora_B[site.adapter]._parameters["weight"]
        self.before: dict[str, Tensor] = {}
        self.now: dict[str, Tensor] = {}

    def to(self, masks: Mapping[str, Tensor]) -> None:
        for name in [name for name in self.now if name not in masks]:
            write(self.B[name], self.before[name])
            del self.now[name]
        for name, mask in masks.items():
            if self.now.get(name) is not mask and name in self.B:
                p = self.B[name]
                value = self.before.setdefault(name, whole(p).clone())
                write(p, value * mask.to(p.device, p.dtype))
                self.now[name] = mask


def _share(model: PeftModel, count: int) -> list[int]:
    """The masks that this process takes: all where it is alone or holds parts of the model, else every n-th; where they
    do not divide evenly some are taken twice."""
    if not _shared() or any(isinstance(p, DTensor) for p in model.parameters()):
        return list(range(count))
    rank, world = dist.get_rank(), dist.get_world_size()
    return [min(k, count - 1) for k in range(rank, -(-count // world) * world, world)]


def _together(values: Tensor, mine: Sequence[int]) -> Tensor:
    """The mean over the processes that took each of them, the same on all."""
    if not _shared():
        return values
    taken = torch.zeros_like(values)
    taken[list(mine)] = 1.0
    both = torch.stack([values, taken])
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    both = both.to(device)
    dist.all_reduce(both)
    return (both[0] / both[1]).cpu()


def _shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
