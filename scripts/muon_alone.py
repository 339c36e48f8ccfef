"""Does torch.optim.Muon alone break a device? Random matrices of SmolLM2's blocks, random gradients.

    python scripts/muon_alone.py --seconds 120 --processes 9 [--waiting] [--library cublaslt]

As many processes on one GPU, each making steps until its time is over; --waiting: with CUDA_LAUNCH_BLOCKING, so that a
failure names the call; --library: which of CUDA's libraries multiplies. Prints for every process its steps and how it
ended; 1 where any failed. On a CPU it only shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""q, k, v, o, gate, up and down of one of 30 blocks."""


def work(number: int, seconds: float, waiting: bool, library: str) -> tuple[int, str]:
    """Steps made, and why they ended before their time."""
    if waiting:
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cuda.preferred_blas_library(library)
    torch.manual_seed(number)
    matrices = [torch.nn.Parameter(torch.randn(*shape, device=device) * 0.02) for _ in range(30) for shape in SHAPES]
    optimizer = torch.optim.Muon(matrices, 1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    until, steps = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until:
            for p in matrices:
                p.grad = torch.randn_like(p)
            optimizer.step()
            steps += 1
            if steps % 20 == 0 and not bool(torch.stack([p.detach().abs().max() for p in matrices]).isfinite().all()):
                return steps, "not finite"
    except Exception:
        return steps, traceback.format_exc()
    return steps, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--waiting", action="store_true")
    parser.add_argument("--library", choices=("default", "cublas", "cublaslt"), default="default")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(work, n, args.seconds, args.waiting, args.library) for n in range(args.processes)]
        found = [job.result() for job in jobs]
    for number, (steps, why) in enumerate(found):
        print(f"{number:3} {steps:7} steps  {why.strip() or 'ended well'}")
    raise SystemExit(any(why for _, why in found))


if __name__ == "__main__":
    main()
