"""`loralign plan`: a recipe file to its cost, in sentences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loralign.carrier.quantise import CPU_MEND, check_device
from loralign.config.recipe import RunFile, to_job
from loralign.evidence.subspace import check_sources
from loralign.methods.table import method
from loralign.plan.combinations import Surroundings, check_combination
from loralign.plan.course import idle
from loralign.plan.memory import Estimate, estimate
from loralign.plan.quantised import UnknownQuantisation, saved_bytes, section_of
from loralign.plan.several import ALONE, Layout
from loralign.plan.trace import Step, example_batch, model_loss, trace
from loralign.train.job import USUAL_LENGTH, Job
from loralign.train.model import described, hidden_size, row_length
from loralign.train.split import check_base
from loralign.types import CommonSubspace, Full, LoralignError, Recipe


@dataclass(frozen=True)
class Planned:
    """A run and what it costs."""

    job: Job
    step: Step
    estimate: Estimate
    numbers: int
    """Of the base model."""
    lr_s: float
    export: str
    layout: Layout = ALONE


def planned(file: RunFile, device: str = "auto", layout: Layout = ALONE, *, plain: Estimate | None = None) -> Planned:
    """Check the combination and trace one training step; loads no weights.

    plain: what the same run costs on the base as it is, where that is known already.
    """
    if layout.sharded and layout.gpus == 1:
        raise LoralignError("`--fsdp` splits a model over several GPUs: say how many with `--gpus`")
    device = "cuda" if device == "auto" and layout.gpus > 1 else device
    place: dict[str, Any] = {"revision": file.revision, "trust_remote_code": file.trust_remote_code}
    job = to_job(file, hidden_size(file.model, **place))
    recipe, t = job.recipe, job.training
    if isinstance(recipe, Recipe):
        check_combination(recipe, Surroundings(engine="fsdp") if layout.sharded else Surroundings())
        if isinstance(recipe.init.needs, CommonSubspace):
            check_sources(recipe.init.needs.sources, recipe.init.needs.base)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = t.precision == "bf16" or (t.precision == "auto" and device == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    make = partial(described, file.model, **place, dtype=dtype)
    model = make()
    length = row_length(model, file.model, job.data.max_length, "data.max_length", USUAL_LENGTH)
    job = replace(job, data=replace(job.data, max_length=length))
    step = Step(
        rows=t.micro_batch_size,
        length=length,
        micro_batches=t.batch_size // t.micro_batch_size,
        device=device,  # type: ignore[arg-type]
        bf16=bf16,
        gradient_checkpointing=t.gradient_checkpointing,
        total_steps=t.steps,
    )
    numbers = sum(p.numel() for p in model.parameters())
    s = recipe.s() if isinstance(recipe, Recipe) else 1.0
    kinds = dict.fromkeys(method(part).export for part in file.method.split("+"))
    export = " + ".join(kind for kind in kinds if kind != "exact") or "exact"
    section = section_of(file.quantize, file.model, model.config, dtype)
    check_base(section, layout.sharded)
    if file.quantize is not None:
        check_device(file.quantize, device, f"{CPU_MEND}; to plan for a GPU say `--device cuda`")
    if section and not isinstance(recipe, Recipe):
        raise LoralignError(f"{recipe.name} trains the matrices themselves, and {file.model} stores them quantised")
    less, most = _stored_less(file.model, model, section)
    with _computing(file.model, make, step):
        found = plain or estimate(model, recipe, step, layout=layout)
    less = layout.part(less) if layout.sharded else less
    if less:
        counts = {"weights_bytes": found.weights_bytes - less, "peak_bytes": found.peak_bytes - less + most}
        found = replace(found, **counts, start_bytes=max(0, found.start_bytes - less + most))
    return Planned(job, step, found, numbers, t.learning_rate * s, export, layout)


def _stored_less(name: str, model: Any, section: dict[str, Any]) -> tuple[int, int]:
    try:
        return saved_bytes(model, section) if section else (0, 0)
    except UnknownQuantisation as error:
        raise LoralignError(
            f"{name} is quantised ({error}), and plan does not know what that stores: measure one step instead "
            "(known: bitsandbytes 4 and 8 bit, torchao int8)"
        ) from error


@contextmanager
def _computing(name: str, make: Callable[[], Any], step: Step) -> Iterator[None]:
    """Within: what fails although no adapter is in it is the model's own fault, and said so."""
    quiet = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what is said below
    before = quiet.level
    try:
        quiet.setLevel(logging.CRITICAL)
        yield
    except (RuntimeError, ArithmeticError) as error:
        model = make()
        try:
            trace(model, step, example_batch(model, step), model_loss)
        except (RuntimeError, ArithmeticError):
            why = str(error).splitlines()[0][:100]
            raise LoralignError(
                f"the model {name!r} cannot compute as its config.json describes it ({why}); download or copy it again"
            ) from error
        raise
    finally:
        quiet.setLevel(before)


def as_data(found: Planned) -> dict[str, Any]:
    """The plan as plain data."""
    t = found.job.training
    return {
        "method": found.job.recipe.name,
        "model": found.job.model,
        **asdict(found.estimate),
        "learning_rate": t.learning_rate,
        "lr_s": found.lr_s,
        "lr_source": t.lr_source,
        "export": found.export,
        "quantize": found.job.quantize,
        "step": asdict(found.step),
        "layout": asdict(found.layout),
        "warnings": warnings(found),
    }


def sentences(found: Planned) -> list[str]:
    """The plan, one subject a line."""
    e, t = found.estimate, found.job.training
    return [
        f"{found.job.recipe.name} on {Path(found.job.model).name}: {trained(found)}",
        *costs(found),
        f"learning rate  {t.learning_rate:.3g} ({t.lr_source}); lr·s = {found.lr_s:.3g}",
        f"export         {f'rank {e.export_rank}, {found.export}' if e.export_rank else 'the model itself'}",
        *(f"warning        {said}" for said in warnings(found)),
    ]


def trained(found: Planned) -> str:
    e = found.estimate
    return f"{e.trainable:,} trained numbers at {e.sites} sites, {e.trainable / found.numbers:.2%} of the model"


def costs(found: Planned) -> list[str]:
    """What a step and the start take."""
    e, t, step = found.estimate, found.job.training, found.step
    masters = isinstance(found.job.recipe, Full) and step.bf16
    kind = found.job.quantize
    quantised = f"               weights: quantised to {kind} while they are loaded, linear layers but the head"
    parts = {
        "weights": e.weights_bytes,
        "adapter": e.adapter_bytes,
        "optimizer": e.optimizer_bytes,
        "activations and gradients": e.activation_bytes,
        "gathered blocks": e.gathered_bytes,
    }
    return [
        f"batch          {t.batch_size} rows{_each(found.layout)} = {step.micro_batches} × {step.rows} of up to "
        f"{step.length} tokens",
        f"memory         {_size(e.peak_bytes)} at the peak of a step ({_where(step, found.layout)})",
        f"               {', '.join(f'{name} {_size(count)}' for name, count in parts.items() if count)}",
        *(["               weights: what trains is kept in fp32, and multiplied in bf16"] if masters else []),
        *([quantised] if kind else []),
        f"init           {_init(e)}",
    ]


def warnings(found: Planned) -> list[str]:
    """What the run would do without a mistake in it, but hardly on purpose."""
    recipe = found.job.recipe
    said = idle(recipe, found.step.total_steps) if isinstance(recipe, Recipe) else ""
    if not isinstance(recipe, Recipe):
        return []
    slots = found.estimate.sites * recipe.r
    more = [
        f"{recipe.name}: about {forwards(slots):,} forwards of its validation rows in the whole run, shared "
        "among its processes; fewer with `options.scored` or `options.rounds`"
        for forwards in (rule.facts.forwards for rule in recipe.rules)
        if forwards is not None
    ]
    return [*([said] if said else []), *more]


def _each(layout: Layout) -> str:
    return f" on each of {layout.gpus} GPUs" if layout.gpus > 1 else ""


def _where(step: Step, layout: Layout) -> str:
    kind = "bf16 autocast" if step.bf16 else "fp32"
    recomputed = ", gradient checkpointing" if step.gradient_checkpointing else ""
    here = f"each GPU, {'FSDP2' if layout.sharded else 'DDP'}" if layout.gpus > 1 else "GPU"
    return f"{here if step.device == 'cuda' else 'CPU'}, {kind}{recomputed}; Python and its libraries not counted"


def _init(e: Estimate) -> str:
    if not e.evidence_bytes and not e.init_seconds:
        return "nothing to collect"
    time = "time unknown on this machine" if e.init_seconds is None else f"about {max(1.0, e.init_seconds):.0f} s"
    most = ", more than any step" if e.start_bytes > e.peak_bytes else ""
    beside = f" ({_size(e.start_bytes)} with the model at work{most})" if e.start_bytes else ""
    return time + (f", {_size(e.evidence_bytes)} for evidence{beside}" if e.evidence_bytes else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
