"""What a rank rule costs of a training step, averaged over a run under its own schedule; one process, one model.

    python benchmarks/bench_rule.py                                   CPU, one thread, CPU time
    python benchmarks/bench_rule.py --device cuda --shape 1b --json out.json

step: forward, backward, optimizer, zero_grad without the rule. penalty and masks: what the rule adds within the
optimizer's step. after: what follows it, events and the verbs that they plan included, the mean over --steps optimizer
steps of one run (events are a part of them, as the rule's law has it). inputs: what PRILoRA's look at the inputs adds
to forward and backward. ops: calls into torch that the rule adds to a step, a mean over the run, beside those of the
optimizer without it: what a fast GPU's host pays for, whatever the machine. The gradients of the optimizer's steps are
those of the first backward, so that a run is short.
On a GPU wall time between synchronisations: a rule pays for what it makes the device wait. Shapes are bench_step's.
--whole: besides, real steps with the rule and without it, ten of each in turn until --steps with it are through, waited
for only at the end of ten, as a Trainer does: what the host does while the device computes costs nothing there. "whole"
is the median of the pairs of ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_step import SHAPES, base_model, loss_of, seconds
from torch.utils._python_dispatch import TorchDispatchMode

from loralign import Recipe, adapt, build, drive, optimizer
from loralign.evidence.inputs import InputTap

RULES: dict[str, dict[str, Any]] = {
    "adalora": {},
    "dynamic-rank-lora": {},
    "sora": {"threshold": 1e-2},
    "beamlora": {},
    "prilora": {},
}


class Calls(TorchDispatchMode):
    """Counts calls into torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(work: Callable[[], object]) -> int:
    with Calls() as counted:
        work()
    return counted.count


def operations(model: Any, recipe: Recipe, both: Callable[[], None], steps: int) -> dict[str, float]:
    """Calls of the optimizer without the rule, and those that the rule adds, a mean over a run."""
    plain, opt = optimizer(model, replace(recipe, rules=()), 1e-3), optimizer(model, recipe, 1e-3)
    plain.step()
    own = calls(plain.step)
    driver = drive(model, recipe, opt, steps)
    watched = 0
    if driver.inputs is not None:
        watched = calls(both)
        driver.inputs.remove()
        watched -= calls(both)
    within = [calls(opt.step) + calls(driver.after_step) - own for _ in range(steps)]
    driver.close()
    return {"ops": watched + statistics.fmean(within[1:]), "optimizer_ops": own}


def measure(name: str, shape: str, device: str, rank: int, steps: int, repeats: int) -> dict[str, float]:
    """Milliseconds, and the rule's share of a step."""
    recipe = build(name, RULES[name], r=rank, alpha=2.0 * rank)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(base_model(shape, device), recipe).train()
    ids = torch.randint(0, 8000, SHAPES[shape][1:], device=device)

    def both() -> None:
        loss_of(model, ids, shape, device).backward()

    plain = optimizer(model, replace(recipe, rules=()), 1e-3)
    both()
    plain.step()
    passes = min(seconds(both, device) for _ in range(repeats))
    opt = optimizer(model, recipe, 1e-3)
    driver = drive(model, recipe, opt, steps)
    seen = passes
    if driver.inputs is not None:  # with and without hooks in turn
        driver.inputs.remove()
        pairs = [(seconds(both, device), _watched(both, model, opt, device)) for _ in range(repeats)]
        passes, seen = (min(times) for times in zip(*pairs, strict=True))
    without, within, after = [], [], []
    for _ in range(steps):  # with and without in turn
        without.append(seconds(plain.step, device))
        within.append(seconds(opt.step, device))
        after.append(seconds(driver.after_step, device))
    driver.close()
    counted = operations(model, recipe, both, steps)
    own = statistics.fmean(without[1:])
    parts = {"masks": statistics.fmean(within[1:]) - own, "after": statistics.fmean(after), "inputs": seen - passes}
    step = passes + own
    share = max(0.0, sum(parts.values())) / step
    return {"step": 1e3 * step, **{k: 1e3 * v for k, v in parts.items()}, "share": share, **counted}


def whole(name: str, shape: str, device: str, rank: int, steps: int, chunk: int = 10) -> float:
    """The rule's share of real steps: time with it over time without, less one."""
    recipe = build(name, RULES[name], r=rank, alpha=2.0 * rank)
    assert isinstance(recipe, Recipe)
    model: Any = adapt(base_model(shape, device), recipe).train()
    ids = torch.randint(0, 8000, SHAPES[shape][1:], device=device)
    plain, opt = optimizer(model, replace(recipe, rules=()), 1e-3), optimizer(model, recipe, 1e-3)
    driver = drive(model, recipe, opt, steps)
    watches = driver.inputs is not None

    def run(opt: Any, after: Callable[[], object], count: int) -> None:
        for _ in range(count):
            loss_of(model, ids, shape, device).backward()
            opt.step()
            after()
            opt.zero_grad(set_to_none=True)

    def without() -> None:
        run(plain, lambda: None, chunk)

    def within() -> None:
        run(opt, driver.after_step, chunk)

    run(opt, driver.after_step, steps % chunk + chunk)
    ratios = []
    for _ in range(steps // chunk - 1):
        if watches and driver.inputs is not None:
            driver.inputs.remove()
        base = seconds(without, device)
        if watches:
            driver.inputs = InputTap(model, list(opt.sites.values()))
        ratios.append(seconds(within, device) / base)
    driver.close()
    return statistics.median(ratios) - 1


def _watched(both: Callable[[], None], model: Any, opt: Any, device: str) -> float:
    tap = InputTap(model, list(opt.sites.values()))
    taken = seconds(lambda: (both(), tap.taken()), device)
    tap.remove()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default=None, choices=tuple(SHAPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=tuple(RULES))
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.whole and args.steps < 20:
        parser.error("--whole compares tens of steps in turn: give it --steps 20 or more")
    if args.device == "cpu":
        torch.set_num_threads(1)
    shape = args.shape or ("small" if args.device == "cpu" else "1b")
    heads = ("step", "masks", "after", "inputs", "share", "ops", "/ optim.", *(["whole"] if args.whole else []))
    print(f"{'rule':20}" + "".join(f"{k:>10}" for k in heads) + "    (ms)", flush=True)
    found: dict[str, dict[str, float]] = {}
    for name in args.rules:  # one after the other said and kept: a run that is cut has measured something
        row = found[name] = measure(name, shape, args.device, args.rank, args.steps, args.repeats)
        if args.whole:
            row["whole"] = whole(name, shape, args.device, args.rank, args.steps)
        if args.json:
            body = {"shape": shape, "device": args.device, "rank": args.rank, "ms": found}
            args.json.write_text(json.dumps(body, indent=1), encoding="utf-8")
        print(f"{name:20}" + "".join(f"{row[k]:10.2f}" for k in ("step", "masks", "after", "inputs")), end="")
        print(f"{100 * row['share']:8.2f} %{row['ops']:10.0f}{row['optimizer_ops']:10.0f}", end="")
        print(f"{100 * row['whole']:8.2f} %" if args.whole else "", flush=True)


if __name__ == "__main__":
    main()
