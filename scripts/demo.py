"""`make demo`: lora and lora-ga side by side on a real language model; says what it saw, whatever that is.

SmolLM2-135M (de-quantised from Q4_1) learns an instruction task of reasoning-gym whose answers can be checked. Each
method runs at its own learning-rate prior and both also run at one shared rate, full fine-tuning's, because that
choice decides more than the method does. The better adapter is exported and proven to load in plain PEFT.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from assets import cache_dir, write_task
from loralign import Recipe, build, learning_rate
from loralign.train.job import Data, Job, Training
from loralign.train.model import load
from loralign.train.sft import run
from loralign.train.use import answer, exact_match, open_adapter

TASK, TASK_CONFIG, SYSTEM = "gcd", {}, "Answer with the number only."
STEPS, BATCH, MAX_LENGTH, EVAL_ROWS, TEST_ROWS = 40, 8, 64, 32, 40
RANK, ALPHA, SHARED_LR, HIDDEN = 8, 16.0, 1e-4, 576
OUT = Path("runs/demo")

console = Console()


@dataclass
class Seen:
    """One run of the demo. curve: (step, evaluation loss)."""

    method: str
    lr: float
    chosen: str
    curve: list[tuple[int, float]]
    before: float
    after: float
    match: float
    seconds: float
    init_s: float
    folder: Path


def rows() -> Path:
    """The task's rows in the asset cache, written once."""
    folder = cache_dir() / "reasoning-gym" / f"demo-{TASK}"
    if not (folder / "test.jsonl").exists():
        write_task(TASK, folder, STEPS * BATCH, EVAL_ROWS, TEST_ROWS, seed=1, config=TASK_CONFIG, system=SYSTEM)
    return folder


def job(method: str, lr: float, chosen: str, data: Path, out: Path) -> Job:
    recipe = build(method, r=RANK, alpha=ALPHA)
    training = Training(
        lr, lr_source=chosen, steps=STEPS, batch_size=BATCH, micro_batch_size=BATCH, eval_every=STEPS // 5, log_every=1
    )
    model = str(cache_dir() / "smollm2-135m")
    rows = Data(str(data / "train.jsonl"), eval=str(data / "valid.jsonl"), max_length=MAX_LENGTH)
    return Job(model, recipe, rows, training, out, cache=OUT / "evidence")


def prior(method: str) -> float:
    recipe = build(method, r=RANK, alpha=ALPHA)
    assert isinstance(recipe, Recipe)
    return float(f"{learning_rate(method, recipe.scale(ALPHA, RANK), HIDDEN)[0]:.2g}")


def train(method: str, lr: float, chosen: str, data: Path, tests: list[list[dict[str, str]]]) -> Seen:
    folder = OUT / f"{method}-{lr:g}"
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        tasks: dict[str, int] = {}

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{method} at {lr:g}: {what}", total=total)
            bar.update(tasks[what], completed=done)  # type: ignore[arg-type]

        result = run(job(method, lr, chosen, data, folder), progress=tick)
        model, tokenizer = open_adapter(folder, str(cache_dir() / "smollm2-135m"))
        match = exact_match(model, tokenizer, tests, max_new_tokens=8, progress=tick)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    before = result.metrics["eval_loss_before"]
    curve = [
        (0, before),
        *((entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry and entry["step"]),
    ]
    if not result.verified:
        raise SystemExit(3)
    seconds, init = result.seconds["train"], result.seconds["init"]
    return Seen(method, lr, chosen, curve, before, result.metrics["eval_loss"], match, seconds, init, folder)


def picture(found: list[Seen], file: Path) -> None:
    """Evaluation loss against steps, one line per run."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    styles = {"lora": ("#0072B2", "o"), "lora-ga": ("#D55E00", "s")}
    for seen in found:
        colour, marker = styles[seen.method]
        dash = "--" if seen.chosen == "shared" else "-"
        label = f"{seen.method}, lr {seen.lr:g} ({'shared' if seen.chosen == 'shared' else 'own prior'})"
        axes.plot(*zip(*seen.curve, strict=True), dash, color=colour, marker=marker, markersize=4, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss on held-out rows")
    axes.set_title(f"SmolLM2-135M on {TASK}: the learning rate decides first", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def table(found: list[Seen], base_match: float) -> Table:
    made = Table(title=f"{TASK}: {STEPS} steps of {BATCH} rows, rank {RANK}; exact match of the base {base_match:.0%}")
    for column in (
        "method",
        "learning rate",
        "chosen by",
        "loss before",
        "loss after",
        "exact match",
        "train s",
        "init s",
    ):
        made.add_column(column, justify="left" if column in ("method", "chosen by") else "right")
    for s in found:
        made.add_row(
            *(s.method, f"{s.lr:g}", s.chosen, f"{s.before:.3f}", f"{s.after:.3f}", f"{s.match:.0%}"),
            *(f"{s.seconds:.0f}", f"{s.init_s:.0f}"),
        )
    return made


def what_it_saw(found: list[Seen]) -> str:
    """One plain sentence per rate, from the numbers alone; a difference under 0.05 is called none."""
    said = []
    for chosen, where in (("its prior", "Each at its own prior"), ("shared", f"Both at {SHARED_LR:g}")):
        lora, ga = (next(s for s in found if s.method == m and s.chosen == chosen) for m in ("lora", "lora-ga"))
        gap = lora.after - ga.after
        verdict = (
            "no difference" if abs(gap) < 0.05 else f"{'lora-ga' if gap > 0 else 'lora'} ends lower by {abs(gap):.2f}"
        )
        said.append(f"{where}: {verdict} ({lora.after:.3f} for lora, {ga.after:.3f} for lora-ga).")
    return " ".join([*said, "One seed, one short run: `loralign compare` is for conclusions."])


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("loralign").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    started, data = time.perf_counter(), rows()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    tests = [json.loads(line)["messages"] for line in (data / "test.jsonl").read_text().splitlines()]
    base, tokenizer = load(str(cache_dir() / "smollm2-135m"))
    base_match = exact_match(base, tokenizer, tests, max_new_tokens=8)
    first = answer(base, tokenizer, [tests[0][:-1]], max_new_tokens=24)[0]
    del base
    plan = [
        (m, lr, c)
        for c in ("its prior", "shared")
        for m in ("lora", "lora-ga")
        for lr in [prior(m) if c != "shared" else SHARED_LR]
    ]
    found = [train(m, lr, c, data, tests) for m, lr, c in plan]
    picture(found, OUT / "curves.png")
    console.print(table(found, base_match))
    console.print(what_it_saw(found))
    best = max(found, key=lambda s: (s.match, -s.after))
    model, tokenizer = open_adapter(best.folder, str(cache_dir() / "smollm2-135m"))
    after = answer(model, tokenizer, [tests[0][:-1]], max_new_tokens=24)[0]
    question = tests[0][-2]["content"]
    console.print(
        f"\n[bold]{question}[/bold]\n  before: {first!r}\n  after:  {after!r}   (right: {tests[0][-1]['content']!r})"
    )
    console.print(f"\nThe best adapter is {best.folder}, verified in a process without loralign. In plain PEFT:\n")
    console.print(
        "  from peft import PeftModel", "  from transformers import AutoModelForCausalLM", sep="\n", highlight=False
    )
    line = f'  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("<base>"), "{best.folder}")'
    console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nCurves: {OUT / 'curves.png'}.  {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
