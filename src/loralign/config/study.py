"""Study files to a `Spec`: which arms, which task, how many rates and seeds, bound to what model and data hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loralign.compare.begun import as_begun
from loralign.compare.identity import content_of, copies, shared_rows
from loralign.compare.spec import Arm, Budget, Spec, TaskSpec
from loralign.compare.statistics import CONTROL, PRIMARY
from loralign.compare.study import check_arms
from loralign.config.study_file import (
    REFERENCES,
    ArmSection,
    StudyFile,
    TaskSection,
    arm_section,
    read_study,
    recipe_of,
)
from loralign.io.public import is_local
from loralign.methods.table import learning_rate, tuned_on
from loralign.train.model import hidden_size
from loralign.types import LoralignError, Recipe

BASELINE_SEEDS = 12


def load_study(path: str | Path, overrides: Sequence[str] = (), *, reading: bool = False) -> tuple[Spec, ...]:
    """One spec per task of a study file. The width of its model, which scales the learning-rate priors, is read from
    the config. reading: for a report of what is finished, which needs neither model nor rows."""
    file = read_study(path, overrides)
    specs = to_specs(file, 0 if reading else hidden_size(file.model))
    if reading:
        return tuple(as_begun(spec, reading=True) for spec in specs)
    for spec in specs:
        _check_files(spec, Path(path).name)
    return tuple(as_begun(replace(s, content=content_of(s), shared_rows=shared_rows(s))) for s in specs)


def _check_files(spec: Spec, name: str) -> None:
    """Rows are there, and the rows that results are reported on are not the ones that choices see."""
    task = spec.task
    for source in (task.train, task.valid, task.test):
        file = task.kind in ("text", "classify") or is_local(source) or Path(source).suffix
        path = Path(source).expanduser()
        if file and not (path.is_file() or path.is_dir()):
            raise LoralignError(f"{name}: no such {'data file' if path.exists() else 'file'}: {source}")
    if copies(task.valid, task.train):
        raise LoralignError(
            f"{name}: every row of `task.valid` stands in `task.train`, so rates would be chosen for what was learned "
            "by heart: split some off"
        )
    if copies(task.test, task.train, task.valid):
        raise LoralignError(
            f"{name}: every row of `task.test` stands in `task.train` or `task.valid`, so results would be reported on "
            "rows that a choice has seen: split some off"
        )


def to_specs(file: StudyFile, hidden_size: int) -> tuple[Spec, ...]:
    """One spec per task; those of `tasks` live in a folder of their own each."""
    if file.task:
        return (to_spec(file, file.task, hidden_size),)
    made = (to_spec(file, task, hidden_size) for task in file.tasks)
    return tuple(
        replace(spec, output=spec.output / task.name, task_name=task.name)
        for spec, task in zip(made, file.tasks, strict=True)
    )


def to_spec(file: StudyFile, task: TaskSection, hidden_size: int) -> Spec:
    """The study of one task; `lora` and `full` are added unless switched off or already there."""
    given = [arm_section(a) for a in file.arms]
    here = {(a.name or a.method) for a in given}
    for a in given:
        if a.name in REFERENCES and a.method != a.name:
            raise LoralignError(
                f"`{a.name}` is what the others are compared with: call the arm of {a.method!r} otherwise"
            )
    added = [ArmSection(method=m) for m in REFERENCES if file.references and m not in here]
    for a in given:
        if a.family == CONTROL or (a.family != PRIMARY and (a.name or a.method) in REFERENCES):
            raise LoralignError("`full` alone is the control, and `lora` is in no family: leave their `family` out")
    arms = tuple(_arm(a, file, task, hidden_size) for a in (*added, *given))
    check_arms(arms)
    t, r = file.train, file.rates
    return Spec(
        model=file.model,
        task=TaskSpec(**task.model_dump(exclude={"name"})),
        arms=arms,
        output=Path(file.output).expanduser(),
        steps=t.steps,
        batch_size=t.batch_size,
        micro_batch_size=t.micro_batch_size or t.batch_size,
        eval_every=t.eval_every,
        schedule=t.schedule,
        warmup=t.warmup,
        rates=r.count,
        ratio=r.ratio,
        extensions=r.extensions,
        finalists=r.finalists,
        choice_seeds=r.seeds,
        seeds=file.seeds,
        baseline_seeds=file.baseline_seeds or max(file.seeds, BASELINE_SEEDS),
        charge=t.charge,
        prune=r.prune,
        autocast=t.autocast,
        compile=t.compile,
        capture=t.capture,
        cpu_threads=t.cpu_threads,
        references=file.references,
        budget=Budget(**file.budget.model_dump()),
        source=file.model_dump(mode="json", exclude_unset=True),
    )


def _arm(arm: ArmSection, file: StudyFile, task: TaskSection, hidden_size: int) -> Arm:
    recipe = recipe_of(arm, file, task)
    s = recipe.s() if isinstance(recipe, Recipe) else 1.0
    rate, source = learning_rate(arm.method, s, hidden_size or 2000)
    lr = arm.lr or float(f"{rate:.2g}")
    given = {key: value for key, value in (("options", arm.options), ("preset", arm.preset)) if value}
    known = () if arm.lr else tuned_on(arm.method)
    return Arm(arm.name or recipe.name, recipe, lr, "given" if arm.lr else source, known, arm.family, given)
