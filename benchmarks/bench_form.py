"""What the form of an adapter costs at one module of d × d: forward and backward of the adapter alone, and with W0's.

    python benchmarks/bench_form.py
    python benchmarks/bench_form.py --width 8192 --tokens 512 --json out.json
    python benchmarks/bench_form.py --device cuda

CPU: one thread, fp32, CPU time. CUDA: bf16 activations, fp32 factors, 16,384 tokens so that the GPU and not the host
is timed, ten calls between two events. Methods interleaved, minimum of the repeats. The module is the last of a chain
of six, so that ResLoRA's blocks have their whole span, four. with W0: x·W0ᵀ and g·W0 added, what a frozen layer costs
anyway. A whole step: bench_step.py --shapes wide (CPU) or rows (GPU) --methods sbora-fa sbora-fb prolora reslora.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralign import Recipe, adapt, build, sites

METHODS = ("lora", "sbora-fa", "sbora-fb", "prolora", "reslora")


class _Fresh(torch.autograd.Function):
    """An output of its own, as a layer hands out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


CALLS = 10
"""On a GPU, between two events."""


def module(name: str, width: int, rank: int, device: str) -> Any:
    made = build(name, r=rank, alpha=2.0 * rank, targets=tuple(map(str, range(6))))
    assert isinstance(made, Recipe)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(6)))
    return sites(adapt(base, made).to(device))[-1].layer


def timed(call: Callable[[int], object], device: str) -> float:
    """Seconds of call(0); on a GPU the mean over call(0) … call(CALLS − 1)."""
    if device == "cpu":
        start = time.process_time()
        call(0)
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for k in range(CALLS):
        call(k)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


def seconds(layer: Any, x0: Tensor, g: Tensor) -> float:
    device = x0.device.type
    inputs = [x0.detach().requires_grad_(True) * 1.0 for _ in range(1 if device == "cpu" else CALLS)]
    bases = [_Fresh.apply(x) for x in inputs]
    forward = layer.lora_variant["default"].forward
    return timed(lambda k: forward(layer, "default", inputs[k], bases[k]).backward(g), device)


def of_base(W: Tensor, x: Tensor, g: Tensor) -> float:
    return timed(lambda k: (torch.mm(x, W.t()), torch.mm(g, W)), x.device.type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, help="512; 16384 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = args.tokens or (512 if args.device == "cpu" else 16384)
    like: dict[str, Any] = {"device": args.device, "dtype": torch.float32 if args.device == "cpu" else torch.bfloat16}
    x, g, W = (torch.randn(n, args.width, **like) for n in (tokens, tokens, args.width))
    layers = {name: module(name, args.width, args.rank, args.device) for name in METHODS}
    best = dict.fromkeys(layers, float("inf"))
    floor = min(of_base(W, x, g) for _ in range(3))
    for _ in range(args.repeats):
        for name, layer in layers.items():
            best[name] = min(best[name], seconds(layer, x, g))
    if args.json:
        args.json.write_text(
            json.dumps({"ms": {n: 1e3 * s for n, s in best.items()}, "base_ms": 1e3 * floor}, indent=1)
        )
    print(f"{'method':10}{'ms':>8}{'/lora':>8}{'with W0':>10}     (W0: {1e3 * floor:.1f} ms)")
    for name, value in best.items():
        print(f"{name:10}{1e3 * value:8.2f}{value / best['lora']:8.2f}{(value + floor) / (best['lora'] + floor):10.3f}")


if __name__ == "__main__":
    main()
