"""One rank of the distributed tests of evidence.

Collects every kind of evidence on its own half of the micro-batches and writes what it got; gloo on the CPU. ENGINE:
"none" (one process, all micro-batches in the order in which the ranks would see them), "ddp" or "fsdp".
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loralign import build, sites
from loralign.carrier.sites import put_in
from loralign.evidence import collect, partial
from loralign.types import CommonSubspace, Preheated, Sketch, TopGradient
from toy import batch_for, llama

RANKS = 2
SKETCH = Sketch(8, 3, exact_above=1.0, held_out=0)


def needs(world: int) -> dict[str, Any]:
    """Counts are per rank."""
    one = RANKS // world
    return {
        "exact": TopGradient(2, 2 * one, None),
        "sketch": TopGradient(2, 2 * one, SKETCH),
        "hrp": Preheated(lambda r: 6, 3, "AB", micro_batches=2 * one, accumulate=one, lr=1e-2),
        "hrp-sketch": Preheated(lambda r: 6, 0, "A", micro_batches=2 * one),
        "cora": CommonSubspace(side="right", width=4),
    }


def check_that_a_stopped_preheat_goes_on(model: Any, batches: list[Any], need: Preheated, cache: Path) -> None:
    """Stopped after the second of three steps on every rank, then the same numbers as without a stop."""
    partial.EVERY_S = 0.0

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("preheat", 2):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        collect(need, model, sites(model), batches, seed=5, cache=cache, progress=stop)
    steps: list[int] = []
    found = collect(
        need, model, sites(model), batches, seed=5, cache=cache, progress=lambda what, done, total: steps.append(done)
    )
    assert steps[0] == 3, steps
    whole = collect(need, model, sites(model), batches, seed=5)
    assert all(torch.equal(getattr(d, k), getattr(whole[n], k)) for n, d in found.items() for k in "USV")


CALLS = [("none", 0, 1), *((engine, rank, RANKS) for engine in ("ddp", "fsdp") for rank in range(RANKS))]


def run(k: int, folder: Path) -> None:
    """The k-th call, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of foreign packages; this process has no pytest to turn them into errors
    engine, rank, world = CALLS[k]
    main(rank, world, folder, engine)


def main(rank: int, world: int, folder: Path, engine: str) -> None:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}-{engine}", rank=rank, world_size=world)
    base: Any = llama(hidden_size=64, intermediate_size=96)
    batches = [{k: v[:-1] for k, v in batch_for(base, seed=i).items()} for i in range(2 * RANKS)]  # no padding
    model: Any = put_in(base, build("lora", r=2))  # type: ignore[arg-type]
    if engine == "ddp":
        model = DistributedDataParallel(model).module
    elif engine == "fsdp":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    mine = batches[rank::RANKS] if world > 1 else batches
    out: dict[str, torch.Tensor] = {}
    if world > 1:
        check_that_a_stopped_preheat_goes_on(model, mine, needs(world)["hrp"], folder / f"stopped-{engine}")
    for kind, need in needs(world).items():
        cache = folder / f"cache-{engine}" if kind == "exact" else None
        for turn in range(2 if cache else 1):
            found = collect(need, model, sites(model), mine, seed=5, cache=cache)
            assert found.spent.cached == (turn == 1)
        for name, d in found.items():
            tensors = {"U": d.U, "S": d.S, "V": d.V}
            out.update({f"{kind}|{name}|{k}": t.contiguous() for k, t in tensors.items() if t is not None})
    save_file(out, folder / f"{engine}-{rank}.safetensors")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
