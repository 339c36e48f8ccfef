"""What a rank rule costs of a training step, averaged over a run under its own schedule; one process, one model.

    python benchmarks/bench_rule.py                                   CPU, one thread, CPU time
    python benchmarks/bench_rule.py --device cuda --shape 1b --whole --json out.json

step: forward, backward, optimizer, zero_grad without the rule. masks: what the rule adds within the optimizer's step,
its penalty included; a mean of differences without the tenth at either end. after: what follows it, events and the
verbs that they plan included, a mean. Both over a run of --steps optimizer steps, whose gradients are those of the
first backward, so that it is short. inputs: what PRILoRA's look at the inputs adds to forward and backward. ops: calls
into torch that the rule adds to a step, a mean over a run of a hundred, beside those of the optimizer without it: what
a fast GPU's host pays for, whatever the machine.
On a GPU wall time between synchronisations around each part: the host's work counts although in a run the device may
still be busy with the step. Shapes are bench_step's. So "share" is the most that the rule can cost.
--whole: besides, real steps with the rule and without it, on a model each, ten of each in turn until --whole-steps with
it are through (their run: schedules are theirs), waited for only at the end of ten, as a Trainer does. "whole" is the
median of the pairs of ten, with its quartiles. --compiled: these with the blocks compiled as `loralign train` does it.
allocating-lora has no cost but its rounds: one forward of its validation rows is timed, and their number in a run is
that which `loralign plan` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_models import SHAPES, base_model
from bench_step import loss_of, seconds
from torch.utils._python_dispatch import TorchDispatchMode

import loralign
from loralign import Recipe, adapt, build, drive, optimizer, sites
from loralign.evidence.inputs import InputTap
from loralign.methods.rule.allocating_lora import switched
from loralign.train.validation import validation_loss
from loralign.types import Validation

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


def operations(model: Any, recipe: Recipe, both: Callable[[], None], steps: int = 100) -> dict[str, float]:
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


def recipe_of(name: str, rank: int) -> Recipe:
    recipe = build(name, RULES.get(name, {}), r=rank, alpha=2.0 * rank)
    assert isinstance(recipe, Recipe)
    return recipe


def optimizer_of(model: Any, recipe: Recipe, device: str) -> Any:
    made = optimizer(model, recipe, 1e-3)
    made.norms.late = device == "cuda"  # as `attach` has it
    return made


def tokens(shape: str, device: str) -> torch.Tensor:
    return torch.randint(0, 8000, SHAPES[shape][1:], device=device)


def measure(name: str, shape: str, device: str, rank: int, steps: int, repeats: int) -> dict[str, float]:
    """Milliseconds, and the rule's share of a step."""
    recipe = recipe_of(name, rank)
    model: Any = adapt(base_model(shape, device), recipe).train()
    ids = tokens(shape, device)

    def both() -> None:
        loss_of(model, ids, shape, device).backward()

    plain = optimizer_of(model, replace(recipe, rules=()), device)
    both()
    plain.step()
    passes = min(seconds(both, device) for _ in range(repeats))
    opt = optimizer_of(model, recipe, device)
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
    counted = operations(model, recipe, both)
    own = statistics.fmean(without[1:])
    parts = {"masks": trimmed(within[1:], without[1:]), "after": statistics.fmean(after), "inputs": seen - passes}
    step = passes + own
    share = max(0.0, sum(parts.values())) / step
    return {"step": 1e3 * step, **{k: 1e3 * v for k, v in parts.items()}, "share": share, **counted}


def trimmed(more: Sequence[float], less: Sequence[float]) -> float:
    """The mean of the differences without the tenth at either end: those are the machine's."""
    apart = sorted(a - b for a, b in zip(more, less, strict=True))
    cut = len(apart) // 10
    return statistics.fmean(apart[cut : len(apart) - cut])


def _watched(both: Callable[[], None], model: Any, opt: Any, device: str) -> float:
    tap = InputTap(model, list(opt.sites.values()))
    taken = seconds(lambda: (both(), tap.taken()), device)
    tap.remove()
    return taken


def whole(name: str, shape: str, device: str, rank: int, steps: int, compiled: bool, chunk: int = 10) -> dict[str, Any]:
    """The rule's share of real steps: time with it over time without, less one; and the step without."""
    recipe, ids = recipe_of(name, rank), tokens(shape, device)
    why: list[str] = []

    def steps_of(recipe: Recipe, ruled: bool) -> Callable[[int], None]:
        model: Any = adapt(base_model(shape, device), recipe).train()
        opt = optimizer_of(model, recipe if ruled else replace(recipe, rules=()), device)
        driver = drive(model, recipe, opt, steps) if ruled else None
        blocks = loralign.compile(model, backend=None if device == "cuda" else "eager") if compiled else None

        def run(count: int) -> None:
            for _ in range(count):
                loss_of(model, ids, shape, device).backward()
                opt.step()
                if driver is not None:
                    driver.after_step()
                opt.zero_grad(set_to_none=True)
            why.extend([blocks.why] if blocks is not None and blocks.why else [])

        return run

    without, within = steps_of(recipe, ruled=False), steps_of(recipe, ruled=True)
    without(2)
    within(steps % chunk + chunk)
    ratios, base = [], []
    for k in range(steps // chunk - 1):  # the first of a pair changes
        times = {run: seconds(partial(run, chunk), device) for run in ((without, within), (within, without))[k % 2]}
        base.append(times[without] / chunk)
        ratios.append(times[within] / times[without] - 1)
    if why:
        raise SystemExit(f"the blocks ran as they are, since {why[0]}: nothing compiled was measured")
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"whole": middle, "whole_quartiles": [low, high], "whole_step": 1e3 * statistics.median(base)}


def rounds(shape: str, device: str, rank: int, step: float, few: int = 4) -> dict[str, float]:
    """What allocating-lora's rounds take. step: ms without them."""
    recipe = recipe_of("allocating-lora", rank)
    (rule,) = recipe.rules
    assert isinstance(rule.needs, Validation) and rule.facts.forwards is not None
    model: Any = adapt(base_model(shape, device), recipe).train()
    found = sites(model)
    ids = tokens(shape, device)
    batches = [{"ids": ids}] * max(1, rule.needs.rows // len(ids))
    loss = validation_loss(model, batches, lambda model, batch: loss_of(model, batch["ids"], shape, device))
    losses = loss()["losses"]
    live = {site.name: torch.ones(site.r, dtype=torch.bool) for site in found}
    masks = [switched(live, (site.name, 0)) for site in found[: few + 1]]
    losses(masks[:1])
    each = seconds(lambda: losses(masks[1:]), device) / few
    count = rule.facts.forwards(len(found) * rank)
    return {"forwards": count, "forward": 1e3 * each, "steps": 1e3 * count * each / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default=None, choices=tuple(SHAPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    known = (*RULES, "allocating-lora")
    parser.add_argument("--rules", nargs="+", default=list(known), choices=known)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--whole-steps", type=int, default=100)
    parser.add_argument("--compiled", action="store_true", help="the steps of --whole")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.whole and args.whole_steps < 20:
        parser.error("--whole compares tens of steps in turn: give it --whole-steps 20 or more")
    if "prilora" in args.rules and min(args.steps, args.whole_steps) < 50:
        parser.error("prilora prunes after every 40 steps: give the runs 50 or more")
    if args.compiled and not args.whole:
        parser.error("--compiled is about the steps of --whole: give both")
    if args.device == "cpu":
        torch.set_num_threads(1)
    shape = args.shape or ("small" if args.device == "cpu" else "1b")
    heads = ("step", "masks", "after", "inputs", "share", "ops", "/ optim.", *(["whole"] if args.whole else []))
    print(f"{'rule':20}" + "".join(f"{k:>10}" for k in heads) + "    (ms)", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in args.rules:  # one after the other said and kept: a run that is cut has measured something
        if name in RULES:
            row = found[name] = measure(name, shape, args.device, args.rank, args.steps, args.repeats)
            print(f"{name:20}" + "".join(f"{row[k]:10.2f}" for k in ("step", "masks", "after", "inputs")), end="")
            print(f"{100 * row['share']:8.2f} %{row['ops']:10.0f}{row['optimizer_ops']:10.0f}", end="", flush=True)
            if args.whole:
                row |= whole(name, shape, args.device, args.rank, args.whole_steps, args.compiled)
                low, high = (100 * x for x in row["whole_quartiles"])
                print(f"{100 * row['whole']:8.2f} %  ({low:.2f} to {high:.2f}; {row['whole_step']:.1f})", end="")
            print(flush=True)
        else:
            step = statistics.median([row["step"] for row in found.values()] or [float("nan")])
            row = found[name] = rounds(shape, args.device, args.rank, step)
            said = "{forwards:,.0f} forwards in a run, {forward:.1f} ms each: as long as {steps:,.0f} steps"
            print(f"{name:20}  " + said.format(**row), flush=True)
        if args.json:
            body = {"shape": shape, "device": args.device, "rank": args.rank, "steps": args.steps}
            body |= {"whole_steps": args.whole_steps, "compiled": args.compiled, "ms": found}
            args.json.write_text(json.dumps(body, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
