"""Study files (YAML): their keys, types, defaults and limits, and what is wrong with one before a model is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from loralign.config.errors import doubled, validated
from loralign.config.recipe import parse, to_recipe
from loralign.config.sections import (
    Alpha,
    BatchSize,
    Count,
    Name,
    NotNegative,
    Rank,
    Rate,
    Schedule,
    Source,
    Target,
    _Section,
    written_schema,
)
from loralign.config.yaml_text import read_yaml
from loralign.data.columns import NAMES, faults
from loralign.methods.table import METHODS
from loralign.types import Full, LoralignError, Recipe

T = TypeVar("T", bound=_Section)
REFERENCES = ("full", "lora")
PRIMARY = "primary"
COLUMNS = {"text": ("text",), "classify": ("text", "label"), "sft": NAMES}
"""That rows of each kind of task may have."""
OVERALL = ("overall.csv", "overall.json", "report.html")


def _one_word(text: str) -> str:
    if not text.isprintable() or text != text.strip() or text[:1] in ("", "_"):
        raise ValueError("must be printable, without a space at its ends or a leading underscore")
    return text


def _a_folder(text: str) -> str:
    if text.startswith(".") or text in OVERALL:
        raise ValueError(f"must not begin with a dot, nor be one of {', '.join(OVERALL)}, which stand beside the tasks")
    return text


ArmName = Annotated[str, Field(max_length=60), AfterValidator(_one_word)]


class TaskSection(_Section):
    kind: Literal["text", "sft", "classify"]
    """text: plain causal LM on `text` rows; sft: loss on answers; classify: `text` and `label` rows."""
    train: Source
    """Training rows: a json, jsonl, csv, parquet or arrow file, or what else `data.train` of a recipe takes."""
    valid: Source
    """Rows on which learning rates are chosen."""
    test: Source
    """Rows on which results are reported; no choice ever sees them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns to those in the rows of all three, where they differ."""
    length: Count = 128
    """Tokens per block or row."""
    head_lr: Rate = 1e-3
    """Learning rate of a fresh classification head, the same for every arm."""


class NamedTaskSection(TaskSection):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=100), AfterValidator(_a_folder)]
    """Of the task's folder in `output`, and in the tables."""


class ArmSection(_Section):
    method: Name
    """Method id or mix."""
    name: ArmName | None = None
    """What the arm is called; omitted: the method."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options; `loralign methods METHOD` shows them."""
    preset: Name | None = None
    """Named settings of the method."""
    rank: Rank | None = None
    """Rank, where it differs from the study's."""
    alpha: Alpha | None = None
    """Alpha, where it differs from the study's."""
    lr: Rate | None = None
    """Centre of the learning-rate grid; omitted: the method's prior."""
    family: Annotated[str, Field(min_length=1)] = PRIMARY
    """Arms that are tested together. Mixes, ablations and later arms belong into another than `primary`: each family
    has its own level, and what joins one weakens no arm of another. `full` is the control, `lora` the baseline."""


class RatesSection(_Section):
    count: Annotated[int, Field(ge=1, le=15)] = 5
    """Rates per arm, the same for all."""
    ratio: Annotated[float, Field(gt=1, le=10)] = 2.0
    """Between neighbouring rates; 2 to 3 is usual."""
    finalists: Annotated[int, Field(ge=1, le=5)] = 2
    """Of every arm's rates, so many run on further seeds before one is chosen."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 3
    """Seeds on which the finalists are judged, the search's own among them; of rates within one standard error of the
    best mean the lowest is taken. 1: the search decides alone."""
    extensions: Annotated[int, Field(ge=0, le=6)] = 3
    """How often one rate may be added to every arm while some arm's best lies at its edge."""
    prune: bool = True
    """Give a rate up past three quarters of its steps when, since half of them, it never was below the first evaluation
    of a finished rate of its own arm."""


class StudyTrainSection(_Section):
    steps: Count = 300
    """Optimizer steps of every trial."""
    batch_size: BatchSize = 32
    """Rows per optimizer step."""
    micro_batch_size: Count | None = None
    """Rows per forward, a divisor of batch_size; omitted: batch_size."""
    eval_every: Count = 25
    """Optimizer steps between evaluations."""
    charge: Literal["steps", "none"] = "steps"
    """What a start reads (evidence, a preheat): steps: the arm trains that many fewer; none: all arms train the same
    steps, and every table says so."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the rate rises."""
    autocast: bool = True
    """bf16 autocast on GPUs, over an fp32 base; the same for every arm."""
    compile: bool = False
    """Compile the model's blocks on GPUs, once per worker; for task text, whose rows have one length."""
    capture: bool = True
    """Record a step on GPUs as one CUDA graph and replay it; what cannot be recorded runs as it is, which is said."""
    cpu_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of a worker on a CPU; results depend on it in the last bits, on the number of workers they do not."""


class BudgetSection(_Section):
    trials: Count | None = None
    """Finished trials."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall clock of this call, all its workers together."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Summed time of all trials, on GPUs or CPUs, stopped ones included."""


class StudyFile(_Section):
    """A study of loralign: methods compared, each at its own tuned learning rate."""

    model: Source
    """Folder or hub id of the base model."""
    task: TaskSection | None = None
    """What is learned."""
    tasks: list[NamedTaskSection] = Field(default_factory=list)
    """Several tasks instead of one: rates and seeds for each, effects over all of them."""
    arms: Annotated[list[str | ArmSection], Field(max_length=100)]
    """Methods to compare."""
    references: bool = True
    """Add plain `lora` and `full` fine-tuning of the same matrices."""
    rank: Rank = 16
    """Rank of every arm."""
    alpha: Alpha | None = None
    """Alpha of every arm; omitted: the method's own, 32 for most. The scale is what the method makes of it."""
    targets: str | list[str] = "all-linear"
    """Modules to adapt."""
    exclude: list[str] = Field(default_factory=list)
    """Endings of module names to leave as they are."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of what trains."""
    max_grad_norm: NotNegative = 1.0
    """Clip of the global gradient norm; 0: off; omitted: the method's own, 1 for most."""
    rates: RatesSection = RatesSection()
    """The learning-rate search."""
    seeds: Annotated[int, Field(ge=2, le=50)] = 5
    """Fresh seeds at the best rate."""
    baseline_seeds: Annotated[int, Field(ge=2, le=200)] | None = None
    """Of `lora`, with which every arm is compared; omitted: 12, or `seeds` where they are more."""
    train: StudyTrainSection = StudyTrainSection()
    """Every trial's training."""
    budget: BudgetSection = BudgetSection()
    """Limits on the whole study."""
    output: Target
    """Folder of the study: trials, results, pictures."""


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyFile:
    """A study file with `key=value` overrides on top; every arm is a recipe that can be built."""
    content = read_yaml(Path(path), overrides, "study")
    file = parse_study(content, Path(path).name)
    for arm in file.arms:
        recipe_of(arm_section(arm), file, _tasks(file)[0])
    return file


def arm_section(arm: str | ArmSection) -> ArmSection:
    """An arm that is given by its method alone, written out."""
    return ArmSection(method=arm) if isinstance(arm, str) else arm


def parse_study(content: Mapping[str, Any], name: str = "study") -> StudyFile:
    """A mapping as it stands in a file; `name` is said in errors."""
    arms = content.get("arms")
    for i, arm in enumerate(arms if isinstance(arms, list) else (), 1):
        if isinstance(arm, Mapping):
            validated(ArmSection, arm, f"{name}, arm {i}", "an arm")
    file = validated(StudyFile, content, name, "a study")
    if not file.arms and not file.references:
        raise LoralignError(f"{name}: `arms` is empty and `references` is off: name a method to compare")
    t = file.train
    if t.micro_batch_size and t.batch_size % t.micro_batch_size:
        raise LoralignError(f"{name}: `train.batch_size` is no multiple of `train.micro_batch_size`")
    if bool(file.task) == bool(file.tasks):
        raise LoralignError(f"{name}: a study has either one `task` or a list of `tasks`")
    if said := doubled(task.name for task in file.tasks):
        raise LoralignError(f"{name}: {said}")
    for task in _tasks(file):
        if wrong := faults(task.columns, COLUMNS[task.kind]):
            raise LoralignError(f"{name}: `columns` of a task of kind {task.kind} {wrong}")
    if t.compile and any(task.kind != "text" for task in _tasks(file)):
        raise LoralignError(f"{name}: `train.compile` needs rows of one length, as task text has: leave it out")
    if t.steps % t.eval_every:
        raise LoralignError(f"{name}: `train.steps` {t.steps} is no multiple of `train.eval_every` {t.eval_every}")
    return file


def schema_text() -> str:
    """The JSON schema of these files, as it stands in docs/schema-study.json."""
    return written_schema(StudyFile.model_json_schema(), "loralign study")


def _tasks(file: StudyFile) -> list[TaskSection]:
    return [file.task] if file.task else [*file.tasks]


def recipe_of(arm: ArmSection, file: StudyFile, task: TaskSection) -> Recipe | Full:
    """One arm by way of a recipe file, so that the same checks and sentences apply."""
    recipe_file: dict[str, Any] = {
        "model": file.model,
        "method": arm.method,
        "options": arm.options,
        "preset": arm.preset,
        "targets": file.targets,
        "exclude": file.exclude,
        "weight_decay": file.weight_decay,
        "data": {"train": task.train},
        "output": file.output,
    }
    if "max_grad_norm" in file.model_fields_set:
        recipe_file["max_grad_norm"] = file.max_grad_norm
    references = {line.id for line in METHODS.values() if line.reference}
    if arm.method not in references:
        recipe_file |= {"rank": arm.rank or file.rank, "alpha": arm.alpha or file.alpha}
    return to_recipe(parse(recipe_file, f"arm {arm.name or arm.method}"))
