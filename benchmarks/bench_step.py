"""A whole `lora` training step beside PEFT's own, as a Trainer runs it: time and peak memory, one process, interleaved.

    python benchmarks/bench_step.py --device cpu
    python benchmarks/bench_step.py --device cuda --shapes 1b 8b --json out.json
    python benchmarks/bench_step.py --device cuda --shapes 135m --compiled      beside a study's compiled blocks
    python benchmarks/bench_step.py --shapes wide --repeats 3 --methods sbora-fa sbora-fb prolora reslora
    python benchmarks/bench_step.py --device cuda --shapes rows --repeats 15 --methods sbora-fa sbora-fb prolora reslora
    python benchmarks/bench_step.py --shapes host --repeats 30      the host's time alone, on the CPU: many tiny layers

A step is forward, backward, clip, optimizer, zero_grad on the same tokens. PEFT: stock layers, fp32 adapters (its
default), torch's fused AdamW and clip_grad_norm_; on CUDA a bf16 base under bf16 autocast, as `bf16=True` gives. Ours:
the same model and autocast, `loralign.adapt` and `loralign.optimizer`. Floor: the frozen model with input gradients.
--methods: further arms beside `lora`, as NAME, NAME:RANK or NAME:RANK:PRESET (rank 16 and the defaults of its options
where not said); /lora compares with ours. --kinds: these instead of all, such an arm or one of the table's, "compiled"
and "recorded" before it: "compiled spectral:64". --dropout: of the adapters, PEFT's and ours, 0 where not said.
`full`, `full-muon`: the matrices themselves, in bf16 on CUDA, their states as well.
--compiled: blocks compiled, the floor's too; "train": as `loralign train` has it, `loralign.compile` and attention
without masks; "replayed": and the backbone's forward and backward are CUDA graphs where its trial finds them faster.
"recorded": forward and backward are one CUDA graph, of compiled blocks as well.
`host` is in bf16 on the CPU too and takes the layer that small outputs have on a GPU; "one node" is the other one.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_models import SHAPES, base_model, fresh_model, half
from peft import get_peft_model

import loralign
from loralign import METHODS, Full, Recipe, adapt, build, optimizer, peft_config
from loralign.carrier.layer import as_on
from loralign.carrier.sites import target_weights
from loralign.compare.compiled import blocks
from loralign.train.backbone import Backbone
from loralign.train.unmasked import Unmasked

ALONE = ("peft", "train", "replayed", "one node")
"""Kinds of plain LoRA that nothing stands before or behind."""


def known(kind: str) -> str:
    """A kind that `step_of` has; argparse refuses another."""
    words = [word for word in kind.split() if word not in ("recorded", "compiled")]
    name, *more = " ".join(words).split(":")
    if kind in ALONE or (kind and not more and name in ("", "floor", "loralign")):
        return kind
    presets = tuple(METHODS[name].presets) if name in METHODS else ()
    ranked = not more or (more[0].isdecimal() and int(more[0]) > 0)
    if name in METHODS and ranked and (len(more) < 2 or (len(more) == 2 and more[1] in presets)):
        return kind
    ways = f"{', '.join(ALONE)}; floor, loralign and NAME[:RANK[:PRESET]], also after recorded, compiled or both"
    why = f"presets of {name}: {', '.join(presets) or 'none'}" if name in METHODS else f"names: {', '.join(METHODS)}"
    raise argparse.ArgumentTypeError(f"no kind {kind!r}. Known: {ways}; {why}")


def recipe_of(kind: str, dropout: float) -> Recipe | Full:
    """METHOD, METHOD:RANK or METHOD:RANK:PRESET; what is no method is plain LoRA."""
    name, rank, preset = f"{kind}::".split(":")[:3]
    r = int(rank or 16)
    scale: dict[str, Any] = {} if name == "spectral" else {"alpha": 2 * r}
    options = METHODS[name].presets[preset] if preset else None
    return build(name if name in METHODS else "lora", options, r=r, dropout=dropout, **scale)


def full_stepper(model: Any, reference: Full) -> torch.optim.Optimizer:
    """The adapted matrices themselves train, weights and states in the base's precision: full fine-tuning's least."""
    wanted = list(target_weights(model, reference).values())
    model.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
    if reference.optimizer:
        return reference.optimizer([{"params": wanted}], 1e-5, 0.0)
    return torch.optim.AdamW(wanted, lr=1e-5, weight_decay=0.0, fused=True)


def loss_of(model: Any, ids: torch.Tensor, shape: str, device: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Under autocast where the shape is one of half precision."""
    with torch.autocast(device, torch.bfloat16) if half(shape, device) else nullcontext():
        loss: torch.Tensor = model(input_ids=ids, labels=ids, attention_mask=mask).loss
    return loss


def compile_blocks(model: Any) -> None:
    for block in blocks(model):
        block.compile(dynamic=False)


def step_of(kind: str, shape: str, device: str, dropout: float) -> Callable[[], None]:
    """A closure that runs one whole step of one kind."""
    recipe = recipe_of(kind.split()[-1], dropout)
    model: Any = fresh_model(shape, device) if isinstance(recipe, Full) else base_model(shape, device)
    ids = torch.randint(0, 8000, SHAPES[shape][1:], device=device)
    rows, length = SHAPES[shape][1:]
    mask = (
        torch.ones(length, length, device=device).tril().bool().expand(rows, 1, -1, -1) if "recorded" in kind else None
    )
    opt: Any = None
    if isinstance(recipe, Full):
        opt = full_stepper(model, recipe)
    elif kind.endswith("floor"):
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif kind == "peft":
        assert isinstance(recipe, Recipe)
        model = get_peft_model(model, peft_config(recipe, model))
        opt = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
        )
    else:
        model = adapt(model, recipe)
        opt = optimizer(model, recipe, 1e-4)
    model.train()
    if kind in ("train", "replayed"):
        made = loralign.compile(model)
        opt.norms.late = device == "cuda"  # as `attach` has it
        why = Unmasked(model).start(length, torch.autocast(device, torch.bfloat16, enabled=half(shape, device)))
        if why:
            print(f"attention is masked, since {why}")
        if kind == "replayed" and device == "cuda":
            Backbone(model, made).start()
    if "compiled" in kind:
        compile_blocks(model)
    like = "cuda" if shape == "host" and kind != "one node" else device

    def both() -> None:
        with as_on(like):
            loss = loss_of(model, ids, shape, device, mask)
        loss.backward()

    run = recorded(both) if "recorded" in kind else both

    def step() -> None:
        run()
        if opt is not None:
            if kind == "peft" or (isinstance(recipe, Full) and recipe.max_grad_norm):
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            opt.step()
            opt.zero_grad(set_to_none="recorded" not in kind)

    return step


def recorded(both: Callable[[], None]) -> Callable[[], None]:
    """Forward and backward as one CUDA graph; gradients stay where they are and are overwritten by every replay."""
    both()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        both()

    def replay(held: Callable[[], None] = both) -> None:  # the graph reads the tokens where they lie: they must stay
        graph.replay()

    return replay


def seconds(step: Callable[[], object], device: str) -> float:
    """Of the wall between synchronisations on a GPU; of this process on the CPU, which others may share."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


def kept_bytes(step: Callable[[], None], device: str) -> int:
    """Peak memory of a step: the allocator's on CUDA, distinct storages saved for backward on the CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    seen: dict[int, int] = {}
    held = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(seen.values())


def measure(kinds: Sequence[str], shape: str, device: str, repeats: int, dropout: float) -> dict[str, dict[str, float]]:
    """Time interleaved over the kinds (CPU); on CUDA one kind at a time, so that memory is its own."""
    found = {}
    if device == "cuda":
        for kind in kinds:
            step = step_of(kind, shape, device, dropout)
            for _ in range(3):
                step()
            peak = kept_bytes(step, device)
            times = sorted(seconds(step, device) for _ in range(repeats))
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved() / 2**30  # between steps: CUDA graphs keep what a step needs
            found[kind] = {"ms": 1e3 * times[len(times) // 2], "peak_gib": peak / 2**30, "held_gib": held}
            del step
            gc.collect()
            torch.cuda.empty_cache()
        return found
    steps = {kind: step_of(kind, shape, device, dropout) for kind in kinds}
    best = dict.fromkeys(kinds, float("inf"))
    for step in steps.values():
        step()
    for _ in range(repeats):
        for kind, step in steps.items():
            best[kind] = min(best[kind], seconds(step, device))
    return {k: {"ms": 1e3 * best[k], "peak_gib": kept_bytes(steps[k], device) / 2**30} for k in kinds}


def over(row: dict[str, float], rows: dict[str, dict[str, float]], other: str, key: str) -> str:
    """The ratio to another kind's, where that was measured."""
    return f"{row[key] / rows[other][key]:.3f}" if other in rows else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", default=None, choices=tuple(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compiled", action="store_true", help="also with the model's blocks compiled")
    parser.add_argument(
        "--methods", nargs="+", default=[], type=known, help="further arms: NAME, NAME:RANK or NAME:RANK:PRESET"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        type=known,
        help='these instead, as in "compiled spectral:64" (NAME, NAME:RANK or NAME:RANK:PRESET); ratios to kinds not '
        "measured are left out",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("loralign").setLevel(logging.INFO)
    if args.device == "cpu":
        torch.set_num_threads(1)
    shapes = args.shapes or (["small"] if args.device == "cpu" else ["1b", "8b"])
    kinds = ["floor", "peft", "loralign", *(["compiled floor", "compiled", "train"] if args.compiled else [])]
    kinds += ["replayed", "recorded", "recorded compiled"] if args.compiled and args.device == "cuda" else []
    kinds = args.kinds or kinds
    results = {}
    for shape in shapes:
        more = ["one node"] if shape == "host" else []
        results[shape] = measure([*kinds, *args.methods, *more], shape, args.device, args.repeats, args.dropout)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "device": args.device, "results": results}, indent=1))
    print(f"{'shape':8}{'kind':28}{'ms':>10}{'/floor':>8}{'/peft':>8}{'/lora':>8}{'peak GiB':>10}{'/peft':>8}")
    for shape, rows in results.items():
        for kind, row in rows.items():
            ratios = "".join(f"{over(row, rows, other, 'ms'):>8}" for other in ("floor", "peft", "loralign"))
            memory = over(row, rows, "peft", "peak_gib")
            print(f"{shape:8}{kind:28}{row['ms']:10.1f}{ratios}{row['peak_gib']:10.3f}{memory:>8}")


if __name__ == "__main__":
    main()
