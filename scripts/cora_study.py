"""CoRA on real tasks: adapters of three tasks give a common basis, a fourth task is fine-tuned from it.

    python scripts/assets.py multiemo de                 # also es, fr, it: 358 MB once, then half a minute each
    one H100, about 13 minutes with 7 workers:
    python scripts/cora_study.py --model ASSETS/smollm2-135m --data ASSETS/multiemo --workers 7
    a CPU, about 15 minutes:
    python scripts/assets.py smollm2 --layers 6
    python scripts/cora_study.py --model ASSETS/smollm2-6layer --data ASSETS/multiemo --small

ASSETS is `$LORALIGN_ASSETS` or ~/.cache/loralign/assets; no connection is needed once it is filled. `--data` holds a
folder per task with train, valid and test.jsonl of {"text": …} rows; here the tasks are reviews in German, Spanish and
French, held out is Italian. The reviews of MultiEmo are translations of one another: what the languages share is
their content too.

1. `loralign train`: one plain LoRA adapter per source task, each with its own seed.
2. `loralign subspace extract`: what the adapters share, and a basis from the layers of the base alone; a random basis.
3. `loralign compare`: the arms below on the held-out task, each at its own tuned rate, then on fresh seeds.

    lora                 both factors train                      cora            B = the adapters' basis, frozen
    lora-fa              A random, frozen; projected gradient    cora-init       the same start, both train
    cora (weights)       frozen basis of the base's own layers   cora (random)   frozen random B

Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Sizes:
    source_steps: int
    steps: int
    eval_every: int
    batch_size: int
    length: int
    """Tokens per row."""
    rows: int
    """Of the validation file; twice as many of the test file."""
    rates: int
    extensions: int


FULL = Sizes(200, 200, eval_every=50, batch_size=32, length=128, rows=200, rates=5, extensions=2)
SMALL = Sizes(40, 20, eval_every=10, batch_size=4, length=48, rows=6, rates=3, extensions=3)
TINY = Sizes(3, 4, eval_every=2, batch_size=2, length=16, rows=2, rates=3, extensions=0)


def loralign(*args: str | Path, log: Path | None = None) -> None:
    """Run a command of loralign; its output goes to `log`, where one is given."""
    command = [sys.executable, "-m", "loralign", *map(str, args)]
    if log is None:
        code = subprocess.run(command, check=False).returncode
    else:
        with log.open("w", encoding="utf-8") as sink:
            code = subprocess.run(command, check=False, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"loralign {args[0]} ended with code {code}{f', see {log}' if log else ''}")


def cut(source: Path, rows: int | None, target: Path) -> str:
    """The first rows of a file, all of them for None."""
    if not source.is_file():
        raise SystemExit(f"no such file: {source}; fill the folder with `python scripts/assets.py multiemo LANG`")
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:rows]), encoding="utf-8")
    return str(target)


def train_source(task: str, seed: int, args: argparse.Namespace, sizes: Sizes) -> Path:
    """A plain LoRA adapter of one task, at LoRA's prior rate."""
    folder = Path(args.output) / "sources" / task
    if (folder / "adapter_model.safetensors").is_file() and (folder / "run.json").is_file():
        return folder
    rows = cut(args.data / task / "train.jsonl", None, args.output / "rows" / f"{task}.jsonl")
    recipe = {
        "model": str(args.model),
        "data": {"train": rows, "max_length": sizes.length},
        "method": "lora",
        "rank": RANK,
        "alpha": ALPHA,
        "train": {"steps": sizes.source_steps, "batch_size": sizes.batch_size, "micro_batch_size": sizes.batch_size},
        "output": str(folder),
        "seed": seed,
    }
    file = args.output / f"source-{task}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    loralign("train", file, log=args.output / f"source-{task}.log")
    print(f"{folder}: trained for {sizes.source_steps} steps", flush=True)
    return folder


def train_sources(args: argparse.Namespace, sizes: Sizes) -> list[Path]:
    with ThreadPoolExecutor(args.workers) as pool:
        return list(pool.map(lambda job: train_source(job[1], 100 + job[0], args, sizes), enumerate(args.sources)))


def extract(sources: Sequence[Path], out: Path) -> str:
    if not out.is_file():
        loralign("subspace", "extract", *sources, "--out", out, log=out.with_suffix(".txt"))
    return str(out)


def random_basis(like: Path, out: Path) -> str:
    """Orthonormal random columns for the same modules, as many as the rank: the control of every frozen basis."""
    import torch

    from loralign.evidence.subspace import Basis, Shared, read_basis, write_basis
    from loralign.maths.draws import keyed_normal

    if out.is_file():
        return str(out)
    found = read_basis(like)
    groups: dict[str, Any] = {}
    for name, sides in found.groups.items():
        groups[name] = {}
        for side, shared in sides.items():
            m = shared.basis.shape[0]
            basis = torch.linalg.qr(keyed_normal((m, min(RANK, m)), 0, "random basis", name, side)).Q
            groups[name][side] = Shared(basis, torch.ones(basis.shape[1]), 0.5, 1)
    facts = {"kind": "random", "sources": [{"name": "random draws"}], "base": None, "width": RANK}
    write_basis(out, Basis(groups, facts))
    return str(out)


def study(args: argparse.Namespace, sizes: Sizes, bases: dict[str, str]) -> dict[str, Any]:
    def common(method: str, name: str, basis: str, **options: str) -> dict[str, Any]:
        return {"method": method, "name": name, "options": {"sources": [bases[basis]], **options}}

    splits = {
        split: cut(
            args.data / args.target / f"{split}.jsonl", rows, args.output / "rows" / f"{args.target}-{split}.jsonl"
        )
        for split, rows in (("train", None), ("valid", sizes.rows), ("test", 2 * sizes.rows))
    }
    return {
        "model": str(args.model),
        "task": {"kind": "text", **splits, "length": sizes.length},
        "arms": [
            "lora",
            "lora-fa",
            common("cora", "cora", "adapters"),
            common("cora-init", "cora-init", "adapters"),
            common("cora", "cora (weights)", "weights"),
            common("cora", "cora (random)", "random", side="left"),
        ],
        "references": False,
        "rank": RANK,
        "alpha": ALPHA,
        "rates": {"count": sizes.rates, "ratio": 3.0, "extensions": sizes.extensions},
        "seeds": args.seeds,
        "train": {
            "steps": sizes.steps,
            "batch_size": sizes.batch_size,
            "eval_every": sizes.eval_every,
            "compile": True,
        },
        "output": str(args.output / "study"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task")
    parser.add_argument("--sources", nargs="+", default=["de", "es", "fr"], metavar="TASK")
    parser.add_argument("--target", default="it", metavar="TASK", help="the held-out task")
    parser.add_argument("--output", type=Path, default=Path("runs/cora-study"))
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--seeds", type=int, default=3)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="sizes for a CPU")
    size.add_argument("--tiny", action="store_true", help="a few steps, to try the script")
    args = parser.parse_args()
    if args.target in args.sources:
        parser.error(f"--target {args.target} is among the sources: hold another task out")
    return args


def main() -> int:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sizes = SMALL if args.small else TINY if args.tiny else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    sources = train_sources(args, sizes)
    bases = {"adapters": extract(sources, args.output / "adapters.safetensors")}
    bases["weights"] = extract([args.model], args.output / "weights.safetensors")
    bases["random"] = random_basis(args.output / "adapters.safetensors", args.output / "random.safetensors")
    print((args.output / "adapters.txt").read_text(encoding="utf-8"), flush=True)
    file = args.output / "study.yaml"
    file.write_text(yaml.safe_dump(study(args, sizes, bases), sort_keys=False), encoding="utf-8")
    loralign("compare", file, "--workers", str(args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
