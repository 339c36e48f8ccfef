"""Cost of the optimizers. Every figure of a run comes from one process; ratios are the claim, milliseconds the record.

    python benchmarks/bench_optim.py adjustment                    LoRA-Pro's adjustment, as published and ours (CPU)
    python benchmarks/bench_optim.py steps train --device cuda     the two below, one GPU of 80 GB, about 90 s
    python benchmarks/bench_optim.py steps --layers 1 --count-at 1 2 4     small, on the CPU
    python benchmarks/bench_optim.py train --shape tiny                    small, on the CPU

adjustment, steps: the seven linear maps of a Llama-7B layer (4096, 11008), r = 16, s = 2; `steps` has 32 layers = 224
modules and counts what one step launches: operations (calls of torch from the optimizer) and, on CUDA, kernels, copies
and fills. A multi-tensor operation takes a few hundred blocks or some sixty tensors per kernel, so its kernels grow
slowly with the layers, torch's fused AdamW among them (first row). No clip there; ours form the norm for the log.

train: whole steps (forward, backward, clip, optimizer, zero_grad) of one adapted model, 8B-shaped, 4 × 1024 tokens,
bf16 base under bf16 autocast, adapters fp32; the optimizers take turns, so clocks and memory are the same for all.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from bench_models import SHAPES, base_model

from loralign import Recipe, adapt, build
from loralign import optimizer as optimizer_of
from loralign.maths.draws import keyed_generator
from loralign.methods.rule.rm_lora import masked_orthogonal
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.lora_fa import projected_gradient
from loralign.methods.transform.lora_plus import ratio_lr
from loralign.methods.transform.lora_pro import Adjusted, equivalent_gradient, sylvester
from loralign.methods.transform.lora_rite import invariant_adam
from loralign.methods.transform.muon import matrix_sign
from loralign.methods.transform.riemannian import scaled_gradient
from loralign.optim.pairs import PairOptimizer
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
    threads = torch.get_num_threads()
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
    torch.set_num_threads(threads)
    return {"published_ms": slow, "ours_ms": fast, "ratio": slow / fast, "relative_difference": worst}


# ---------------------------------------------------------------------------------------------------------------- steps


class Adapter(nn.Module):
    """What a site needs of a PEFT layer."""

    def __init__(self, d_out: int, d_in: int, r: int, device: str) -> None:
        super().__init__()
        A, B = nn.Linear(d_in, r, bias=False, device=device), nn.Linear(r, d_out, bias=False, device=device)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": A}), nn.ModuleDict({"default": B})


def optimizer_for(layers: int, device: str, transform: Transform | None, rules: Sequence[Rule] = (), r: int = R) -> Any:
    """Our optimizer with gradients in place; torch's fused AdamW over the same tensors where transform is None."""
    torch.manual_seed(0)
    sites = [
        Site(f"{n}.{k}", Adapter(d_out, d_in, r, device), "default", d_out, d_in, r, S)
        for n in range(layers)
        for k, (d_out, d_in) in enumerate(LAYER)
    ]
    tensors = [p for site in sites for p in site.layer.parameters()]
    for p in tensors:
        p.grad = torch.randn_like(p)
    if transform is None:
        return torch.optim.AdamW(tensors, lr=1e-4, fused=True)
    return PairOptimizer(sites, {}, transform, rules=rules, lr=1e-4, max_grad_norm=0.0)


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


VIEWS = {
    "view", "unbind", "split", "slice", "select", "transpose", "expand", "as", "detach", "alias", "squeeze",
    "unsqueeze", "diagonal", "permute", "empty", "empty_like", "chunk", "narrow", "reshape", "t", "mT", "to",
    "promote_types", "atleast_2d", "resolve_conj", "resolve_neg", "lift_fresh",
}  # fmt: skip
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")


def launches(f: Callable[[], object], device: str) -> dict[str, int]:
    """Of one call: outermost aten calls without views and allocations; on CUDA also kernels, copies and fills."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        f()
        if device == "cuda":
            torch.cuda.synchronize()
    events = seen.events() or []
    names = [e.name for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    found = {"ops": sum(n.startswith("aten::") and n[6:].split("_strided")[0] not in VIEWS for n in names)}
    if device == "cuda":
        found["kernels"] = sum(event.name.startswith(LAUNCHES) for event in events)
    return found


FUSED = "torch AdamW, fused"


def rows() -> dict[str, Callable[[], tuple[Transform | None, Sequence[Rule]]]]:
    return {
        FUSED: lambda: (None, ()),
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


def steps(device: str, layers: int, repeats: int, only: Sequence[str], r: int = R) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in chosen(only).items():
        optimizer = optimizer_for(layers, device, *make(), r=r)
        for _ in range(3 if device == "cuda" else 1):
            optimizer.step()
        state = sum(t.numel() * t.element_size() for st in optimizer.state.values() for t in st.values()) / 2**20
        found[name] = {"ms": median_ms(optimizer.step, device, repeats), "state_MiB": state}
        del optimizer
        release(device)
    return found


def count(found: dict[str, Any], device: str, counted: Sequence[int], r: int = R) -> None:
    """Add to the rows of `steps` what a step launches; last, since a profiler slows the rest of its process down."""
    made = rows()
    for name, row in found.items():
        row["launches"] = {}
        for n in counted:
            optimizer = optimizer_for(n, device, *made[name](), r=r)
            optimizer.step()
            row["launches"][str(n)] = launches(optimizer.step, device)


def chosen(only: Sequence[str]) -> dict[str, Callable[[], tuple[Transform | None, Sequence[Rule]]]]:
    """The rows asked for; "lora-pro full" (52 GB of moments at 224 modules) only by name."""
    wanted = only or [name for name in rows() if name != "lora-pro full"]
    return {name: make for name, make in rows().items() if name in wanted or name == FUSED}


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def steps_table(found: dict[str, Any], counted: Sequence[int]) -> str:
    kinds = list(next(iter(found.values()))["launches"][str(counted[0])])
    at = "/".join(map(str, counted))
    head = f"{'':20} {'ms/step':>8} {'× fused':>8} {'state MiB':>10}" + "".join(f"{f'{k} at {at}':>22}" for k in kinds)
    lines = []
    for name, row in found.items():
        counts = ["/".join(str(row["launches"][str(n)][k]) for n in counted) for k in kinds]
        over = row["ms"] / found[FUSED]["ms"]
        lines.append(
            f"{name:20} {row['ms']:8.2f} {over:8.2f} {row['state_MiB']:10.0f}" + "".join(f"{c:>22}" for c in counts)
        )
    return "\n".join([head, *lines])


# ---------------------------------------------------------------------------------------------------------------- train


def train(shape: str, device: str, repeats: int, only: Sequence[str]) -> dict[str, float]:
    """Median ms of a whole step by optimizer; "none" is forward and backward alone."""
    base = build("lora", r=R, alpha=S * R)
    assert isinstance(base, Recipe)
    model = adapt(base_model(shape, device), base)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(0, 8000, SHAPES[shape][1:], device=device)

    def forward_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    def whole(optimizer: Any, clip: bool) -> Callable[[], None]:
        def step() -> None:
            forward_backward()
            if clip:  # ours clip inside
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if optimizer is not None:
                optimizer.step()
            for p in trained:
                p.grad = None

        return step

    kinds = {"none": whole(None, False)}
    for name, make in chosen(only).items():
        transform, rules = make()
        if transform is None:
            kinds[name] = whole(torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True), True)
        else:
            kinds[name] = whole(
                optimizer_of(model, replace(base, transform=transform, rules=tuple(rules)), 1e-6), False
            )
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 2):
        for name, step in kinds.items():
            ms = median_ms(step, device, 1)
            if turn > 1:
                times[name].append(ms)
    return {name: statistics.median(ms) for name, ms in times.items()}


def train_table(found: dict[str, float]) -> str:
    base = found[FUSED]
    lines = [f"{name:20} {ms:8.1f} {ms / base:8.3f}" for name, ms in found.items()]
    return "\n".join([f"{'':20} {'ms/step':>8} {'× fused':>8}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("adjustment", "steps", "train"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="of `steps`; 32 = 224 modules")
    parser.add_argument("--count-at", type=int, nargs="+", default=[4, 8, 16], help="layers at which to count launches")
    parser.add_argument("--rank", type=int, default=R, help="of `steps`")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b", help="of `train`")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[], choices=tuple(rows()), help="rows beside torch's fused AdamW")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: leave --device out for the CPU")
    cuda = args.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if cuda else "cpu, one thread"
    record: dict[str, Any] = {"torch": torch.__version__, "device": name, "r": R}
    texts = []
    if "adjustment" in args.what:
        record["adjustment"] = found = adjustment()
        diff = found["relative_difference"]
        texts.append(
            f"LoRA-Pro adjustment, CPU, one thread, 7 modules of one layer, r = {R}: as published "
            f"{found['published_ms']:.0f} ms, ours {found['ours_ms']:.1f} ms, {found['ratio']:.0f} x; "
            f"relative difference {diff['float64']:.1e} (float64), {diff['float32']:.1e} (float32)"
        )
    if "steps" in args.what:
        record["steps"] = steps(args.device, args.layers, args.repeats, args.only, args.rank)
        record["layers"], record["r"] = args.layers, args.rank
    if "train" in args.what:
        record["train"], record["shape"] = train(args.shape, args.device, args.repeats, args.only), args.shape
        head = f"whole training step, {name}, {args.shape}-shaped, {'×'.join(map(str, SHAPES[args.shape][1:]))} tokens"
        texts.append(f"{head}\n{train_table(record['train'])}")
    if "steps" in args.what:
        count(record["steps"], args.device, args.count_at, args.rank)
        head = f"optimizer step, {name}, torch {torch.__version__}, {7 * args.layers} modules, r = {args.rank}"
        texts.append(f"{head}\n{steps_table(record['steps'], args.count_at)}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
