"""What a study is bound to: every setting that decides outcomes, files by their content and never by their path.

A study may be continued on another machine, so neither paths nor versions count. Arms are kept apart from the rest:
further ones may join a study, one that is there already must not change. Seeds, extensions and budgets may grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralign.compare.spec import Arm, Spec
from loralign.io.content import file_print, model_print
from loralign.io.described import described


def settings(spec: Spec) -> dict[str, Any]:
    """The settings that all arms share, by the key that they have in a study file."""
    task = {f"task.{k}": getattr(spec.task, k) for k in ("kind", "length", "head_lr")}
    task |= {"task.columns": dict(spec.task.columns)} if spec.task.columns else {}
    names = ("steps", "batch_size", "micro_batch_size", "eval_every", "schedule", "warmup", "autocast", "cpu_threads")
    train = {f"train.{k}": getattr(spec, k) for k in names}
    train |= {"train.compile": True} if spec.compile else {}
    train["train.charge"] = spec.charge
    rates = {"rates.count": spec.rates, "rates.ratio": spec.ratio, "rates.give_up": spec.prune}
    rates |= {"rates.finalists": spec.finalists, "rates.seeds": spec.choice_seeds}
    return {**dict(spec.content), **task, **train, **rates, "rate_seed": spec.rate_seed}


def translated(known: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a journal in today's words; one from before starts were charged says how it was run instead."""
    if "train.charge" in known:
        return known
    kept = {k: v for k, v in known.items() if k != "rates.prune"}
    return {**kept, "train.charge": "read", "rates.finalists": 1, "rates.seeds": 1, "rates.give_up": False}


def arm_settings(arm: Arm) -> dict[str, Any]:
    """The recipe of an arm as flat plain data, without its seed, and the centre of its grid."""
    found = dict(described(arm.recipe))
    return {**found, **dict(arm.given), "lr": arm.lr}


def other_settings(folder: Path, key: str, old: Any, new: Any) -> str:
    if key == "model" or key in ("task.train", "task.valid", "task.test"):
        return (
            f"`{key}` holds something else than when the study in {folder} was started: choose another `output` "
            "folder, or put the old files back"
        )
    return (
        f"the study in {folder} was started with `{key}` {old}, the file now says {new}: choose another `output` "
        "folder, or put it back"
    )


def other_arm(arm: Arm, key: str, old: Any, new: Any) -> str:
    was, now = ("the default" if x is None else x for x in (old, new))
    key = "rank" if key == "r" else key
    return (
        f"arm {arm.name!r} was started with `{key}` {was}, now it has {now}: give the changed arm a `name` of its own, "
        "or choose another `output` folder"
    )


# --------------------------------------------------------------------------------------------------------------- files


def content_of(spec: Spec) -> dict[str, str]:
    """Fingerprints of model and data; files of a hub model are fetched."""
    data = {f"task.{k}": file_print(getattr(spec.task, k)) for k in ("train", "valid", "test")}
    return {"model": model_print(spec.model), **data}


def shared_rows(spec: Spec) -> int:
    """Lines of the test file that the training or the validation file holds, too; 0 for what is not a file of lines."""
    known = {*_lines(spec.task.train), *_lines(spec.task.valid)}
    return sum(line in known for line in _lines(spec.task.test))


def copies(name: str, *others: str) -> bool:
    """Whether a file holds nothing but rows of the others: the same bytes, or lines that all stand there."""
    own = set(_lines(name))
    known = set().union(*(_lines(other) for other in others))
    return file_print(name) in {file_print(other) for other in others} or (bool(own) and own <= known)


def _lines(name: str) -> list[bytes]:
    path = Path(name).expanduser()
    lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" and path.is_file() else ()
    return [line for line in lines if line.strip()]
