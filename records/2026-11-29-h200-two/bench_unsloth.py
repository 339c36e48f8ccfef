"""Unsloth's trainer as its documentation runs it: ms a step, tokens a second, peak memory, as bench_train.py has them.

    python records/2026-11-29-h200-two/bench_unsloth.py --shapes 1b --json unsloth_1b.json
    ... --shapes 8b --kinds unsloth "unsloth padded"

In an environment of its own, without loralign: Unsloth 2026.10 takes transformers up to 5.17, trl up to 1.15 and
datasets below 5. Shapes, rows (all as long as the longest), rank, rate, batch, warm and counted steps and the clock are
bench_train.py's with `--rows equal --checkpointing off --warm 8 --steps 12`. `unsloth`: no checkpointing of activations
and torch's fused AdamW. `unsloth padded`: and padding_free=False, where it compiles each block (on a Hopper GPU it
chooses padding-free batches, which are not compiled). `unsloth default`: its documented checkpointing and adamw_8bit.
The folder that `from_pretrained` reads has a sparse weights file (zeros that take no room); the weights of
bench_models.fresh_model are then copied in, on the device. Peaks are counted after the model is made; bench_train.py's
include that, which is below a step's. Compare losses with bench_train.py's before times.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network: neither hub nor Unsloth's count of its users
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth_compiled_"))  # it writes modules
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("UNSLOTH_DATASET_NUM_PROC", "1")

BEGAN = time.perf_counter()
# first, as it asks: it patches what follows
import unsloth  # noqa: E402, I001
from unsloth import FastLanguageModel  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bench_models import SHAPES, fresh_model  # noqa: E402

KINDS = ("unsloth", "unsloth padded", "unsloth default")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = 4000


class Clock(TrainerCallback):
    """The end of the last step that is not counted and of the last one."""

    def __init__(self, cuda: bool, warm: int, steps: int) -> None:
        self.cuda, self.at = cuda, (warm, warm + steps)
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.at:
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{k}": k for k in range(WORDS)}, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", bos_token="w1", unk_token="w3"
    )


def rows(count: int, longest: int) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    torch.randn(count, generator=draw)  # bench_train.rows draws the lengths first
    made = [torch.randint(4, WORDS, (longest,), generator=draw).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in made])


def sparse_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file of zeros under these names: a header, then a hole."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in state.items():
        size = t.numel() * t.element_size()
        head[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    body = json.dumps(head).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        file.truncate(8 + len(body) + at)


def loaded(shape: str, kind: str, device: str, folder: str) -> tuple[Any, Any]:
    """What from_pretrained and get_peft_model give, with the weights that bench_train.py's kinds have."""
    plain = fresh_model(shape, device).to(torch.bfloat16)
    state = plain.state_dict()
    plain.config.architectures = ["LlamaForCausalLM"]
    plain.config.dtype = torch.bfloat16
    plain.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    sparse_weights(state, Path(folder) / "model.safetensors")
    more = {} if device == "cuda" else {"device_map": device}
    default = "default" in kind
    checkpointing: Any = "unsloth" if default else False
    model, words = FastLanguageModel.from_pretrained(
        folder, max_seq_length=SHAPES[shape][2], dtype=torch.bfloat16, load_in_4bit=False,
        use_gradient_checkpointing=checkpointing, **more,
    )  # fmt: skip
    held = dict(model.named_parameters())
    if set(held) != set(state):
        raise RuntimeError(f"parameters that differ: {sorted(set(held) ^ set(state))[:4]}")
    with torch.no_grad():
        for name, p in held.items():
            p.copy_(state[name][: p.shape[0]])
    del plain, state, held
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=32, lora_dropout=0, bias="none",
        use_gradient_checkpointing=checkpointing, random_state=0,
    )  # fmt: skip
    return model, words


def trainer_of(shape: str, kind: str, args: argparse.Namespace, folder: str) -> SFTTrainer:
    _, size, longest = SHAPES[shape]
    cuda = args.device == "cuda"
    model, words = loaded(shape, kind, args.device, folder)
    default = "default" in kind
    config = SFTConfig(
        output_dir=f"{folder}/out", max_steps=args.warm + args.steps, per_device_train_batch_size=size,
        gradient_accumulation_steps=1, learning_rate=1e-4, weight_decay=0.0, warmup_steps=0, lr_scheduler_type="linear",
        max_grad_norm=1.0, use_cpu=not cuda, bf16=cuda, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_steps=10**6, max_length=longest, packing=False, seed=0, dataset_num_proc=None, shuffle_dataset=False,
        optim="adamw_8bit" if default else "adamw_torch_fused",
        **({} if default else {"gradient_checkpointing": False}),
        **({"padding_free": False} if "padded" in kind else {}),
    )  # fmt: skip
    data = rows((args.warm + args.steps) * size, longest)
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=words)


def facts(trainer: SFTTrainer) -> dict[str, Any]:
    """What ran, as far as it can be read: what a fair comparison must say."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    args = trainer.args
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("layers.0.self_attn"))
    return {
        "trained": sum(p.numel() for p in trained),
        "trained_dtypes": dict(Counter(str(p.dtype) for p in trained)),
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "checkpointing_modules": sum(
            bool(getattr(m, "gradient_checkpointing", False)) for m in trainer.model.modules()
        ),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "accumulation": args.gradient_accumulation_steps,
        "batch": args.per_device_train_batch_size,
        "rows": len(trainer.train_dataset),
        "row_tokens": len(trainer.train_dataset[0]["input_ids"]),
        "padding_free": getattr(args, "padding_free", None),
        "collator": type(trainer.data_collator).__name__,
        "attention": getattr(trainer.model.config, "_attn_implementation", None),
        "qkv": getattr(getattr(layer, "apply_qkv", None), "__name__", None),
    }


def measured(shape: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    cuda = args.device == "cuda"
    gc.collect()
    torch._dynamo.reset()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    _, size, longest = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        trainer, clock = trainer_of(shape, kind, args, folder), Clock(cuda, args.warm, args.steps)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the copy of the weights is no part of a training
        ready = time.perf_counter()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.state.log_history[-1]["train_loss"]
        found = facts(trainer)
    seconds = (clock.ends[1] - clock.ends[0]) / args.steps
    found = {
        "ms": 1e3 * seconds,
        "tokens_s": size * longest / seconds,
        "ready_s": ready - began,
        "first_s": clock.ends[0] - ready - args.warm * seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "train_loss": loss,
        **found,
    }
    if cuda and found["accumulation"] != 1:
        raise RuntimeError(f"{found['accumulation']} batches a step")
    del trainer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "unsloth_zoo")
    found = {"unsloth": unsloth.__version__}
    for name in (*names, "xformers", "flash_attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    head = f"{'shape':7}{'kind':22}{'ms':>9}{'tokens/s':>11}{'peak GiB':>10}{'ready s':>9}{'first s':>9}{'loss':>9}"
    print("\n" + head, flush=True)
    for shape, kinds in results.items():
        for kind, row in kinds.items():
            print(
                f"{shape:7}{kind:22}{row['ms']:9.1f}{row['tokens_s']:11.0f}{row['peak_gib']:10.2f}"
                f"{row['ready_s']:9.1f}{row['first_s']:9.1f}{row['train_loss']:9.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["1b"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--warm", type=int, default=8, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=12, help="steps that are")
    parser.add_argument("--scratch", help="a folder for the model's files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    said = versions()
    print(f"imported in {time.perf_counter() - BEGAN:.1f} s; {said}", flush=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for shape in args.shapes:
        for kind in args.kinds:
            try:
                results.setdefault(shape, {})[kind] = measured(shape, kind, args)
                print(json.dumps({kind: results[shape][kind]}), flush=True)
            except Exception:  # whatever it is: one kind that fails costs no other
                failed[f"{shape} {kind}"] = "\n".join(traceback.format_exc().splitlines()[-25:])
                print(f"{shape} {kind} FAILED\n{failed[f'{shape} {kind}']}", flush=True)
            if args.json:
                settings = {"rows": "equal", "warm": args.warm, "steps": args.steps, "failed": failed}
                body = {"versions": said, "device": args.device, **settings, "results": results}
                args.json.write_text(json.dumps(body, indent=1))
    table(results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
