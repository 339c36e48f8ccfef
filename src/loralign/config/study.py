"""Study files to a `Spec`: which arms, which task, how many rates and seeds, bound to what model and data hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loralign.compare.identity import content_of, shared_rows
from loralign.compare.spec import Arm, Budget, Spec, TaskSpec
from loralign.compare.study import check_arms
from loralign.config.study_file import REFERENCES, ArmSection, StudyFile, arm_section, read_study, recipe_of
from loralign.io.content import file_print
from loralign.io.public import is_local
from loralign.methods.table import learning_rate
from loralign.train.model import hidden_size
from loralign.types import LoralignError, Recipe


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a study file; the width of its model, which scales the learning-rate priors, is read from the config."""
    file = read_study(path, overrides)
    spec = to_spec(file, hidden_size(file.model))
    _check_files(spec, Path(path).name)
    return replace(spec, content=content_of(spec), shared_rows=shared_rows(spec))


def _check_files(spec: Spec, name: str) -> None:
    """Rows are there, and the rows that results are reported on are not the ones that choices see."""
    task = spec.task
    for source in (task.train, task.valid, task.test):
        file = task.kind in ("text", "classify") or is_local(source) or Path(source).suffix
        path = Path(source).expanduser()
        if file and not (path.is_file() or path.is_dir()):
            raise LoralignError(f"{name}: no such {'data file' if path.exists() else 'file'}: {source}")
    if task.valid == task.train:
        raise LoralignError(f"{name}: `task.valid` and `task.train` are the same rows: split some off")
    if file_print(task.test) in (file_print(task.train), file_print(task.valid)):
        raise LoralignError(
            f"{name}: `task.test` holds the same rows as `task.train` or `task.valid`, so results would be reported on "
            "rows that a choice has seen: split some off"
        )


def to_spec(file: StudyFile, hidden_size: int) -> Spec:
    """The study that a file describes; `lora` and `full` are added unless switched off or already there."""
    given = [arm_section(a) for a in file.arms]
    here = {(a.name or a.method) for a in given}
    for a in given:
        if a.name in REFERENCES and a.method != a.name:
            raise LoralignError(
                f"`{a.name}` is what the others are compared with: call the arm of {a.method!r} otherwise"
            )
    added = [ArmSection(method=m) for m in REFERENCES if file.references and m not in here]
    arms = tuple(_arm(a, file, hidden_size) for a in (*added, *given))
    check_arms(arms)
    t, r = file.train, file.rates
    return Spec(
        model=file.model,
        task=TaskSpec(**file.task.model_dump()),
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
        seeds=file.seeds,
        prune=r.prune,
        autocast=t.autocast,
        compile=t.compile,
        cpu_threads=t.cpu_threads,
        references=file.references,
        budget=Budget(**file.budget.model_dump()),
        source=file.model_dump(mode="json", exclude_unset=True),
    )


def _arm(arm: ArmSection, file: StudyFile, hidden_size: int) -> Arm:
    recipe = recipe_of(arm, file)
    s = recipe.s() if isinstance(recipe, Recipe) else 1.0
    rate, source = learning_rate(arm.method, s, hidden_size)
    lr = arm.lr or float(f"{rate:.2g}")
    given = {key: value for key, value in (("options", arm.options), ("preset", arm.preset)) if value}
    return Arm(arm.name or recipe.name, recipe, lr, "given" if arm.lr else source, given)
