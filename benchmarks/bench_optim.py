"""Cost of the optimizers. Every figure of a run comes from one process; ratios are the claim, milliseconds the record.

    python benchmarks/bench_optim.py adjustment            LoRA-Pro's adjustment, as published against ours, on the CPU
    python benchmarks/bench_optim.py steps --device cuda   one optimizer step of each transform, Llama-7B shapes

Shapes: the seven linear maps of a Llama-7B layer (4096, 11008), r = 16, s = 2; `steps` has 32 layers = 224 modules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from loralign.linalg import keyed_generator
from loralign.optim import PairOptimizer
from loralign.rule.rm_lora import masked_orthogonal
from loralign.transform.adamw import adamw
from loralign.transform.lora_fa import projected_gradient
from loralign.transform.lora_plus import ratio_lr
from loralign.transform.lora_pro import Adjusted, equivalent_gradient, sylvester
from loralign.transform.lora_rite import invariant_adam
from loralign.transform.muon import matrix_sign
from loralign.transform.riemannian import scaled_gradient
from loralign.types import Ctx, Grad, Pair, Rule, Site, Transform
from oracles import lora_pro as oracle

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""(d_out, d_in)"""
R, S = 16, 2.0
CTX = Ctx(1e-4, 1e-4, 1, {}, lambda purpose, name: keyed_generator(0, purpose, 1, name))


def layer(dtype: torch.dtype, shrink: int = 1) -> tuple[list[Pair], list[Grad]]:
    torch.manual_seed(0)
    pairs, grads = [], []
    for k, (d_out, d_in) in enumerate((o // shrink, i // shrink) for o, i in LAYER):
        A, B = torch.randn(R, d_in, dtype=dtype) / d_in**0.5, torch.randn(d_out, R, dtype=dtype) * 0.02
        pairs.append(Pair(f"w{k}", A, B, S, "AB"))
        grads.append(Grad(torch.randn_like(A), torch.randn_like(B)))
    return pairs, grads


def published(pairs: Sequence[Pair], grads: Sequence[Grad]) -> list[tuple[Tensor, Tensor]]:
    return [oracle.published(p.A, p.B, g.A, g.B, p.s) for p, g in zip(pairs, grads, strict=True)]  # type: ignore[arg-type]


def ours(pairs: Sequence[Pair], grads: Sequence[Grad]) -> list[Grad]:
    """With the published damping, so that results can be compared to the last digit."""
    transform = Adjusted(sylvester, damping=0.0, floor=1e-8)
    shapes: dict[Any, list[int]] = {}
    for k, p in enumerate(pairs):
        shapes.setdefault((p.A.shape, p.B.shape), []).append(k)
    out: dict[int, Grad] = {}
    for at in shapes.values():
        made = transform.update([grads[k] for k in at], [{}] * len(at), [pairs[k] for k in at], CTX)
        out.update(zip(at, made, strict=True))
    return [out[k] for k in range(len(pairs))]


def cpu_ms(f: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(1e3 * (time.process_time() - start))
    return min(times)


def adjustment() -> dict[str, Any]:
    """As published against ours: CPU time of one thread, minimum; agreement in float64 at full size."""
    torch.set_num_threads(1)
    worst = {}
    for dtype in (torch.float64, torch.float32):
        pairs, grads = layer(dtype)
        errors = [
            float((x - y).norm() / y.norm())
            for mine, theirs in zip(ours(pairs, grads), published(pairs, grads), strict=True)
            for x, y in zip(mine, theirs, strict=True)
        ]
        worst[str(dtype).removeprefix("torch.")] = max(errors)
    slow, fast = cpu_ms(lambda: published(pairs, grads), 2), cpu_ms(lambda: ours(pairs, grads), 20)
    return {"published_ms": slow, "ours_ms": fast, "ratio": slow / fast, "relative_difference": worst}


# ---------------------------------------------------------------------------------------------------------------- steps


class Adapter(nn.Module):
    """What a site needs of a PEFT layer."""

    def __init__(self, d_out: int, d_in: int, device: str) -> None:
        super().__init__()
        A, B = nn.Linear(d_in, R, bias=False, device=device), nn.Linear(R, d_out, bias=False, device=device)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": A}), nn.ModuleDict({"default": B})


def optimizer_for(layers: int, device: str, transform: Transform | None, rules: Sequence[Rule] = ()) -> Any:
    """Our optimizer with gradients in place; torch's fused AdamW over the same tensors where transform is None."""
    torch.manual_seed(0)
    sites = [
        Site(f"{n}.{k}", Adapter(d_out, d_in, device), "default", d_out, d_in, R, S)
        for n in range(layers)
        for k, (d_out, d_in) in enumerate(LAYER)
    ]
    tensors = [p for site in sites for p in site.layer.parameters()]
    for p in tensors:
        p.grad = torch.randn_like(p)
    if transform is None:
        return torch.optim.AdamW(tensors, lr=1e-4, fused=True)
    return PairOptimizer(sites, {}, transform, rules=rules, lr=1e-4)


def median_ms(f: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


VIEWS = (
    "view",
    "unbind",
    "split",
    "slice",
    "select",
    "transpose",
    "expand",
    "as_strided",
    "detach",
    "alias",
    "squeeze",
)
VIEWS += (
    "unsqueeze",
    "diagonal",
    "permute",
    "empty",
    "empty_like",
    "chunk",
    "narrow",
    "reshape",
    "t",
    "mT",
    "to",
    "promote_types",
)


def launches(f: Callable[[], object], device: str) -> int:
    """Kernels, copies and fills that one call launches (CPU: outermost aten calls, no views or allocations)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        f()
    events = seen.events() or []
    if device == "cuda":
        kinds = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")
        return sum(event.name.startswith(kinds) for event in events)
    names = [e.name for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return sum(n.startswith("aten::") and n[6:].split("_strided")[0] not in VIEWS for n in names)


def rows() -> dict[str, Callable[[], tuple[Transform | None, Sequence[Rule]]]]:
    return {
        "torch AdamW, fused": lambda: (None, ()),
        "adamw": lambda: (adamw(), ()),
        "lora-plus": lambda: (ratio_lr(), ()),
        "lora-pro": lambda: (equivalent_gradient(), ()),
        "lora-rite": lambda: (invariant_adam(), ()),
        "riemannian": lambda: (scaled_gradient(), ()),
        "lora-fa": lambda: (projected_gradient(), ()),
        "muon": lambda: (matrix_sign(), ()),
        "rm-lora": lambda: (adamw(), (masked_orthogonal(mask_target="update"),)),
        "lora-pro full": lambda: (equivalent_gradient("full"), ()),
    }


def steps(device: str, layers: int, counted: Sequence[int], repeats: int, only: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in rows().items():
        if only and name not in only and not name.startswith("torch"):
            continue
        if name == "lora-pro full" and not only:
            continue  # 52 GB of moments; ask for it by name
        counts = []
        for n in counted:
            optimizer = optimizer_for(n, device, *make())
            optimizer.step()
            counts.append(launches(optimizer.step, device))
        optimizer = optimizer_for(layers, device, *make())
        for _ in range(3 if device == "cuda" else 1):
            optimizer.step()
        state = sum(t.numel() * t.element_size() for st in optimizer.state.values() for t in st.values()) / 2**20
        ms = median_ms(optimizer.step, device, repeats)
        found[name] = {"ms": ms, "launches": dict(zip(map(str, counted), counts, strict=True)), "state_MiB": state}
        del optimizer
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def table(found: dict[str, Any], counted: Sequence[int]) -> str:
    base = found["torch AdamW, fused"]["ms"]
    head = f"{'':20} {'ms/step':>9} {'× fused':>8} {'state MiB':>10}  launches at {'/'.join(map(str, counted))} layers"
    lines = [
        f"{name:20} {row['ms']:9.2f} {row['ms'] / base:8.2f} {row['state_MiB']:10.0f}  "
        + "/".join(str(row["launches"][str(n)]) for n in counted)
        for name, row in found.items()
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("adjustment", "steps"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="32 = 224 modules")
    parser.add_argument(
        "--count-at", type=int, nargs="+", default=[4, 8, 16], help="layers at which launches are counted"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[], help="names of rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu, one thread"
    record: dict[str, Any] = {"torch": torch.__version__, "device": name, "r": R}
    if args.what == "adjustment":
        record |= adjustment()
        diff = record["relative_difference"]
        text = (
            f"LoRA-Pro adjustment, 7 modules of one layer, r = {R}: as published {record['published_ms']:.0f} ms, "
            f"ours {record['ours_ms']:.1f} ms, {record['ratio']:.0f} x; "
            f"relative difference {diff['float64']:.1e} (float64), {diff['float32']:.1e} (float32)"
        )
    else:
        torch.set_num_threads(1)
        record["steps"] = steps(args.device, args.layers, args.count_at, args.repeats, args.only)
        record["layers"] = args.layers
        text = f"{name}, {7 * args.layers} modules, r = {R}\n" + table(record["steps"], args.count_at)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
