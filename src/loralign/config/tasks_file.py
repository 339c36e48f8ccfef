"""Files of `loralign tasks` (YAML): a classifier that learns tasks in sequence; keys, limits, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from loralign.config.errors import doubled, validated
from loralign.config.recipe import options_of, to_recipe
from loralign.config.sections import (
    BatchSize,
    Count,
    Name,
    Rate,
    RecipeKeys,
    Schedule,
    Share,
    Source,
    _Section,
    written_schema,
)
from loralign.config.yaml_text import read_yaml
from loralign.methods.table import learning_rate
from loralign.train.task_text import TextRows, TextTasks
from loralign.train.task_trainer import TaskTraining
from loralign.types import LoralignError, Recipe

PER_TASK = ("tasks", "links")
"""Options that say how many links there are: as many as tasks, where a file leaves them out."""


class TasksDataSection(_Section):
    train: Source | None = None
    """Rows of all tasks, which `split` deals out by their labels."""
    test: Source | Share = 0.2
    """Rows that results are reported on: a file, or the share of each class to hold out."""
    text: Name = "text"
    """Column of the text."""
    label: Name = "label"
    """Column of the class."""
    max_length: Count | None = None
    """Tokens per row; longer rows are cut. Omitted: 128, or the model's positions where it has fewer."""


class TaskFileSection(_Section):
    name: Annotated[str, Field(min_length=1, max_length=60)]
    """In tables and pictures."""
    train: Source
    """Its rows."""
    test: Source | Share | None = None
    """Its test rows, where `data.test` does not say it."""


class TasksTrainSection(_Section):
    learning_rate: Rate | None = None
    """Peak learning rate of the adapter in every task; omitted: the method's prior."""
    head_lr: Rate = 1e-3
    """Of the classification head, which is drawn afresh."""
    steps: Count | None = None
    """Optimizer steps of every task."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the rows of a task, instead of `steps`; neither: 3."""
    batch_size: BatchSize = 16
    """Rows per optimizer step and process."""
    micro_batch_size: Count | None = None
    """Rows per forward, a divisor of batch_size; omitted: batch_size."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule, which runs its whole course in every task."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of a task's steps over which the rate rises."""
    mask: Literal["task", "seen"] = "task"
    """Classes that the loss of a row sees: those of its own task, or of all tasks so far."""
    save_every: Count | None = None
    """Optimizer steps between checkpoints; omitted: after every task."""
    eval_batch_size: BatchSize = 64
    """Test rows per forward."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that have it."""


class TasksFile(RecipeKeys):
    """Class-incremental learning: a classifier learns its classes task by task."""

    data: TasksDataSection = TasksDataSection()
    """Rows of text with a class each."""
    split: Annotated[list[list[str | int] | Count], Field(max_length=1000)] | None = None
    """Tasks of the rows in `data.train`: labels of each, or how many each has, in the order of the labels."""
    tasks: Annotated[list[TaskFileSection], Field(max_length=1000)] = Field(default_factory=list)
    """Tasks as files of their own, instead of `split`."""
    joint: bool = False
    """All tasks at once, in as many steps: the upper bound."""
    train: TasksTrainSection = TasksTrainSection()
    """The optimisation of every task."""

    @property
    def count(self) -> int:
        return len(self.tasks) or len(self.split or ())


def load_tasks(path: str | Path, overrides: Sequence[str] = ()) -> TasksFile:
    """Read a file, with `key=value` overrides on top; every mistake is one sentence with the mend."""
    content = read_yaml(Path(path), overrides, "tasks file")
    return parse_tasks(content, Path(path).name)


def parse_tasks(content: Mapping[str, Any], name: str = "tasks") -> TasksFile:
    """A mapping as it stands in a file; `name` is said in errors."""
    file = validated(TasksFile, content, name, "a tasks file")
    try:
        _consistent(file)
        _recipe(file)
    except LoralignError as error:
        raise LoralignError(f"{name}: {error}") from error
    return file


def _consistent(file: TasksFile) -> None:
    t = file.train
    if bool(file.tasks) == bool(file.split):
        raise LoralignError("say either `split` (of the rows in `data.train`) or `tasks` (a list of files)")
    if file.split and file.data.train is None:
        raise LoralignError("`split` deals out the rows of `data.train`: name them")
    if file.tasks and file.data.train is not None:
        raise LoralignError("`tasks` bring their own rows: leave `data.train` out")
    if said := doubled(task.name for task in file.tasks):
        raise LoralignError(said)
    if file.split and len({isinstance(part, int) for part in file.split}) > 1:
        raise LoralignError("`split` holds labels or numbers of labels, not both")
    if t.steps is not None and t.epochs is not None:
        raise LoralignError("`train.steps` and `train.epochs` both say how long to train: keep one")
    if t.micro_batch_size and t.batch_size % t.micro_batch_size:
        raise LoralignError(
            f"`train.batch_size` {t.batch_size} is no multiple of `train.micro_batch_size` {t.micro_batch_size}"
        )


def _recipe(file: TasksFile) -> Recipe:
    """The recipe, with a link for each task where its method asks how many."""
    asked = () if "link_steps" in file.options else PER_TASK
    counts = {key: file.count for key in asked if key in options_of(file.method)}
    recipe = to_recipe(file.model_copy(update={"options": {**counts, **file.options}}))
    if not isinstance(recipe, Recipe):
        raise LoralignError(f"`method: {file.method}` has no adapter to keep: choose another method")
    return recipe


def to_tasks(file: TasksFile, hidden_size: int) -> TextTasks:
    """The run that a file describes. hidden_size: scales the learning-rate prior where the file gives no rate."""
    recipe, t, d = _recipe(file), file.train, file.data
    rate, source = t.learning_rate, "given"
    if rate is None:
        rate, why = learning_rate(file.method, recipe.s(), hidden_size)
        source = f"prior of {recipe.name}: {why}"
    epochs = t.epochs if t.epochs is not None else 3.0
    given = t.model_dump(exclude={"learning_rate", "epochs"})
    training = TaskTraining(learning_rate=rate, lr_source=source, epochs=epochs, **given)
    if file.split:
        files: tuple[TextRows, ...] = (TextRows("", str(d.train), d.test),)
    else:
        files = tuple(TextRows(t.name, t.train, d.test if t.test is None else t.test) for t in file.tasks)
    split = tuple(part if isinstance(part, int) else tuple(map(str, part)) for part in file.split or ())
    return TextTasks(
        model=file.model,
        revision=file.revision,
        recipe=recipe,
        training=training,
        output=Path(file.output).expanduser(),
        files=files,
        split=split,
        text=d.text,
        label=d.label,
        max_length=d.max_length,
        joint=file.joint,
    )


def schema_text() -> str:
    """The JSON schema of these files, as it stands in docs/schema-tasks.json."""
    return written_schema(TasksFile.model_json_schema(), "loralign tasks")
