"""The study of three tasks: an adapter beside full fine-tuning on German reviews, on answers and on BBC articles.

    python scripts/prize_study.py rows --out ROWS               rows of the three tasks, from the asset cache
    python scripts/prize_study.py run --rows ROWS --model MODEL --out runs/prize --workers 9 --minutes 9
    python scripts/prize_study.py report --out runs/prize [--steps step.json]
    python scripts/prize_study.py judge [--rows repeat] --out runs/judge    does the frozen rule of judge.yaml stand?

`run` works on scripts/studies/prize-TASK.yaml, all tasks side by side: first the primary arms, which hold the contrasts
that were declared beforehand (`prize_report.CONTRASTS`), then all. A task goes on from its journal in OUT, else from
the record's. Stopped at any moment, the same command goes on. `report` is prize_report.py's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import asset_data
import prize_report

ROOT = Path(__file__).parent.parent
TASKS = prize_report.TASKS
RECORD = ROOT / "records/2026-11-29-h200-prize"
EARLIER = {"german": (ROOT / "records/2026-11-28-h200-spectral",)}
SPLITS = ("train", "valid", "test")
HEADS = {"german": {"valid": 220, "test": 440}}
"""Rows of a split that are read, where not all: about 512 and 1,024 blocks of 128 tokens."""
STAGES = ("primary", "all")
TINY = {
    "rates": {"count": 1, "finalists": 1, "seeds": 1, "extensions": 0},
    "train": {"steps": 2, "batch_size": 2, "eval_every": 1},
    "seeds": 2, "baseline_seeds": 2,
}  # fmt: skip

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def study_of(task: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"scripts/studies/prize-{task}.yaml").read_text(encoding="utf-8"))
    return found


def staged(study: dict[str, Any], stage: str, *, rows: Path, model: str, out: Path, tiny: int = 0) -> dict[str, Any]:
    """The study file of one stage: paths of this machine, primary arms or all. tiny: so many arms, two steps each."""
    arms = [arm for arm in study["arms"] if stage == "all" or "family" not in arm]
    made = {**study, "arms": arms, "model": model, "output": str(out), "task": dict(study["task"])}
    made["task"] |= {split: str(rows / f"{split}.jsonl") for split in SPLITS}
    if tiny:
        made |= {**TINY, "arms": arms[:tiny], "references": False}
    return made


def begin(task: str, out: Path) -> None:
    """The newest recorded journal, where the task has none here."""
    out.mkdir(parents=True, exist_ok=True)
    known = [folder / "study.journal" for folder in (RECORD / task, *EARLIER.get(task, ()))]
    if not (out / "study.journal").exists() and (found := next((j for j in known if j.is_file()), None)):
        shutil.copy(found, out / "study.journal")
        print(f"{task}: goes on from {found}", flush=True)


def command(study: Path, workers: int, minutes: float) -> list[str]:
    limits = ["--set", f"budget.minutes={minutes:.2f}"]
    return [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-m",
        "loralign",
        "compare",
        str(study),
        "--workers",
        str(workers),
        *limits,
    ]


def carry_through(task: str, files: dict[str, Path], workers: int, ends: float) -> int:
    """One task's stages in turn, until the time is over; the first exit code that is not 0."""
    for stage in STAGES:
        left = (ends - time.monotonic()) / 60
        if left < 0.25:
            break
        with (files[stage].parent / f"{task}.log").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                command(files[stage], workers, left), stdout=log, stderr=subprocess.STDOUT, check=False
            )
        print(
            f"{task}, {stage} arms: exit {done.returncode}, {(ends - time.monotonic()) / 60:.1f} min left", flush=True
        )
        if done.returncode:
            return done.returncode
    return 0


@app.command()
def rows(out: Annotated[Path, typer.Option(help="Folder of the rows, one folder per task.")]) -> None:
    """Rows of the three tasks, as few as the study reads."""
    sources = {
        "german": asset_data.build_multiemo("de"),
        "answers": asset_data.build_answers(),
        "bbc": asset_data.build_bbc_articles(),
    }
    for task, source in sources.items():
        (out / task).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            kept = lines[: HEADS.get(task, {}).get(split)]
            (out / task / f"{split}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
            print(f"{task}, {split}: {len(kept)} rows")


@app.command()
def run(
    rows: Annotated[Path, typer.Option(help="What `rows` wrote.")],
    model: Annotated[str, typer.Option(help="Folder of SmolLM2-135M-Instruct.")],
    out: Annotated[Path, typer.Option(help="Folder of the study, one folder per task.")],
    workers: Annotated[int, typer.Option(min=1, help="Of all tasks together.")] = 9,
    minutes: Annotated[float, typer.Option(help="Wall clock of this call.")] = 600.0,
    tasks: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(TASKS),
    tiny: Annotated[int, typer.Option(help="Only so many arms, two steps each: does it run?")] = 0,
) -> None:
    """Work on all tasks side by side."""
    ends, names = time.monotonic() + 60 * minutes, tasks.split(",")
    out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for task in names:
        folder = out.resolve() / task
        if not tiny:
            begin(task, folder)
        files = {}
        for stage in STAGES:
            made = staged(study_of(task), stage, rows=rows.resolve() / task, model=model, out=folder, tiny=tiny)
            files[stage] = out.resolve() / f"{task}-{stage}.yaml"
            files[stage].write_text(yaml.safe_dump(made, allow_unicode=True, sort_keys=False), encoding="utf-8")
        jobs.append((task, files))
    each = max(1, workers // len(names))
    with ThreadPoolExecutor(len(jobs)) as pool:
        codes = list(pool.map(lambda job: carry_through(job[0], job[1], each, ends), jobs))
    prize_report.write(out)
    sys.exit(int(any(codes)))  # a killed task's is below 0


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the study, one folder per task.")],
    steps: Annotated[Path | None, typer.Option(help="What bench_step.py --json wrote.")] = None,
    shape: str = "8b",
) -> None:
    """Contrasts, and equal seconds where step times are given, as prize.md and prize.json."""
    prize_report.write(out, steps, shape)


@app.command()
def judge(
    out: Annotated[Path, typer.Option(help="Folder of the judge's study.")],
    rows: Annotated[str, typer.Option(help="Which half of the rule: rows gone through once or repeat.")] = "once",
) -> None:
    """Whether the frozen rule of `recommended` stands."""
    if rows not in prize_report.RULES:
        raise typer.BadParameter(f"{rows!r} is none of {', '.join(prize_report.RULES)}")
    print(prize_report.judged(rows, out).said)


if __name__ == "__main__":
    app()
