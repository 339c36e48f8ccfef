"""What an init may know, and what knowing it costs: sketches, preheating, subspaces; ratios within one process.

    python benchmarks/bench_evidence.py quality      sketches of real gradients (SmolLM2, BBC News) beside exact ones
    python benchmarks/bench_evidence.py init         LoRA-GA: PEFT's, ours exact, ours sketched; time and peak memory
    python benchmarks/bench_evidence.py preheat      K preheating steps at rank 128 beside K LoRA steps
    python benchmarks/bench_evidence.py product      product_svd at 4096², R = 128 beside forming B·A
    python benchmarks/bench_evidence.py cora         a basis of all SmolLM2 sites beside reading, and beside SVDs
    python benchmarks/bench_evidence.py init preheat product --device cuda --shape 8b --json out.json

Several parts may be named. On the CPU: one thread, process time, the best of several, interleaved. quality and cora
need `make assets`. Measure of quality: energy of the first LoRA-GA step over that of the best step of rank 2r.
`init` ends with a quantised base: nf4 where bitsandbytes is installed, otherwise int8 weights with one scale per row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import evidence_smollm2
import peft
import torch
import transformers
from evidence_timing import Row, best, clock, recipe, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loralign import optimizer, sites
from loralign.carrier.sites import put_in
from loralign.evidence import collect
from loralign.maths.linalg import product_svd
from loralign.train.adapt import gather
from loralign.train.start import start
from loralign.types import Preheated, Sketch

SHAPES: dict[str, tuple[dict[str, int], int, int]] = {  # config, tokens of a micro-batch, rank of the preheat
    "tiny": (
        {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}, 64, 64,
    ),
    "1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8}, 1024, 128,
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8}, 1024, 128,
    ),
}  # fmt: skip
MICRO_BATCHES = 4
Initialise = Callable[[Any, Any], Row]
"""Inserts and initialises an adapter; returns what is to be said about it."""


def llama(shape: str, device: str) -> Any:
    """Random weights, bf16 on the GPU, gradient checkpointing on, training mode."""
    config = LlamaConfig(vocab_size=32000, use_cache=False, **SHAPES[shape][0])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def micro_batches(shape: str, device: str, count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 32000, (1, SHAPES[shape][1]), generator=draw).to(device) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


# ----------------------------------------------------------------------------------------------------------------- init


def ours(sketch: Sketch | None) -> Initialise:
    def run(model: Any, batches: Any) -> Row:
        made = recipe("lora-ga", {"sketch": sketch, "micro_batches": MICRO_BATCHES}, r=16, alpha=32.0)
        adapted = put_in(model, made)
        evidence = gather(adapted, made, batches)
        start(adapted, made, evidence)
        exact = f"{sum(d.exact for d in evidence.values())}/{len(evidence)}"
        state = evidence.spent.state_bytes / 2**30
        return {"exact sites": exact, "state GiB": state, "evidence s": evidence.spent.seconds}

    return run


def of_peft(model: Any, batches: Any) -> Row:
    def train_step() -> None:
        for batch in batches[:MICRO_BATCHES]:
            model(**batch).loss.backward()

    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*_proj",
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    seconds = clock(model.device.type)
    peft.tuners.lora.preprocess_loraga(model, config, train_step)
    seconds = clock(model.device.type) - seconds
    made = peft.get_peft_model(model, config)
    count = sum(hasattr(m, "lora_A") for m in made.modules())
    return {"exact sites": f"{count}/{count}", "state GiB": "-", "evidence s": seconds}


class Int8Linear(nn.Linear):
    """Weight-only int8: W ≈ scale·q, one scale per output row, dequantised in forward; the weight has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        W = linear.weight.detach()
        scale = W.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((W / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return new.to(linear.weight.device)


def quantised(model: Any, device: str) -> tuple[Any, str]:
    """Every linear layer but the head with quantised weights, and of which kind they are."""
    four_bit = device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, _nf4(module) if four_bit else Int8Linear(module))
    model.is_loaded_in_4bit = four_bit
    return model, "nf4 base (bitsandbytes)" if four_bit else "int8-weight base (no bitsandbytes here)"


def _measured(kind: str, run: Initialise, shape: str, device: str, *, on_quantised: bool) -> Row:
    model: Any = llama(shape, device)
    batches = micro_batches(shape, device, MICRO_BATCHES + 1)
    if on_quantised:
        model, said = quantised(model, device)
        kind = f"{kind}, {said}"
    before = 0
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = clock(device)
    said_of_it = run(model, batches)
    row: Row = {"init": kind, "seconds": clock(device) - began, **said_of_it}
    if device == "cuda":
        row |= {"weights GiB": before / 2**30, "added GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}
    return row


def init(args: argparse.Namespace) -> list[Row]:
    """LoRA-GA's start, 4 micro-batches of one row, checkpointed; peak memory above the weights.

    The default setting measures its share of a fifth micro-batch too. Every kind first runs once on a tiny model.
    """
    kinds: dict[str, Initialise] = {
        "PEFT lora_ga": of_peft,
        "ours, default sketch": ours(Sketch()),
        "ours, 8r, no fall-back, not measured": ours(Sketch(exact_above=1.0, held_out=0)),
        "ours, 4r, 4 passes, no fall-back": ours(Sketch(4, 4, exact_above=1.0, held_out=0)),
        "ours, exact": ours(None),
        "ours, 8r, no fall-back": ours(Sketch(exact_above=1.0)),
    }
    last, rows = list(kinds)[-1], []
    for shape in dict.fromkeys(("tiny", args.shape)):
        rows = []
        for kind, run in kinds.items():
            rows.append(_measured(kind, run, shape, args.device, on_quantised=kind == last))
            gc.collect()
            print(shape, rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------- preheat, product


def preheat(args: argparse.Namespace) -> list[Row]:
    """Steps of the preheat at R = 128 beside LoRA steps at r = 16 of the same model; the rest stated apart."""
    R, batches, plain = SHAPES[args.shape][2], micro_batches(args.shape, args.device, 4), recipe("lora", r=16)
    model = put_in(llama(args.shape, args.device), plain)
    marks: list[tuple[str, float]] = []
    began = clock(args.device)
    need = Preheated(lambda r: R, args.steps, "AB", micro_batches=4)
    collect(need, model, sites(model), batches, progress=lambda what, i, n: marks.append((what, clock(args.device))))
    total = clock(args.device) - began
    preheated = _per_step([t for what, t in marks if what == "preheat"])
    start(model, plain, {})
    opt, ticks = optimizer(model, plain, 1e-4), []
    for i in range(args.steps):
        model(**batches[i % 4]).loss.backward()
        opt.step()
        opt.zero_grad()
        ticks.append(clock(args.device))
    lora = _per_step(ticks)
    row: Row = {"preheat": f"R {R}, {args.steps} steps", "ms/step": 1e3 * preheated, "LoRA ms/step": 1e3 * lora}
    return [row | {"ratio": preheated / lora, "start, SVDs s": total - args.steps * preheated}]


def _per_step(ticks: list[float]) -> float:
    """Seconds; the first two steps do not count."""
    return median(b - a for a, b in pairwise(ticks[1:]))


def product(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for m, n in ((2048, 2048), (4096, 4096), (11008, 4096)) if args.shape != "tiny" else ((256, 256),):
        B, A = torch.randn(m, 128, device=args.device), torch.randn(128, n, device=args.device)
        kinds = {"svd": lambda B=B, A=A: product_svd(B, A), "form": lambda B=B, A=A: B @ A}
        seconds = best(kinds, args.device, 10)
        row: Row = {"product": f"{m}x{n}, R 128", **{f"{k} ms": 1e3 * v for k, v in seconds.items()}}
        rows.append(row | {"svd/form": seconds["svd"] / seconds["form"]})
        print(rows[-1], flush=True)
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "quality": evidence_smollm2.quality,
    "init": init,
    "preheat": preheat,
    "product": product,
    "cora": evidence_smollm2.cora,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default=None, choices=tuple(SHAPES), help="of init, preheat and product")
    parser.add_argument("--rank", type=int, default=8, help="of quality")
    parser.add_argument("--micro-batches", type=int, default=6, help="of quality, 2x256 tokens each")
    parser.add_argument("--steps", type=int, default=12, help="of preheat, at least 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.shape = args.shape or ("8b" if args.device == "cuda" else "tiny")
    if args.device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    about: Row = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    about |= {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu, 1 thread", "shape": args.shape}
    results: dict[str, list[Row]] = {}
    for part in args.parts:
        results[part] = PARTS[part](args)
        if args.json:
            args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    print()
    print("  ".join(f"{k} {v}" for k, v in about.items()))
    print("\n\n".join(table(rows) for rows in results.values()))


if __name__ == "__main__":
    main()
