"""The parts of bench_evidence.py that need real weights and text (`make assets`): quality and cora."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from evidence_timing import Row, best, recipe
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralign import adapt, sites
from loralign.carrier.sites import put_in
from loralign.evidence import Passes, collect, exact_gradient, model_loss
from loralign.evidence.gradient import accumulate
from loralign.evidence.sketch import Draws, Side, Stream
from loralign.evidence.sources import Checkpoint, Members, Target, cut, leading, pattern, targets_of
from loralign.evidence.subspace import consensus_of, extract
from loralign.maths.linalg import first_step_energy
from loralign.types import Sketch, TopGradient

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from asset_cache import cache_dir

SETTINGS = (Sketch(8, 1), Sketch(6, 1), Sketch(4, 1), Sketch(4, 2), Sketch(3, 3), Sketch(4, 4), Sketch(8, 2))
BLOCKS = (0, 5, 12, 17, 23, 29)


def real_batches(tokenizer: Any, count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """News texts one after the other, cut into rows of equal length."""
    lines = (cache_dir() / "bbc" / "all.jsonl").read_text(encoding="utf-8").splitlines()[::37]
    ids = torch.cat([torch.tensor(tokenizer(json.loads(line)["text"]).input_ids) for line in lines])
    chunks = ids[: count * rows * length].view(count, rows, length)
    return [{"input_ids": c, "labels": c} for c in chunks]


def smollm2() -> tuple[Any, Any]:
    folder = cache_dir() / "smollm2-135m"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def quality(args: argparse.Namespace) -> list[Row]:
    """Six blocks of SmolLM2; then the time of a pass over all of them beside LoRA's forward and backward."""
    model, tokenizer = smollm2()
    batches = real_batches(tokenizer, args.micro_batches, 2, 256)
    rows = pass_times(batches[0], args)
    blocks = "|".join(str(b) for b in BLOCKS)
    model = put_in(model, recipe("lora", r=args.rank, targets=rf".*layers\.({blocks})\..*_proj"))
    found = sites(model)
    G = exact_gradient(model, found, batches, model_loss)
    S = {name: torch.linalg.svdvals(g) for name, g in G.items()}
    dense = sum(4 * g.numel() for g in G.values())
    default = Sketch()
    for setting in (*(Sketch(s.width, s.passes, exact_above=1.0, held_out=0) for s in SETTINGS), default):
        made = collect(TopGradient(2, len(batches), setting), model, found, batches)
        energy, estimate, r = [], [], args.rank
        for name, d in made.items():
            assert d.U is not None and d.V is not None and d.quality is not None
            energy.append(float(first_step_energy(d.U[:, :r], d.V[:, r : 2 * r].T, G[name], S[name])))
            estimate.append(d.quality)
        fall_back = " + fall-back (default)" if setting is default else ""
        row: Row = {"sketch": f"{setting.width}r, {setting.passes} passes{fall_back}"}
        row |= {"mean": sum(energy) / len(energy), "worst": min(energy), "estimated worst": min(estimate)}
        row |= {"dense/bytes": dense / made.spent.state_bytes}
        row |= {"exact": f"{sum(d.exact for d in made.values())}/{len(made)}", "passes run": made.spent.micro_batches}
        row["passes run"] /= len(batches)
        rows.append(row)
        print(row, flush=True)
    return rows


def pass_times(batch: dict[str, Tensor], args: argparse.Namespace) -> list[Row]:
    """One micro-batch: each kind of pass over LoRA's forward and backward, every linear layer of all 30 blocks."""
    lora = recipe("lora", r=args.rank)
    model = adapt(smollm2()[0], lora)
    fresh = put_in(smollm2()[0], lora)
    found = sites(fresh)
    passes = Passes(fresh, model_loss)
    kinds: dict[str, Callable[[], Any]] = {"LoRA": lambda: model_loss(model, batch).backward()}
    for width in (4, 8):
        into = {s.name: Stream(s, min(width * s.r, s.d_out, s.d_in), Draws(0)) for s in found}
        kinds[f"first pass, {width}r"] = lambda into=into: accumulate(passes, found, [batch], into, "")
        sides = {s.name: Side(s, torch.randn(s.d_in, min(width * s.r, s.d_out, s.d_in)), left=True) for s in found}
        kinds[f"further pass, {width}r"] = lambda sides=sides: accumulate(passes, found, [batch], sides, "")
    seconds = best(kinds, "cpu", args.repeats)
    rows = [{"pass": k, "seconds": v, "/LoRA": v / seconds["LoRA"]} for k, v in seconds.items()]
    print(*rows, sep="\n", flush=True)
    return rows


class Resident(TorchDispatchMode):
    """Counts storages alive at once that have as many elements as one of the matrices read."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.most = sizes, 0
        self.alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage.nbytes() // t.element_size() in self.sizes:
                    self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {k: ref for k, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return out


def in_memory(matrices: Sequence[tuple[Target, Tensor]], width: int) -> Members:
    groups: dict[str, list[Any]] = {}
    for target, W in matrices:
        groups.setdefault(pattern(target.name), []).append(lambda t=target, W=W: leading(W, cut(width, t)))
    return Members(groups, width, {"kind": "weights", "sources": [], "base": None})


def cora(args: argparse.Namespace) -> list[Row]:
    """Extraction of a basis from all linear layers of SmolLM2 beside its two halves alone."""
    folder = cache_dir() / "smollm2-135m"
    targets, checkpoint = targets_of(folder), Checkpoint(folder)
    matrices = [(t, checkpoint.read(t).float()) for t in targets]
    kinds: dict[str, Callable[[], Any]] = {
        "read only": lambda: [float(checkpoint.read(t).float().sum()) for t in targets],
        "SVDs only": lambda: consensus_of(in_memory(matrices, 32)),
        "extraction": lambda: extract([folder]),
    }
    seconds = best(kinds, "cpu", args.repeats)
    row: Row = {"cora": f"{len(targets)} sites", **{f"{k} s": v for k, v in seconds.items()}}
    row["extraction/max(read, SVDs)"] = seconds["extraction"] / max(seconds["read only"], seconds["SVDs only"])
    kinds.clear()
    matrices.clear()
    gc.collect()
    with Resident({t.d_out * t.d_in for t in targets}) as counted:
        extract([folder])
    return [row | {"matrices resident": counted.most}]
