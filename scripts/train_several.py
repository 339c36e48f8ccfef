"""`loralign train` on several processes beside one: losses, a resumed run and the adapter that is exported.

    python scripts/train_several.py --out OUT [--processes 2] [--methods lora spectral]

For every method the same rows by one process, by torchrun (DDP) and by `accelerate launch` (FSDP2, one GPU a process;
on a CPU through tests/fsdp_on_cpu.py), and the FSDP2 run once more from its middle. A small Llama in fp32, so that
losses differ by rounding alone: 1 where one is further off than 1e-5, a run fails or none is verified. `--bf16`: bf16
over fp32 masters, allowed 1e-2. OUT/several.json: what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
WORDS, STEPS, ROWS = 500, 6, 8
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-ga": {"sketch": None},  # exact: a sketch depends on which rows come together
    "spectral": {},
    "lora-rite": {},
    "sora": {},
    "adalora": {},
    "chain-of-lora": {"links": 2},
}
"""A start, two transforms, two rank rules and a chain, with their options."""
SPLIT = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


def world(folder: Path) -> None:
    """base and rows.jsonl."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=128, **sizes)).save_pretrained(
        folder / "base"
    )
    words = Tokenizer(WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{k}": k for k in range(3, WORDS)}, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")
    rows = [
        {
            "prompt": " ".join(f"w{3 + (7 * k + j) % 90}" for j in range(20)),
            # many answers: the gradient of a few has so small a rank that its next directions, which lora-ga takes
            # too, are rounding
            "completion": f" w{100 + 37 * k % 211} w{100 + 17 * k % 199} w{100 + 53 * k % 193}",
        }
        for k in range(8 * ROWS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def recipe(method: str, rows: int, precision: str, output: str) -> dict[str, Any]:
    found: dict[str, Any] = {"model": "base", "data": {"train": "rows.jsonl", "max_length": 64}, "method": method}
    if METHODS[method]:
        found["options"] = METHODS[method]
    train = {"steps": STEPS, "batch_size": rows, "micro_batch_size": rows, "learning_rate": 1e-3, "log_every": 1}
    return {
        **found, "rank": 8, "output": output, "seed": 3,
        "train": {**train, "save_every": STEPS // 2, "precision": precision, "schedule": "constant"},
    }  # fmt: skip


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("", 0))
        return str(s.getsockname()[1])


def command(engine: str, processes: int) -> list[str]:
    launch = [sys.executable, "-m"]
    if engine == "one":
        return [*launch, "loralign"]
    if engine == "fsdp" and CUDA:
        several = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        several += ["--dynamo_backend", "no", "--main_process_port", free_port()]
        return [*launch, "accelerate.commands.launch", *SPLIT, *several, "-m", "loralign"]
    program = ["-m", "loralign"] if engine == "ddp" else [str(ROOT / "tests/fsdp_on_cpu.py")]
    return [
        *launch, "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port(), *program
    ]  # fmt: skip


def trained(folder: Path, method: str, engine: str, asked: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One run of `loralign train`: what it said, its losses, its exit code."""
    name = f"{method}-{engine}"
    rows = ROWS if engine == "one" else ROWS // asked.processes
    written = folder / f"{name}.yaml"
    body = recipe(method, rows, "bf16" if asked.bf16 else "fp32", name)
    written.write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML
    only = {"CUDA_VISIBLE_DEVICES": "0"} if engine == "one" and CUDA else {}
    done = subprocess.run(
        [*command(engine, asked.processes), "train", written.name, *more], cwd=folder, env=os.environ | only,
        capture_output=True, text=True, timeout=asked.timeout,
    )  # fmt: skip
    said = {"code": done.returncode, "verified": done.stdout.count("Verified: ")}
    if done.returncode or said["verified"] != 1:
        return {**said, "out": done.stdout[-500:], "err": done.stderr[-6000:]}
    entries = map(json.loads, (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines())
    logged = [entry for entry in entries if "loss" in entry]
    return {
        **said,
        "tokens": int(logged[-1]["num_tokens"]),
        **{kind: [entry[key] for entry in logged] for kind, key in (("losses", "loss"), ("entropies", "entropy"))},
    }


def apart(one: Path, other: Path) -> float:
    """‖ΔW_B − ΔW_A‖ / ‖ΔW_A‖ over all modules of two adapters."""
    off = size = 0.0
    (a, s), (b, t) = (_products(folder) for folder in (one, other))
    for name, pair in a.items():
        wanted, found = (scale * (up @ down) for scale, (down, up) in ((s, pair), (t, b[name])))
        off += float((found - wanted).square().sum())
        size += float(wanted.square().sum())
    return float((off / size) ** 0.5)


def _products(folder: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """A and B by module, and the scale."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    pairs = {k: (v, tensors[k.replace("lora_A", "lora_B")]) for k, v in tensors.items() if "lora_A" in k}
    return pairs, config["lora_alpha"] / config["r"]


def checked(folder: Path, method: str, asked: argparse.Namespace) -> dict[str, Any]:
    found = {engine: trained(folder, method, engine, asked) for engine in ("one", "ddp", "fsdp")}
    again = folder / f"{method}-fsdp"
    if "losses" in found["fsdp"]:
        found["fsdp"]["split"] = (again / f"checkpoints/checkpoint-{STEPS}/pytorch_model_fsdp_0").is_dir()
        shutil.copytree(again, folder / "whole" / method)
        shutil.rmtree(again / f"checkpoints/checkpoint-{STEPS}")
        found["resumed"] = trained(folder, method, "fsdp", asked, "--resume")
    for engine, said in found.items():
        if "losses" not in said or "losses" not in found["one"]:
            continue
        one = found["one"]
        pairs = [pair for kind in ("losses", "entropies") for pair in zip(said[kind], one[kind], strict=True)]
        said["off"] = max(abs(a - b) / b for a, b in pairs)
        said["counted"] = engine == "resumed" or said["tokens"] == one["tokens"]  # TRL begins anew where a run goes on
        there = folder / "whole" / method if engine == "fsdp" else again if engine == "resumed" else None
        said["adapter_off"] = apart(folder / f"{method}-one", there or folder / f"{method}-{engine}")
    return found


def told(method: str, found: dict[str, Any], allowed: float) -> Iterator[str]:
    """A line for each run; those that are wrong say so."""
    for engine, said in found.items():
        if "losses" not in said:
            yield f"{method:15}{engine:9}WRONG: {said['code']}, {said['verified']} verified: {said['err'][-700:]}"
            continue
        off = said.get("off", float("inf"))
        wrong = "" if off <= allowed and said.get("split", True) and said.get("counted") else "  WRONG"
        yield f"{method:15}{engine:9}{said['losses'][-1]:10.6f}{off:10.1e}{said.get('adapter_off', -1):10.1e}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--beside", type=int, default=1, help="methods at a time")
    parser.add_argument("--timeout", type=float, default=280, help="seconds of one run")
    asked = parser.parse_args()
    folder = (asked.out / "runs").resolve()
    folder.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    world(folder)
    with ThreadPoolExecutor(asked.beside) as pool:
        found = dict(zip(asked.methods, pool.map(lambda m: checked(folder, m, asked), asked.methods), strict=True))
    (asked.out / "several.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    shutil.rmtree(folder)
    print(f"{'method':15}{'run':9}{'last loss':>10}{'losses':>10}{'adapter':>10}   off those of one process")
    lines = [line for method, said in found.items() for line in told(method, said, 1e-2 if asked.bf16 else 1e-5)]
    print("\n".join(lines))
    sys.exit(any("WRONG" in line for line in lines))


if __name__ == "__main__":
    main()
