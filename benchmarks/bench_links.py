"""What the committed links of a chain cost of a training step, and a knot beside a step; one process, one model a row.

    python benchmarks/bench_links.py                                           CPU, one thread, CPU time
    python benchmarks/bench_links.py --device cuda --compiled --json out.json  1B and 8B shapes

A step is forward, backward, clip, optimizer, zero_grad of `chain-of-lora`, as bench_step.py has it and at its shapes:
with no link committed, and with --links of them, 10 at rank 8, that the driver tied in the same run.
knot: the driver's work where a link ends and another begins, the median of all. --compiled: the same with the model's
blocks compiled. first: the first step after the last knot, which compiles for the new number of frozen slots. On a GPU
wall time between synchronisations. The limits: 12 % more at the 8B shape, a knot within one step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_models import SHAPES, base_model
from bench_step import compile_blocks, loss_of, seconds

from loralign import Recipe, adapt, build, drive, optimizer


def middle(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median on a GPU, the least on the CPU, whose cores are shared."""
    times = [seconds(call, device) for _ in range(repeats)]
    return statistics.median(times) if device == "cuda" else min(times)


def measure(shape: str, device: str, rank: int, links: int, repeats: int, compiled: bool) -> dict[str, float]:
    """Milliseconds of a step without and with links, of a knot, and of the first step after one."""
    recipe = build("chain-of-lora", {"link_steps": 1}, r=rank, alpha=2.0 * rank)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(base_model(shape, device), recipe).train()
    ids = torch.randint(0, 8000, SHAPES[shape][1:], device=device)
    opt = optimizer(model, recipe, 1e-4)
    driver = drive(model, recipe, opt, links + 1)
    if compiled:
        compile_blocks(model)

    def step() -> None:
        loss_of(model, ids, shape, device).backward()
        opt.step()

    def whole() -> None:
        step()
        opt.zero_grad(set_to_none=True)

    for _ in range(3):
        whole()
    without = middle(whole, device, repeats)
    step()  # the links take their update from these gradients, so that compiled blocks meet two shapes and not eleven
    knots = []
    for _ in range(links):
        opt.step()
        knots.append(seconds(driver.after_step, device))
    opt.zero_grad(set_to_none=True)
    first = seconds(whole, device)
    for _ in range(2):
        whole()
    found = {
        "without": without,
        "with": middle(whole, device, repeats),
        "knot": statistics.median(knots),
        "first": first,
    }
    return {key: 1e3 * value for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", default=None, choices=tuple(SHAPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--links", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    results = {}
    for shape in args.shapes or (["small"] if args.device == "cpu" else ["1b", "8b"]):
        for compiled in (False, True) if args.compiled else (False,):
            name = f"{shape}, compiled" if compiled else shape
            results[name] = measure(shape, args.device, args.rank, args.links, args.repeats, compiled)
            gc.collect()
            torch._dynamo.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    if args.json:
        setting = {"device": args.device, "rank": args.rank, "links": args.links, "torch": torch.__version__}
        args.json.write_text(json.dumps({**setting, "ms": results}, indent=1))
    head = ("no link", f"{args.links} links", "more", "knot", "/step", "first")
    print(f"{'shape':18}" + "".join(f"{word:>10}" for word in head) + "    (ms)")
    for name, row in results.items():
        more, beside = row["with"] / row["without"] - 1, row["knot"] / row["without"]
        print(f"{name:18}{row['without']:10.1f}{row['with']:10.1f}{100 * more:8.1f} %{row['knot']:10.1f}", end="")
        print(f"{beside:10.2f}{row['first']:10.1f}")


if __name__ == "__main__":
    main()
