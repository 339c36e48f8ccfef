"""`plan`'s peak memory beside the measured peak of real training steps.

    python benchmarks/bench_plan.py                                  # CPU, about 5 minutes on 2 cores
    python benchmarks/bench_plan.py --device cuda --json out.json    # one GPU of 40 GB or more

Each configuration runs in a fresh process: the model is built, adapted and trained for two optimizer steps of two
micro-batches with the loss of TRL's SFTTrainer. CPU: growth of resident memory from before the model was built to its
highest point in the steps, with a malloc that returns freed blocks at once (`MALLOC_MMAP_THRESHOLD_`), in fp32; with
glibc's own settings resident memory is higher, `--glibc` shows by how much. CUDA: `max_memory_allocated`, weights in
bf16 under bf16 autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loralign import adapt, build, optimizer
from loralign.plan.memory import estimate
from loralign.plan.trace import Step, example_batch, usual_loss

SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
ONE_B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
EIGHT_B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip

# name: shape, method, rows, tokens, gradient checkpointing
CASES: dict[str, dict[str, tuple[dict[str, Any], str, int, int, bool]]] = {
    "cpu": {
        "smollm2-135m, lora-ga, 4 × 256": (SMOL, "lora-ga", 4, 256, False),
        "smollm2-135m, lora, 4 × 256, recomputed": (SMOL, "lora", 4, 256, True),
        "8 layers of 1024, pissa, 2 × 512": (WIDE, "pissa", 2, 512, False),
    },
    "cuda": {
        "1B shape, lora, 8 × 1024": (ONE_B, "lora", 8, 1024, False),
        "1B shape, lora, 8 × 1024, recomputed": (ONE_B, "lora", 8, 1024, True),
        "8B shape, lora, 4 × 1024, recomputed": (EIGHT_B, "lora", 4, 1024, True),
        "smollm2-135m, lora-ga, 16 × 512": (SMOL, "lora-ga", 16, 512, False),
    },
}


def measured(device: str, case: str) -> dict[str, float]:
    """Peak bytes of two real optimizer steps; meant for a fresh process."""
    shape, name, rows, length, recompute = CASES[device][case]
    _steps(device, {**SMOL, "num_hidden_layers": 1, "hidden_size": 72, "vocab_size": 64}, "lora", 2, 8, False)  # warm
    before = _resident(device, reset=True)
    started = time.perf_counter()
    _steps(device, shape, name, rows, length, recompute)
    return {"bytes": _highest(device) - before, "seconds": time.perf_counter() - started}


def _steps(device: str, shape: dict[str, Any], name: str, rows: int, length: int, recompute: bool) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    step = Step(rows, length, device="cpu")
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype).train()
    loss = usual_loss(model, step)  # TRL's own fused head, on either device
    batch = {k: torch.ones_like(v, device=device) for k, v in example_batch(model, step).items()}
    batch["attention_mask"][-1, length - 3 :] = 0
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()
    recipe = build(name, **({"r": 4} if shape["hidden_size"] < 100 else {}))
    evidence = [{k: v[:1, :16] for k, v in batch.items()}] * 2
    with autocast:
        adapted = adapt(model, recipe, evidence, loss=loss)  # type: ignore[arg-type]
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _resident(device, reset=True)  # the init is not part of a step
    step_taker = optimizer(adapted, recipe, 1e-6)  # type: ignore[arg-type]
    for _ in range(2):
        for _ in range(2):
            with autocast:
                value = loss(adapted, batch) / (rows * length)
            value.backward()
        step_taker.step()
        step_taker.zero_grad()


def _resident(device: str, *, reset: bool) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def planned(device: str, case: str) -> dict[str, float]:
    """The estimate, and how long it took."""
    shape, name, rows, length, recompute = CASES[device][case]
    cuda = device == "cuda"
    step = Step(rows, length, micro_batches=2, device=device, bf16=cuda, gradient_checkpointing=recompute)  # type: ignore[arg-type]
    started = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16 if cuda else torch.float32)
    return {"bytes": estimate(model, build(name), step).peak_bytes, "seconds": time.perf_counter() - started}


def in_fresh_process(device: str, case: str, *, glibc: bool) -> dict[str, float]:
    trim = {} if glibc else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--device", device, "--only", case]
    done = subprocess.run(command, env={**os.environ, **trim}, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _where(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "name": name, **{p: version(p) for p in ("torch", "transformers", "trl", "peft")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--glibc", action="store_true", help="leave malloc as it is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: leave --device out for the CPU")
    if given.only:
        print(json.dumps(measured(given.device, given.only)))
        return
    rows, errors = [], []
    print(f"{'configuration':<42}{'planned':>11}{'measured':>11}{'error':>8}{'plan took':>11}{'steps took':>12}")
    for case in CASES[given.device]:
        plan, real = planned(given.device, case), in_fresh_process(given.device, case, glibc=given.glibc)
        errors.append(plan["bytes"] / real["bytes"] - 1)
        rows.append({"case": case, "planned": plan["bytes"], "measured": real["bytes"], "error": errors[-1]})
        bytes_ = f"{plan['bytes'] / 1e9:>8.3f} GB{real['bytes'] / 1e9:>8.3f} GB{errors[-1]:>8.1%}"
        print(f"{case:<42}{bytes_}{plan['seconds']:>9.1f} s{real['seconds']:>10.1f} s", flush=True)
    worst = max(map(abs, errors))
    print(f"worst error {worst:.1%}: {'within' if worst <= 0.15 else 'OUTSIDE'} 15 %")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**_where(given.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
