"""Do rank rules find the ranks of a teacher that are known? Spearman's ρ and the loss beside uniform LoRA's.

    python benchmarks/planted_ranks.py                     ten seeds, about ten minutes on one core
    python benchmarks/planted_ranks.py --seeds 2 --rules adalora

The teacher and each rule's settings are those of tests/planted.py. uniform: plain LoRA of rank 4 in every map, as many
steps at the same rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from planted import RANKS, SETTINGS, planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rules", nargs="+", default=list(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"planted ranks {RANKS}, {sum(RANKS)} slots")
    print(f"{'rule':20}{'ρ, median':>10}{'least':>7}{'slots':>8}{'loss':>9}{'uniform':>9}{'lower in':>10}")
    results: dict[str, Any] = {}
    for name in args.rules:
        found = [planted(name, seed, **SETTINGS[name]) for seed in range(args.seeds)]
        steps = {k: v for k, v in SETTINGS[name].items() if k in ("steps", "lr")}
        uniform = [planted("lora", seed, **steps).loss for seed in range(args.seeds)]
        rho, slots = [f.rho for f in found], [sum(f.ranks) for f in found]
        lower = sum(f.loss < plain for f, plain in zip(found, uniform, strict=True))
        results[name] = {"rho": rho, "slots": slots, "loss": [f.loss for f in found], "uniform": uniform,
                         "ranks": [f.ranks for f in found], "settings": SETTINGS[name]}  # fmt: skip
        print(
            f"{name:20}{median(rho):10.3f}{min(rho):7.2f}{f'{min(slots)}–{max(slots)}':>8}"
            f"{median(f.loss for f in found):9.4f}{median(uniform):9.4f}{f'{lower} of {args.seeds}':>10}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"planted": RANKS, "results": results}, indent=1))


if __name__ == "__main__":
    main()
