"""What LoRA adds to a frozen linear layer, and to three that share an input: forward and backward over the frozen ones.

    python benchmarks/bench_lowrank.py                   small, on the CPU
    python benchmarks/bench_lowrank.py --device cuda     4096 wide, 4096 tokens, bf16, r 16, about 30 s

frozen: the floor, with the gradient of the input. peft: stock statements with fp32 factors. node: the one node of
`carrier.layer`. shared A: one product x·[A_q; A_k; A_v]ᵀ for all layers, then updates in place. The arms take turns;
the figure is the median over the repeats, of CPU time on the CPU. (The updates as a Triton kernel were slower:
records/2026-11-29-h200-step.)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_step import seconds
from torch import Tensor

from loralign.carrier.layer import low_rank

S, R = 2.0, 16


class _Fused(torch.autograd.Function):
    """The layer with one product for all A's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ys, factors = given[:count], given[count:]
        A, Bs = torch.cat(factors[:count]).to(x.dtype), [B.to(x.dtype) for B in factors[count:]]
        h = x @ A.t()
        parts = h.split(R, dim=1)
        ctx.mark_dirty(*ys)
        for y, part, B in zip(ys, parts, Bs, strict=True):
            y.addmm_(part, B.t(), alpha=S)
        ctx.save_for_backward(x, h, A, *Bs)
        return ys

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        x, h, A, *Bs = ctx.saved_tensors
        gh = torch.cat([g @ B for g, B in zip(gs, Bs, strict=True)], dim=1).mul_(S)
        gB = [(g.t() @ part).float().mul_(S) for g, part in zip(gs, h.split(R, dim=1), strict=True)]
        return gh @ A, None, *gs, *(gh.t() @ x).float().split(R), *gB


def arms(device: str, width: int, count: int) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    Ws = [torch.randn(width, width, device=device, dtype=dtype) / width**0.5 for _ in range(count)]
    As = [(torch.randn(R, width, device=device) / width**0.5).requires_grad_() for _ in range(count)]
    Bs = [(torch.randn(width, R, device=device) * 0.02).requires_grad_() for _ in range(count)]

    def base(x: Tensor) -> list[Tensor]:
        return [x @ W.t() for W in Ws]

    def peft(x: Tensor) -> list[Tensor]:
        return [y + ((x.float() @ A.t()) @ B.t() * S).to(y.dtype) for y, A, B in zip(base(x), As, Bs, strict=True)]

    def node(x: Tensor) -> list[Tensor]:
        return [low_rank(y, x, A, B, S) for y, A, B in zip(base(x), As, Bs, strict=True)]

    def fused(x: Tensor) -> list[Tensor]:
        return list(_Fused.apply(x, count, *base(x), *As, *Bs))

    return {"frozen": base, "peft": peft, "node": node, "shared A": fused}


def both(arm: Callable[[Tensor], list[Tensor]], x: Tensor, ys: list[Tensor]) -> None:
    """Forward, whose outputs `ys` takes, and backward."""
    ys.extend(arm(x))
    torch.autograd.backward(ys, [y.detach() for y in ys])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=0)
    asked = parser.parse_args()
    width, tokens = (4096, 4096) if asked.device == "cuda" else (1024, 512)
    repeats = asked.repeats or (50 if asked.device == "cuda" else 7)
    for count in (1, 3):
        made = arms(asked.device, width, count)
        dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
        x = torch.randn(tokens, width, device=asked.device, dtype=dtype, requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in made}
        ends: dict[str, list[Tensor]] = {}
        for turn in range(repeats + 3):
            for name, arm in made.items():
                x.grad, ys = None, []
                taken = seconds(partial(both, arm, x, ys), asked.device)
                if turn >= 3:
                    times[name].append(taken)
                ends[name] = [*(y.detach().float() for y in ys), x.grad.float()]  # type: ignore[union-attr]
        floor = statistics.median(times["frozen"])
        worst = {
            name: max(float((a - b).norm() / b.norm()) for a, b in zip(found, ends["peft"], strict=True))
            for name, found in ends.items()
            if name != "frozen"
        }
        ratios = {name: round(statistics.median(taken) / floor, 3) for name, taken in times.items()}
        print(json.dumps({"layers": count, "frozen_ms": round(floor * 1e3, 3), "x frozen": ratios, "off peft": worst}))


if __name__ == "__main__":
    main()
