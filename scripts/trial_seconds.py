"""Seconds of whole trials of a study on one device: alone, side by side, and whether recording changes their losses.

    python scripts/trial_seconds.py STUDY.yaml --arms lora full --modes plain recorded both [--steps 300] [--repeat 3]
    python scripts/trial_seconds.py STUDY.yaml --workers 4     the same trials alone, then in 4 processes at once
    python scripts/trial_seconds.py STUDY.yaml --paired 8      plain against the other modes on 8 seeds: final losses on
                                                               validation rows, their mean difference, 95 % interval

Before what is timed every process runs the arm once to its first evaluation, so that its kind of block is known; what
that took is `first_s`. --world FOLDER: random weights of SmolLM2-135M's shape (--shape tiny: for a CPU) and rows of a
chain of words, written there once, in place of the study's own; scripts/studies/trials.yaml is meant for it. --set
key=value: as in `loralign compare`. A CPU records and compiles nothing: there all modes are one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralign.compare.captured import Outputs, Record, cuda_graph
from loralign.compare.curves import Interval, interval
from loralign.compare.runner import Resident
from loralign.compare.spec import Spec, Trial
from loralign.config.study import load_study

MODES = {"plain": (False, False), "recorded": (True, False), "compiled": (False, True), "both": (True, True)}
"""Whether steps are recorded, whether blocks are compiled."""
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What every process needs to know, as plain data."""

    study: str
    overrides: tuple[str, ...]
    mode: str
    steps: int | None
    replays: bool = False

    def spec(self) -> Spec:
        capture, compiled = MODES[self.mode]
        said = [f"train.capture={capture}".lower(), f"train.compile={compiled}".lower()]
        (spec,) = load_study(self.study, [*self.overrides, *said])
        spec = replace(spec, prune=False)
        return replace(spec, steps=self.steps, eval_every=max(1, self.steps // 3)) if self.steps else spec


@dataclass(frozen=True)
class Row:
    """Trials of one arm in one mode. trial_s: median of a whole one; every_s: between ends, over all processes."""

    mode: str
    arm: str
    workers: int
    trials: int
    trial_s: float
    every_s: float
    first_s: float
    between_s: float
    step_ms: float
    replay_ms: float | None
    loss: float | None
    peak_gib: float
    note: str


# --------------------------------------------------------------------------------------------------------------- world


def make_world(folder: Path, shape: str) -> list[str]:
    """Weights, tokenizer and rows, where they are not there yet; the settings that name them."""
    config = SHAPES[shape]
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / "model")
        words = {w: i for i, w in enumerate(("<eos>", "<unk>", *(f"w{i}" for i in range(2, config["vocab_size"]))))}
        made = Tokenizer(WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            folder / "model"
        )
        part = 1 if shape == "smollm2-135m" else 20
        for seed, (split, count) in enumerate((("train", 4000), ("valid", 440), ("test", 880))):
            texts = (_chain(150, config["vocab_size"], 10**6 * seed + n) for n in range(count // part))
            lines = (json.dumps({"text": text}) for text in texts)
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    rows = [f"task.{split}={folder / split}.jsonl" for split in ("train", "valid", "test")]
    return [f"model={folder / 'model'}", *rows, f"output={folder / 'study'}"]


def _chain(count: int, words: int, seed: int) -> str:
    """Words of which each has four that may follow it: something to learn."""
    draw, at, said = random.Random(seed), 2 + seed % (words - 2), []
    for _ in range(count):
        said.append(f"w{at}")
        at = 2 + (5 * at + draw.randrange(4)) % (words - 2)
    return " ".join(said)


# -------------------------------------------------------------------------------------------------------------- timing


def timed(spent: list[float]) -> Record:
    """CUDA graphs whose replays are waited for and timed, evaluations' too."""

    def record(work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        outputs, replay = cuda_graph(work)

        def again() -> None:
            torch.cuda.synchronize()
            started = time.perf_counter()
            replay()
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - started)

        return outputs, again

    return record


def rate_of(spec: Spec, arm: str) -> float:
    return next(a.lr for a in spec.arms if a.name == arm)


def trials_of(asked: Asked, arms: Sequence[str], repeat: int, together: Callable[[], Any]) -> list[dict[str, Any]]:
    """One process: every arm once to know it, then `repeat` whole trials; `together` waits for the other processes."""
    spec = asked.spec()
    resident, spent = Resident(spec), list[float]()
    if asked.replays and resident.record:
        resident.record = timed(spent)
    found = []
    for arm in arms:
        started = time.perf_counter()
        resident.run(Trial("seed", arm, 0, rate_of(spec, arm), 0), lambda step, loss: True)
        first_s = time.perf_counter() - started
        together()
        for seed in range(repeat):
            spent.clear()
            began = time.time()
            outcome = resident.run(Trial("seed", arm, 0, rate_of(spec, arm), seed), lambda step, loss: False)
            ended = {"arm": arm, "began": began, "ended": time.time(), "first_s": first_s}
            found.append({**ended, **asdict(outcome), "replays": list(spent)})
    return found


def _process(asked: Asked, arms: Sequence[str], repeat: int, barrier: Any, queue: Any) -> None:
    try:
        queue.put(trials_of(asked, arms, repeat, barrier.wait))
    except BaseException as error:
        barrier.abort()
        queue.put(f"{type(error).__name__}: {error}")
        raise


def side_by_side(asked: Asked, arms: Sequence[str], repeat: int, workers: int) -> list[Row]:
    """Rows of all arms, of trials in so many processes on this device."""
    if workers == 1:
        made = [trials_of(asked, arms, repeat, lambda: None)]
    else:
        context = get_context("spawn")
        barrier, queue = context.Barrier(workers), context.Queue()
        args = (asked, arms, repeat, barrier, queue)
        processes = [context.Process(target=_process, args=args) for _ in range(workers)]
        for process in processes:
            process.start()
        told: list[Any] = [queue.get() for _ in processes]
        for process in processes:
            process.join()
        if failed := [said for said in told if isinstance(said, str)]:
            raise SystemExit(f"{len(failed)} of {workers} processes failed: {failed[0]}")
        made = told
    return [_row(asked.mode, arm, workers, [t for own in made for t in own if t["arm"] == arm]) for arm in arms]


def _row(mode: str, arm: str, workers: int, trials: list[dict[str, Any]]) -> Row:
    lasted = max(t["ended"] for t in trials) - min(t["began"] for t in trials)
    replays = [s for t in trials for s in t["replays"]]
    return Row(
        mode, arm, workers, len(trials),
        trial_s=median(t["total_s"] for t in trials), every_s=lasted / len(trials),
        first_s=max(t["first_s"] for t in trials), between_s=median(t["between_s"] for t in trials),
        step_ms=1e3 * median(t["step_s"] for t in trials), replay_ms=1e3 * median(replays) if replays else None,
        loss=trials[0]["losses"][-1] if trials[0]["losses"] else None,
        peak_gib=max(t["peak_bytes"] for t in trials) / 2**30, note=trials[0]["note"],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- paired


def paired(asked: Asked, arms: Sequence[str], modes: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Final losses on validation rows of every mode and seed, and what each mode's differ from plain's."""
    ends: dict[tuple[str, str], list[float]] = {}
    for mode in dict.fromkeys(("plain", *modes)):
        spec = replace(asked, mode=mode, replays=False).spec()
        resident = Resident(spec)
        for arm in arms:
            trials = [Trial("rate", arm, 0, rate_of(spec, arm), seed) for seed in range(seeds)]
            ends[mode, arm] = [resident.run(trial, lambda step, loss: False).losses[-1] for trial in trials]
        del resident
        _freed()
    return [
        compared(mode, arm, ends["plain", arm], ends[mode, arm]) for mode in modes for arm in arms if mode != "plain"
    ]


def compared(mode: str, arm: str, plain: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Of the same seeds: other − plain, its mean and 95 % interval, beside the spread over seeds."""
    difference: Interval = interval([b - a for a, b in zip(plain, other, strict=True)])
    spread = interval(plain)
    said = (
        f"{arm}, {mode} − plain: {difference.mean:+.5f} (95 % {difference.low:+.5f} … {difference.high:+.5f}) over "
        f"{len(plain)} seeds, whose plain losses are {fmean(plain):.4f} ± {(spread.high - spread.low) / 2:.4f}; "
        f"{'no difference found' if 0.0 in difference else 'THEY DIFFER'}"
    )
    return {"mode": mode, "arm": arm, "plain": list(plain), "other": list(other), **asdict(difference), "said": said}


def _freed() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- command


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--modes", nargs="+", default=["plain", "recorded", "both"], choices=tuple(MODES))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, metavar="K")
    parser.add_argument("--paired", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--world", type=Path, metavar="FOLDER")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="smollm2-135m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--replays", action="store_true", help="time the replays of recorded steps (a GPU)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    world = make_world(args.world, args.shape) if args.world else []
    asked = Asked(str(args.study), (*world, *args.set), "plain", args.steps, args.replays)
    arms = args.arms or [a.name for a in asked.spec().arms]
    found: list[dict[str, Any]] = []
    if args.paired:
        found = paired(asked, arms, args.modes, args.paired)
        print(*(test["said"] for test in found), sep="\n", flush=True)
    for mode in () if args.paired else args.modes:
        alone: dict[str, float] = {}
        for workers in dict.fromkeys((1, args.workers)):
            for row in side_by_side(replace(asked, mode=mode), arms, args.repeat, workers):
                first = alone.setdefault(row.arm, row.trial_s)
                found.append({**asdict(row), "times_alone": row.trial_s / first})
                print(_told(found[-1]), flush=True)
            _freed()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _told(row: dict[str, Any]) -> str:
    kept = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v not in (None, "")}
    return " ".join(f"{k}={v}" for k, v in kept.items())


if __name__ == "__main__":
    sys.exit(main())
