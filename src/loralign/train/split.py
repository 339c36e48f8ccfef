"""A model that FSDP2 has split over processes: its adapter gathered, and put on a base of its own by the first one.

    every process: logits of the probes → tensors of the adapter, whole, on the host
    the first one: the adapter as checkpoints write it → the base loaded again, on the host → the same logits

What is exported and verified is that second model, so a fault of the gathering cannot pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import form_of, live_of, trained_of, whole
from loralign.carrier.stored import load_adapter, read_config, read_tensors
from loralign.io.probes import TOLERANCE, difference
from loralign.train.job import Job
from loralign.train.model import dtype_of, load
from loralign.types import Full, LoralignError, Recipe, Site, WorkFailed


def check_split(trainer: Any, recipe: Recipe | Full) -> None:
    """Raise where a run that FSDP splits could not end with a verified adapter."""
    if not trainer.is_fsdp_enabled:
        return
    if isinstance(recipe, Full):
        raise LoralignError(
            f"{recipe.name} needs whole weights at its end, which FSDP splits: start with torchrun alone (data "
            "parallel)"
        )
    if trainer.args.load_best_model_at_end:
        raise LoralignError(
            "`train.load_best` and `train.patience` put whole weights back, which FSDP splits: leave them out, or "
            "start with torchrun alone (data parallel)"
        )


def check_base(section: Mapping[str, Any], split: bool) -> None:
    """Raise where FSDP would split a quantised base. section: its `quantization_config`, or nothing."""
    if section and split:
        raise LoralignError(
            "FSDP does not split a quantised base: start with torchrun alone (data parallel), which holds all of it on "
            "each GPU, or leave it as it is"
        )


@contextmanager
def whole_model(trainer: Any, job: Job, probes: Mapping[str, Tensor]) -> Iterator[Any]:
    """The trained model as one process has it: the trainer's own, or under FSDP one of the first process alone (None on
    the others). Enter it on every process."""
    if not trainer.is_fsdp_enabled:
        yield trainer.model
        return
    found = _logits(trainer.model, probes, trainer.args.device, trainer.accelerator.autocast())
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered(model)
    if not trainer.is_world_process_zero():
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name, state_dict=state)
        own = {f"lora_{own}" for site in sites(model) for own in trained_of(site.layer, site.adapter)}
        opened = _opened(Path(name), job, own)
    if any(_switches(site) for site in sites(model)):
        _empty(opened)
    again = _logits(opened, probes, next(opened.parameters()).device)
    _check_same(again, found, TOLERANCE[dtype_of(job.training.precision)])
    yield opened


def gathered(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of the adapter, and of modules that travel along, whole and on the host; on every process."""
    state = model.state_dict()
    return {k: whole(v.detach()).cpu() for k, v in state.items() if "lora_" in k or "modules_to_save" in k}


def _switches(site: Site) -> bool:
    """Whether slots may be off although one of their factors is not zero."""
    form = form_of(site.layer, site.adapter)
    return bool(live_of(site.layer, site.adapter).links) or (form is not None and bool(form.facts.switches))


@torch.no_grad()
def _empty(opened: PeftModel) -> None:
    """Make slots that are off empty on either side, which is how `export` knows them in a stock adapter."""
    for site in sites(opened):
        side_A, side_B = (getattr(site.layer, side)[site.adapter].weight for side in ("lora_A", "lora_B"))
        off = ~side_A.any(1) | ~side_B.any(0)
        side_A[off], side_B[:, off] = 0.0, 0.0


def _opened(folder: Path, job: Job, own: set[str]) -> Any:
    """own: a form's tensors, which are folded into A and B and which no stock adapter knows."""
    base, _ = load(
        job.model, revision=job.revision, precision=job.training.precision, trust_remote_code=job.trust_remote_code
    )
    config = read_config(folder)
    tensors = {k: v for k, v in read_tensors(folder, config).items() if k.rpartition(".")[2] not in own}
    return load_adapter(base, folder, config, tensors).eval()


@torch.no_grad()
def _logits(
    model: Any, probes: Mapping[str, Tensor], device: torch.device, within: AbstractContextManager[Any] | None = None
) -> Tensor:
    """Of a forward in evaluation mode on a device, on the host. within: the precision it runs in."""
    training = model.training
    model.eval()
    with within or nullcontext():
        found: Tensor = model(**{k: v.to(device) for k, v in probes.items()}).logits
    model.train(training)
    return found.float().cpu()


def _check_same(opened: Tensor, split: Tensor, allowed: float) -> None:
    gap = difference(opened, split).relative
    if not gap <= allowed:
        raise WorkFailed(
            f"the adapter that was gathered computes other logits than the split model ({gap:.1e}, allowed "
            f"{allowed:.0e}): nothing is exported, the checkpoints stay; go on from them with "
            "torchrun alone (data parallel), --resume, and report it"
        )
