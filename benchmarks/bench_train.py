"""What `loralign train` runs beside TRL + PEFT as users run it: tokens a second and peak memory of real trainers.

    python benchmarks/bench_train.py                                        tiny, on the CPU
    python benchmarks/bench_train.py --device cuda --shapes 1b 135m --json out.json
    python benchmarks/bench_train.py --device cuda --shapes 1b --rows equal     every row as long as the longest may be
    torchrun --nproc_per_node 2 benchmarks/bench_train.py --device cuda --shapes 8b --rows equal \
        --kinds "loralign compiled" --beside ONE.json           DDP; the efficiency beside one process's --json

loralign: the trainer of `loralign train` (RowTrainer, `attach` and `quicken`, which is `train.compile: auto`): blocks
compiled and steps replayed where that pays; "compiled": never replayed; "off": neither. peft: SFTTrainer with
`peft_config`, bf16, torch's fused AdamW. "compile", "liger": with the Trainer's own `torch_compile`,
`use_liger_kernel`. "packed": TRL's packing. Same model, rows, rank and rate; a step is a batch. Times are of the steps
after the first `--warm` ones; tokens are those of the rows, padding is not counted. With equal rows and one process the
compiled floor (frozen model, blocks compiled, no optimizer) is run too, and a step is given as its multiple.
--checkpointing auto: as SFTConfig has it, on; off: no activation checkpointing, as `loralign train` has it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_step
import peft
import torch
import transformers
import trl
from bench_models import SHAPES, fresh_model
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from loralign import Recipe, attach, build, peft_config
from loralign.train.quick import quicken
from loralign.train.row_trainer import RowTrainer

KINDS = ("peft", "peft packed", "loralign", "loralign packed")
MORE = (
    *("peft compile", "peft packed compile", "peft liger", "peft compile liger"),
    *("loralign compiled", "loralign packed compiled", "loralign off", "loralign packed off"),
)
WORDS = 4000
RANK, WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{k}": k for k in range(WORDS)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", bos_token="w1")


def rows(count: int, longest: int, kind: str) -> Dataset:
    """equal: all of the longest length. mixed: log-normal lengths, the middle one a third of the longest."""
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=draw) * 0.6 + math.log(longest / 3)).exp().round().clamp(8, longest).int()
    if kind == "equal":
        lengths = torch.full((count,), longest)
    made = [torch.randint(4, WORDS, (int(n),), generator=draw).tolist() for n in lengths]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in made])


class Clock(TrainerCallback):
    """The end of the last step that is not counted and of the last one, with the tokens collated until then."""

    def __init__(self, cuda: bool, warm: int, steps: int) -> None:
        self.cuda, self.at, self.tokens = cuda, (warm, warm + steps), 0
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.at:  # a wait at each would forbid the host to run ahead
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), self.tokens))


def counting(trainer: SFTTrainer, clock: Clock) -> None:
    plain = trainer.data_collator

    def collate(examples: list[dict[str, Any]]) -> Any:
        clock.tokens += sum(len(example["input_ids"]) for example in examples)
        return plain(examples)

    trainer.data_collator = collate


def trainer_of(kind: str, shape: str, args: argparse.Namespace, folder: str) -> SFTTrainer:
    _, size, longest = SHAPES[shape]
    cuda, packing = args.device == "cuda", "packed" in kind
    config = SFTConfig(
        output_dir=folder, max_steps=args.warm + args.steps, per_device_train_batch_size=size, learning_rate=1e-4,
        use_cpu=not cuda, bf16=cuda, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=10**6,
        max_length=longest, packing=packing, torch_compile=" compile" in f"{kind} ".replace("compiled", ""),
        use_liger_kernel="liger" in kind, seed=0, dataset_num_proc=None, shuffle_dataset=False,
        logging_nan_inf_filter=kind.startswith("peft"),  # as `loralign train` has both: it waits for every step's loss,
        accelerator_config=None if kind.startswith("peft") else {"non_blocking": cuda},  # and every batch for a step
        **({} if args.checkpointing == "auto" else {"gradient_checkpointing": False}),
    )  # fmt: skip
    model = fresh_model(shape, args.device)
    data = rows((args.warm + args.steps) * size * WORLD * (4 if packing else 1), longest, args.rows)
    common: dict[str, Any] = {"args": config, "train_dataset": data, "processing_class": tokenizer()}
    if kind.startswith("peft"):
        stock = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return SFTTrainer(model, peft_config=stock, **common)
    recipe = build("lora", r=16, alpha=32)
    assert isinstance(recipe, Recipe)
    trainer = RowTrainer(model, peft_config=peft_config(recipe, model), **common)
    attach(trainer, recipe)
    if "off" not in kind:
        backend = None if cuda else "aot_eager"
        quicken(trainer, packing=packing, seed=0, backend=backend, short=0, replay="compiled" not in kind)
    return trainer


def measured(kind: str, shape: str, args: argparse.Namespace) -> dict[str, float]:
    cuda = args.device == "cuda"
    torch._dynamo.reset()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = trainer_of(kind, shape, args, folder), Clock(cuda, args.warm, args.steps)
        counting(trainer, clock)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.state.log_history[-1]["train_loss"]
    (start, before), (end, after) = clock.ends
    seconds = (end - start) / args.steps
    first = start - began - args.warm * seconds
    del trainer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return {
        "ms": 1e3 * seconds,
        "tokens_s": (after - before) / (end - start),
        "first_s": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "train_loss": loss,
    }


def floor(shape: str, args: argparse.Namespace) -> float:
    """ms of the compiled floor."""
    torch._dynamo.reset()
    return bench_step.measure(["compiled floor"], shape, args.device, 7, 0.0)["compiled floor"]["ms"]


def table(results: dict[str, dict[str, dict[str, float]]], floors: dict[str, float]) -> None:
    head = f"{'shape':7}{'kind':22}{'ms':>9}{'tokens/s':>11}{'/peft':>8}{'/packed':>9}"
    print("\n" + head + f"{'/floor':>8}{'peak GiB':>10}{'first s':>9}{'loss':>9}", flush=True)
    for shape, kinds in results.items():
        for kind, row in kinds.items():
            beside = [row["tokens_s"] / kinds[k]["tokens_s"] if k in kinds else math.nan for k in KINDS[:2]]
            over = row["ms"] / floors[shape] if shape in floors else math.nan
            print(
                f"{shape:7}{kind:22}{row['ms']:9.1f}{row['tokens_s']:11.0f}{beside[0]:8.2f}{beside[1]:9.2f}{over:8.2f}"
                f"{row['peak_gib']:10.2f}{row['first_s']:9.1f}{row['train_loss']:9.4f}"
            )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *MORE), default=list(KINDS))
    parser.add_argument("--rows", choices=("mixed", "equal"), default="mixed")
    parser.add_argument("--warm", type=int, help="steps that are not counted")
    parser.add_argument("--steps", type=int, help="steps that are")
    parser.add_argument("--checkpointing", choices=("auto", "off"), default="auto", help="of activations")
    parser.add_argument("--beside", type=Path, help="what one process wrote: the efficiency of several is said")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    cuda = args.device == "cuda"
    args.warm, args.steps = args.warm or (30 if cuda else 2), args.steps or (20 if cuda else 2)
    if cuda:
        torch.cuda.set_device(RANK)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("loralign").setLevel(logging.INFO if RANK == 0 else logging.ERROR)
    results: dict[str, dict[str, dict[str, float]]] = {}
    floors = {}
    for shape in args.shapes or (["1b"] if cuda else ["tiny"]):
        if args.rows == "equal" and WORLD == 1:
            floors[shape] = floor(shape, args)
        for kind in args.kinds:
            try:
                results.setdefault(shape, {})[kind] = measured(kind, shape, args)
            except Exception as error:  # whatever it is: one kind that fails costs no other
                print(f"{shape} {kind}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            if RANK == 0:
                write(args, floors, results)
        if RANK == 0:
            table({shape: results.get(shape, {})}, floors)
    if args.beside and RANK == 0:
        efficiency(json.loads(args.beside.read_text())["results"], results)


def write(args: argparse.Namespace, floors: dict[str, float], results: Any) -> None:
    """After every kind: whoever stops the run keeps what was measured."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, trl)}
    settings = {"rows": args.rows, "checkpointing": args.checkpointing, "processes": WORLD}
    body = {"versions": versions, "device": args.device, **settings, "floors": floors, "results": results}
    if args.json:
        args.json.write_text(json.dumps(body, indent=1))


def efficiency(one: Any, several: Any) -> None:
    """Of processes that each have as many rows as one alone: its milliseconds over theirs."""
    for shape, kinds in several.items():
        for kind, row in kinds.items():
            if kind in one.get(shape, {}):
                print(f"{shape} {kind}: {WORLD} processes, efficiency {one[shape][kind]['ms'] / row['ms']:.3f}")


if __name__ == "__main__":
    main()
