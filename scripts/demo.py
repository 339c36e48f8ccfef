"""`make demo`: lora and lora-ga side by side on a real language model; says what it saw, whatever that is.

SmolLM2-135M (de-quantised from Q4_1) learns to answer with the topic of a news article. Each method runs at its own
learning-rate prior, and both run at one shared rate midway between the two, because the rate decides so much. Two runs
go on at a time, one thread each. Every adapter is exported and proven to load in plain PEFT.

Wide factors beside full fine-tuning are not shown: told apart honestly they need rates of their own, three an arm and
some seeds, which is more than the demo's minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
from asset_cache import AssetError, cache_dir, write_jsonl
from asset_data import build_bbc, split_of
from demo_report import Seen, show, table, write_picture
from loralign import Recipe, build, learning_rate
from loralign.cli.guard import explained
from loralign.train.job import Data, Job, Training
from loralign.train.model import hidden_size, load
from loralign.train.sft import run
from loralign.train.use import Conversation, answer, exact_match, open_adapter
from loralign.types import VerificationFailed

OWN, SHARED = "its prior", "shared"
SYSTEM = "Answer with one word: business, entertainment, politics, sports or tech."
RANK, ALPHA, BATCH, MAX_LENGTH, EVAL_EVERY = 8, 16.0, 8, 80, 6
OPTIONS: dict[str, dict[str, Any]] = {"lora": {}, "lora-ga": {"micro_batches": 4}}
"""What differs from the methods' defaults: half the rows for the gradient, for time."""
WORDS = 10
"""Of the start of an article: its headline and a little more."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo."""

    model: str
    out: Path
    steps: int
    valid: int
    test: int
    workers: int = 2


@dataclass(frozen=True)
class Arm:
    method: str
    lr: float
    chosen: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.lr:g}"


# --- rows -------------------------------------------------------------------------------------------------------------


def write_rows(plan: Plan) -> dict[str, Path]:
    """Conversations in three disjoint files; which article goes where depends on its text alone."""
    lines = (build_bbc() / "all.jsonl").read_text(encoding="utf-8").splitlines()
    articles = {row["text"]: row["label"] for row in map(json.loads, lines)}
    by_hash = sorted(articles, key=lambda text: sha256(text.encode()).digest())
    sizes = {"train": plan.steps * BATCH, "valid": plan.valid, "test": plan.test}
    files = {}
    for split, size in sizes.items():
        chosen = [text for text in by_hash if split_of(text) == split][:size]
        files[split] = plan.out / f"{split}.jsonl"
        write_jsonl(files[split], ({"messages": conversation(text, articles[text])} for text in chosen))
    return files


def conversation(text: str, label: str) -> Conversation:
    start = " ".join(text.split()[:WORDS])
    turns = {"system": SYSTEM, "user": start, "assistant": label}
    return [{"role": role, "content": content} for role, content in turns.items()]


def read_conversations(file: Path) -> list[Conversation]:
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


# --- runs -------------------------------------------------------------------------------------------------------------


def recipe(method: str) -> Recipe:
    made = build(method, OPTIONS[method], r=RANK, alpha=ALPHA)
    assert isinstance(made, Recipe)
    return made


def arms(hidden: int) -> list[Arm]:
    """Each method at its own prior, and both at the geometric mean of the two priors."""
    priors = [rounded(learning_rate(m, recipe(m).scale(ALPHA, RANK), hidden)[0]) for m in OPTIONS]
    shared = rounded(math.prod(priors) ** (1 / len(priors)))
    own = [Arm(m, lr, OWN) for m, lr in zip(OPTIONS, priors, strict=True)]
    return own + [Arm(m, shared, SHARED) for m in OPTIONS]


def rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def job(plan: Plan, arm: Arm, files: dict[str, Path]) -> Job:
    training = Training(
        arm.lr,
        lr_source=f"{arm.chosen}, make demo",
        steps=plan.steps,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        eval_every=EVAL_EVERY,
        log_every=1,
    )
    data = Data(str(files["train"]), eval=str(files["valid"]), max_length=MAX_LENGTH)
    return Job(plan.model, recipe(arm.method), data, training, plan.out / arm.name)


def train(plan: Plan, arm: Arm, files: dict[str, Path]) -> Seen:
    """One run in a worker process: train, export, verify, then ask the adapter as plain PEFT has it."""
    tick = Ticker(f"{arm.method} at {arm.lr:g}")
    result = run(job(plan, arm, files), progress=tick)
    if not result.verified:
        raise VerificationFailed(f"the adapter of {arm.method} does not compute what was trained")
    model, tokenizer = open_adapter(result.output, plan.model)
    tests = read_conversations(files["test"])
    match = exact_match(model, tokenizer, tests, max_new_tokens=6, progress=tick)
    said = answer(model, tokenizer, [tests[0][:-1]], max_new_tokens=12)[0]
    log = [json.loads(line) for line in (result.output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    tick("done", 1, 1)
    return Seen(
        method=arm.method,
        lr=arm.lr,
        shared=arm.chosen == SHARED,
        train_curve=[(e["step"], e["loss"]) for e in log if "loss" in e],
        eval_curve=[(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e],
        before=result.metrics["eval_loss_before"],
        after=result.metrics["eval_loss"],
        match=match,
        seconds=result.seconds["train"],
        init_s=result.seconds["init"],
        folder=result.output,
        answer=said,
    )


def ask_base(plan: Plan, files: dict[str, Path]) -> tuple[float, str]:
    """Exact match of the untouched model, and its answer to the first test row."""
    tick = Ticker("the base model")
    model, tokenizer = load(plan.model)
    tests = read_conversations(files["test"])
    match = exact_match(model, tokenizer, tests, max_new_tokens=6, progress=tick)
    said = answer(model, tokenizer, [tests[0][:-1]], max_new_tokens=12)[0]
    tick("done", 1, 1)
    return match, said


# --- two workers ------------------------------------------------------------------------------------------------------

_ticks: Any = None
"""The queue on which this worker process reports its progress."""


def start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    quiet()


def quiet() -> None:
    """Progress and the report are what the demo prints; other libraries' remarks are not."""
    warnings.filterwarnings("ignore")
    logging.getLogger("loralign").setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Ticker:
    """Progress of one run, sent to the process that shows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self("loading", 0, 1)

    def __call__(self, what: str, done: int, total: int) -> None:
        if _ticks is not None:
            _ticks.put((self.name, what, done, total))


def run_all(plan: Plan, chosen: Sequence[Arm], files: dict[str, Path]) -> tuple[tuple[float, str], list[Seen]]:
    """The base and every arm, two at a time in processes of one thread; a failure of one ends the demo."""
    context = get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(plan.workers, mp_context=context, initializer=start_worker, initargs=(ticks,)) as pool:
        runs: list[Future[Seen]] = [pool.submit(train, plan, arm, files) for arm in chosen]
        base = pool.submit(ask_base, plan, files)
        try:
            watch([*runs, base], ticks)
            return base.result(), [r.result() for r in runs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def watch(futures: Sequence[Future[Any]], ticks: Any) -> None:
    """Show progress until all are done; the first failure is raised."""
    from loralign.cli.run import progress

    with progress() as bars:
        while True:
            finished = [f for f in futures if f.done()]
            for f in finished:
                f.result()
            try:
                while True:
                    name, what, done, total = ticks.get(timeout=0.3)
                    bars(f"{name}: {what}", done, total)
            except Empty:
                pass
            if len(finished) == len(futures):
                return


# --- the whole --------------------------------------------------------------------------------------------------------


def demo(plan: Plan) -> None:
    started = time.perf_counter()
    shutil.rmtree(plan.out, ignore_errors=True)
    plan.out.mkdir(parents=True)
    files = write_rows(plan)
    chosen = arms(hidden_size(plan.model))
    (base_match, base_said), found = run_all(plan, chosen, files)
    write_picture(found, plan.out / "curves.png")
    title = (
        f"News topics: {plan.steps} steps of {BATCH} rows, rank {RANK}, {plan.valid} held-out and {plan.test} test rows"
    )
    question = read_conversations(files["test"])[0]
    show(table(found, base_match, title), found, plan.test, question, base_said, plan.model, plan.out / "curves.png")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(cache_dir() / "smollm2-135m"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--valid", type=int, default=24, help="rows for the held-out loss")
    parser.add_argument("--test", type=int, default=48, help="rows for exact match")
    plan = Plan(**vars(parser.parse_args()))
    quiet()
    try:
        demo(replace(plan, workers=min(2, os.cpu_count() or 1)))
    except AssetError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        code, text = explained(error)
        print(f"demo: {text}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
