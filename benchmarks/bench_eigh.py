"""Eigenvectors of the r × r sides of a model's pairs: `loralign.maths.jacobi` beside torch's.

    python benchmarks/bench_eigh.py --device cuda --json eigh.json     420 matrices: both sides of SmolLM2's 210 pairs
    python benchmarks/bench_eigh.py --count 8 --ranks 34               small, on the CPU, where torch's is taken

Milliseconds, the median of a few calls after one that is not counted; residual: ‖H·E − E·Λ‖/‖H‖ at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loralign.maths.jacobi import jacobi

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def took(solve: Solver, H: Tensor, calls: int) -> tuple[float, float]:
    """Milliseconds and residual."""
    times = []
    for _ in range(1 + calls):
        if H.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        lam, E = solve(H)
        if H.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    rest = (H.double() @ E.double() - E.double() * lam.double()[:, None, :]).flatten(1).norm(dim=1)
    return statistics.median(times[1:]), float((rest / H.double().flatten(1).norm(dim=1)).max())


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--count", type=int, default=420)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 34, 64, 128])
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    found = []
    print(f"{'r':>5}{'torch, ms':>12}{'jacobi, ms':>12}{'ratio':>8}{'residuals':>22}")
    for r in args.ranks:
        X = torch.randn(args.count, r, 2 * r, generator=torch.Generator().manual_seed(0)).to(args.device)
        (theirs, a), (ours, b) = (took(solve, X @ X.mT, args.calls) for solve in (torch.linalg.eigh, jacobi))
        found.append({"r": r, "torch_ms": theirs, "jacobi_ms": ours, "residuals": [a, b]})
        print(f"{r:5}{theirs:12.2f}{ours:12.2f}{ours / theirs:8.2f}{a:11.1e}{b:11.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "count": args.count, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
