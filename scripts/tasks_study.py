"""Class-incremental learning on real data: `sd-lora` beside one LoRA trained in sequence and beside joint training.

    python scripts/tasks_study.py cifar10 --out runs/tasks-cifar10 --workers 4      DINOv2-S, 5 tasks of 2 classes
    python scripts/tasks_study.py snips --out runs/tasks-snips                      MiniLM, 3 tasks of 3, 2, 2 intents
    python scripts/tasks_study.py snips --long --out runs/tasks-snips-long          as long as SD-LoRA's paper trains
    python scripts/tasks_study.py snips --sgd --out runs/tasks-snips-sgd            as SD-LoRA's released code trains

All arms: q and v of every block, rank 10, s = 1, the same head, its rate, row order and number of steps; the loss sees
the classes of a row's own task. Every arm's rate is the best by final average accuracy on validation rows (seed 0; one
is added while the best lies at an edge); reported are three other seeds on test rows. A trial that is finished is kept,
one that was stopped goes on: the same command again.

--long: 20 epochs a task, as the paper, and the head at 8e-3, the paper's rate (of Adam) for everything.
--sgd: A and B step by SGD with momentum 0.9 and no clip, as the released code does whatever its config says, and
sd-lora has its options (the live term raw, ‖B‖·‖A‖, α from 0.8); α and the head step by AdamW.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import asset_data
import asset_models
from momentum import Momentum

SEEDS, SEARCH = (1, 2, 3), 0
ARMS = {"sd-lora": ("sd-lora", False), "sequential lora": ("lora", False), "joint lora": ("lora", True)}
CODE: dict[str, Any] = {"current": "raw", "norm": "factors", "magnitude": 0.8}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Plan:
    """What a study trains. rates: the search's, neighbours a factor of three apart. size: of images, in pixels."""

    data: str
    out: Path
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    extensions: int = 2
    epochs: float = 3.0
    batch: int = 64
    head_lr: float = 1e-3
    rows: int = 1000
    size: int = 112
    rank: int = 10
    sgd: bool = False
    joint: bool = True

    @property
    def arms(self) -> list[str]:
        return [arm for arm, (_, joint) in ARMS.items() if self.joint or not joint]


@dataclass(frozen=True)
class Trial:
    arm: str
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.arm.replace(' ', '-')}_{self.rate:.0e}_{self.seed}"


Splits = list[tuple[str, dict[str, list[dict[str, Any]]]]]
"""Per task its name and its rows by split: train, valid, test."""


# ---------------------------------------------------------------------------------------------------------------- data


def split_rows(rows: Sequence[dict[str, Any]], shares: tuple[float, float], most: int) -> dict[str, list[Any]]:
    """train, valid, test of one class, by a fixed permutation."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:most]
    first, second = int(shares[0] * len(order)), int((shares[0] + shares[1]) * len(order))
    parts = {"train": order[:first], "valid": order[first:second], "test": order[second:]}
    return {name: [rows[i] for i in part] for name, part in parts.items()}


def tasks_of(by_class: Sequence[dict[str, list[Any]]], sizes: Sequence[int], names: Sequence[str]) -> Splits:
    found: Splits = []
    for k in range(len(sizes)):
        at = range(sum(sizes[:k]), sum(sizes[: k + 1]))
        rows = {split: [row for c in at for row in by_class[c][split]] for split in ("train", "valid", "test")}
        found.append((", ".join(names[c] for c in at), rows))
    return found


def cifar10(plan: Plan) -> Splits:
    """Images of 32 × 32 pixels as uint8 tensors, enlarged once to `size` × `size` (bicubic, antialiased)."""
    with np.load(asset_data.build_cifar10() / "images.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
        names = [str(name) for name in file["names"]]
    by_class = []
    for c in range(10):
        chosen = images[labels == c][: plan.rows].permute(0, 3, 1, 2).float()
        large = torch.nn.functional.interpolate(chosen, (plan.size, plan.size), mode="bicubic", antialias=True)
        rows = [{"pixel_values": x, "labels": c} for x in large.round().clamp(0, 255).to(torch.uint8)]
        by_class.append(split_rows(rows, (0.7, 0.1), plan.rows))
    return tasks_of(by_class, (2, 2, 2, 2, 2), names)


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows]).float().div_(255)
    pixels = pixels.sub_(MEAN[:, None, None]).div_(STD[:, None, None])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def snips(plan: Plan) -> Splits:
    """Utterances as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asset_models.build_minilm())
    lines = (asset_data.build_snips() / "all.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    names = sorted({row["label"] for row in found})
    by_class = []
    for c, name in enumerate(names):
        texts = sorted({row["text"] for row in found if row["label"] == name})
        rows = [{"input_ids": torch.tensor(ids), "labels": c} for ids in tokenizer(texts).input_ids]
        by_class.append(split_rows(rows, (0.6, 0.2), plan.rows))
    return tasks_of(by_class, (3, 2, 2), names)


def collate_text(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=0)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def base_of(data: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if data == "cifar10":
        return transformers.AutoModelForImageClassification.from_pretrained(asset_models.build_dinov2(), num_labels=10)
    return transformers.AutoModelForSequenceClassification.from_pretrained(asset_models.build_minilm(), num_labels=7)


# -------------------------------------------------------------------------------------------------------------- trials

HELD: dict[str, Any] = {}
"""The base model and rows of this process."""


def hold(plan: Plan) -> None:
    HELD.update(base=base_of(plan.data), rows={"cifar10": cifar10, "snips": snips}[plan.data](plan))


def run(plan: Plan, trial: Trial) -> dict[str, Any]:
    """One trial, or what it left when it was finished before."""
    from loralign import build
    from loralign.train.task_rows import Task
    from loralign.train.task_trainer import TaskTraining
    from loralign.train.tasks import run_tasks

    folder = plan.out / "trials" / trial.folder
    if (folder / "results.json").is_file():
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    if not HELD:
        hold(plan)
    begun = any((folder / "checkpoints").glob("checkpoint-*/loralign.json"))
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    method, joint = ARMS[trial.arm]
    held_out = "valid" if trial.seed == SEARCH else "test"
    tasks = [Task(name, rows["train"], rows[held_out]) for name, rows in HELD["rows"]]
    options = {"tasks": len(tasks), **(CODE if plan.sgd else {})} if method == "sd-lora" else {}
    targets = ("q_proj", "v_proj") if plan.data == "cifar10" else ("query", "value")
    recipe: Any = build(method, options, r=plan.rank, alpha=None, targets=targets, seed=trial.seed)
    if plan.sgd:
        recipe = replace(recipe, transform=Momentum(), max_grad_norm=0.0)
    training = TaskTraining(
        trial.rate, head_lr=plan.head_lr, epochs=plan.epochs, batch_size=plan.batch, eval_batch_size=256
    )
    collate = collate_images if plan.data == "cifar10" else collate_text
    run_tasks(
        copy.deepcopy(HELD["base"]), recipe, tasks, training, folder, collate=collate, joint=joint, resume=begun,
        export_moments=False,
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoints")
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def run_all(plan: Plan, trials: Sequence[Trial], pool: ProcessPoolExecutor | None) -> list[dict[str, Any]]:
    each = map if pool is None else pool.map
    asked: Iterable[dict[str, Any]] = each(run, [plan] * len(trials), trials)
    found = []
    for trial, result in zip(trials, asked, strict=True):
        said = f"{100 * result['average']:.1f} % at the end, forgetting {100 * result['forgetting']:.1f}"
        typer.echo(f"{trial.arm}, rate {trial.rate:.0e}, seed {trial.seed}: {said}")
        found.append(result)
    return found


def search(plan: Plan, pool: ProcessPoolExecutor | None) -> dict[str, dict[float, float]]:
    """Final average accuracy on validation rows, by arm and rate."""
    found: dict[str, dict[float, float]] = {arm: {} for arm in plan.arms}
    wanted = [Trial(arm, rate, SEARCH) for arm in plan.arms for rate in plan.rates]
    for _ in range(plan.extensions + 1):
        for trial, result in zip(wanted, run_all(plan, wanted, pool), strict=True):
            found[trial.arm][trial.rate] = result["average"]
        wanted = [Trial(arm, rate, SEARCH) for arm in plan.arms if (rate := beyond(found[arm])) is not None]
        if not wanted:
            break
    return found


def beyond(by_rate: dict[float, float]) -> float | None:
    """The next rate outside, where the best lies at an edge."""
    rates, best = sorted(by_rate), best_rate(by_rate)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    other = best * 3 if best == rates[-1] else best / 3
    return float(f"{other:.0e}")


def best_rate(by_rate: dict[float, float]) -> float:
    """Of equals the lowest."""
    return max(sorted(by_rate), key=lambda rate: by_rate[rate])


# -------------------------------------------------------------------------------------------------------------- report


def report(plan: Plan, searched: dict[str, dict[float, float]], final: dict[str, list[dict[str, Any]]]) -> None:
    from loralign.compare.curves import interval
    from loralign.io.matrix import accuracy_picture
    from loralign.io.provenance import environment, write_json

    lines = ["| arm | rate | average accuracy, % | anytime accuracy, % | forgetting, % |", "|---|---|---|---|---|"]
    arms: dict[str, Any] = {}
    for arm, results in final.items():
        found = {key: interval([100 * r[key] for r in results]) for key in ("average", "anytime", "forgetting")}
        said = {key: (own.mean, own.high - own.mean) for key, own in found.items()}
        rate = best_rate(searched[arm])
        shown = [f"{mean:.1f} ± {half:.1f}" for mean, half in said.values()]
        lines.append(f"| {arm} | {rate:.0e} | {' | '.join(shown if not ARMS[arm][1] else [shown[0], '', ''])} |")
        seeds = [{k: r[k] for k in ("matrix", "average", "anytime", "forgetting")} for r in results]
        validation = {f"{k:.0e}": v for k, v in sorted(searched[arm].items())}
        arms[arm] = {"rate": rate, "validation": validation, "seeds": seeds, "mean_and_half_interval": said}
    settings = {k: v for k, v in vars(plan).items() if k != "out"}
    tasks = list(next(iter(final.values()))[0]["tasks"])
    write_json(plan.out / "results.json", {"plan": settings, "tasks": tasks, "arms": arms, **environment()})
    (plan.out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    panels = {arm: mean_matrix([r["matrix"] for r in results]) for arm, results in final.items()}
    title = f"{plan.data}: accuracy on every task, mean of {len(SEEDS)} seeds"
    accuracy_picture(panels, tasks, plan.out / "accuracy.png", title=title)
    typer.echo("\n".join(lines))


def mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[float(v) for v in np.mean(rows, axis=0)] for rows in zip(*matrices, strict=True)]


def study(
    data: Annotated[str, typer.Argument(help="cifar10 or snips.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the device.")] = 1,
    long: Annotated[bool, typer.Option("--long", help="20 epochs a task, the head at 8e-3.")] = False,
    sgd: Annotated[bool, typer.Option("--sgd", help="Train as SD-LoRA's released code does.")] = False,
    joint: Annotated[bool, typer.Option(help="Joint training too, the upper bound.")] = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few rows and steps, to see that it runs.")] = False,
) -> None:
    """Train, choose rates, report."""
    given: dict[str, Any] = {} if data == "cifar10" else {"epochs": 6.0, "batch": 16}
    given |= {"joint": joint}
    if long:
        given |= {"epochs": 20.0, "head_lr": 8e-3}
    if sgd:
        given |= {"sgd": True, "rates": (3e-2, 1e-1, 3e-1)}
    if tiny:
        given |= {"rates": (1e-3, 3e-3), "extensions": 0, "epochs": 1.0, "rows": 20, "size": 28, "batch": 8}
    plan = Plan(data, out, **given)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context) if workers > 1 else None
    searched = search(plan, pool)
    trials = [Trial(arm, best_rate(searched[arm]), seed) for arm in plan.arms for seed in SEEDS]
    results = run_all(plan, trials, pool)
    final = {arm: [r for t, r in zip(trials, results, strict=True) if t.arm == arm] for arm in plan.arms}
    report(plan, searched, final)


if __name__ == "__main__":
    typer.run(study)
