"""What an init may know, and what knowing it costs: sketches, preheating, common subspaces; ratios within one process.

    python benchmarks/bench_evidence.py quality            sketches of real gradients (SmolLM2, BBC News) against exact ones
    python benchmarks/bench_evidence.py init               LoRA-GA: PEFT's, ours exact, ours sketched; time and peak memory
    python benchmarks/bench_evidence.py preheat            K preheating steps at rank 128 against K LoRA steps
    python benchmarks/bench_evidence.py product            product_svd at 4096², R = 128 against forming B·A
    python benchmarks/bench_evidence.py cora               extraction of all SmolLM2 sites against reading, and against SVDs
    python benchmarks/bench_evidence.py init preheat product --device cuda --shape 8b --json out.json

Several parts may be named. On the CPU: one thread, process time, the best of several, interleaved. quality and cora need
`make assets`. Measure of quality: energy of the first LoRA-GA step over that of the best step of rank 2r.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loralign import Recipe, adapt, build, optimizer, sites
from loralign.evidence import Passes, collect, exact_gradient, model_loss
from loralign.evidence.gradient import accumulate
from loralign.evidence.sketch import Side, Stream
from loralign.linalg import first_step_energy, product_svd
from loralign.sites import put_in
from loralign.subspace import consensus_of, extract
from loralign.subspace_sources import Checkpoint, Members, cut, leading, pattern, targets_of
from loralign.types import Preheated, Sketch, TopGradient

Row = dict[str, Any]
SHAPES: dict[str, tuple[dict[str, int], int]] = {  # config, tokens of a micro-batch
    "tiny": ({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}, 64),
    "1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8}, 1024,
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8}, 1024,
    ),
}  # fmt: skip
SETTINGS = (Sketch(8, 1), Sketch(6, 1), Sketch(4, 1), Sketch(4, 2), Sketch(3, 3), Sketch(4, 4), Sketch(8, 2))
BLOCKS = (0, 5, 12, 17, 23, 29)


def assets() -> Path:
    chosen = os.environ.get("LORALIGN_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"


def recipe(name: str, **fields: Any) -> Recipe:
    made = build(name, **fields)
    assert isinstance(made, Recipe)
    return made


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def best(kinds: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Seconds of each kind, interleaved, the best of `repeats`."""
    found = dict.fromkeys(kinds, float("inf"))
    for _ in range(repeats):
        for kind, run in kinds.items():
            start = clock(device)
            run()
            found[kind] = min(found[kind], clock(device) - start)
    return found


# -------------------------------------------------------------------------------------------------------------- quality


def real_batches(tokenizer: Any, count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    lines = (assets() / "bbc" / "all.jsonl").read_text(encoding="utf-8").splitlines()[::37]
    ids = torch.cat([torch.tensor(tokenizer(json.loads(line)["text"]).input_ids) for line in lines])
    chunks = ids[: count * rows * length].view(count, rows, length)
    return [{"input_ids": c, "labels": c} for c in chunks]


def smollm2() -> tuple[Any, Any]:
    folder = assets() / "smollm2-135m"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def quality(args: argparse.Namespace) -> list[Row]:
    """Six blocks of SmolLM2; then the time of a pass over all of them beside LoRA's forward and backward."""
    model, tokenizer = smollm2()
    batches = real_batches(tokenizer, args.micro_batches, 2, 256)
    blocks = "|".join(str(b) for b in BLOCKS)
    model = put_in(model, recipe("lora", r=args.rank, targets=rf".*layers\.({blocks})\..*_proj"))
    found = sites(model)
    G = exact_gradient(model, found, batches, model_loss)
    S = {name: torch.linalg.svdvals(g) for name, g in G.items()}
    dense = sum(4 * g.numel() for g in G.values())
    rows = []
    for sketch in SETTINGS:
        sketch = Sketch(sketch.width, sketch.passes, exact_below=0.0, held_out=0)
        made = collect(TopGradient(2, len(batches), sketch), model, found, batches)
        energy, estimate, r = [], [], args.rank
        for name, d in made.items():
            assert d.U is not None and d.V is not None and d.quality is not None and not d.exact
            energy.append(float(first_step_energy(d.U[:, :r], d.V[:, r : 2 * r].T, G[name], S[name])))
            estimate.append(d.quality)
        size = dense / made.spent.state_bytes
        row = {"setting": f"{sketch.width}r, {sketch.passes} passes", "mean": sum(energy) / len(energy)}
        row |= {"worst": min(energy), "estimated worst": min(estimate), "dense/bytes": size}
        rows.append(row)
        print(row, flush=True)
    return rows + pass_times(batches[0], args)


def pass_times(batch: dict[str, Tensor], args: argparse.Namespace) -> list[Row]:
    """One micro-batch: each kind of pass over LoRA's forward and backward, every linear layer of all 30 blocks."""
    model, _ = smollm2()
    lora = recipe("lora", r=args.rank)
    model = adapt(model, lora)
    fresh = put_in(smollm2()[0], lora)
    found = sites(fresh)
    passes = Passes(fresh, model_loss)
    kinds: dict[str, Callable[[], Any]] = {"LoRA": lambda: model_loss(model, batch).backward()}
    for width in (4, 8):
        into = {s.name: Stream(s, min(width * s.r, s.d_out, s.d_in), 0) for s in found}
        kinds[f"first pass, {width}r"] = lambda into=into: accumulate(passes, found, [batch], into, "")
        sides = {s.name: Side(s, torch.randn(s.d_in, min(width * s.r, s.d_out, s.d_in)), left=True) for s in found}
        kinds[f"further pass, {width}r"] = lambda sides=sides: accumulate(passes, found, [batch], sides, "")
    seconds = best(kinds, "cpu", args.repeats)
    return [{"pass": k, "seconds": v, "/LoRA": v / seconds["LoRA"]} for k, v in seconds.items()]


# ----------------------------------------------------------------------------------------------------- init and preheat


def llama(shape: str, device: str) -> Any:
    config = LlamaConfig(vocab_size=32000, use_cache=False, **SHAPES[shape][0])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def micro_batches(shape: str, device: str, count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 32000, (1, SHAPES[shape][1]), generator=draw).to(device) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def ours(sketch: Sketch | None) -> Callable[[Any, Any], Any]:
    return lambda model, batches: adapt(model, recipe_with(sketch), batches)


def recipe_with(sketch: Sketch | None) -> Recipe:
    made = build("lora-ga", {"sketch": sketch, "micro_batches": 4}, r=16, alpha=32.0)
    assert isinstance(made, Recipe)
    return made


def of_peft(model: Any, batches: Any) -> Any:
    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*_proj",
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    peft.tuners.lora.preprocess_loraga(model, config, train_step)
    return peft.get_peft_model(model, config)


def four_bit(model: Any) -> Any:
    """Every linear layer but the head in nf4."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, new.to("cuda"))
    model.is_loaded_in_4bit = True
    return model


def init(args: argparse.Namespace) -> list[Row]:
    """LoRA-GA's start on one model, 4 micro-batches of one row, checkpointed; peak memory over the weights."""
    kinds: dict[str, Callable[[Any, Any], Any]] = {
        "PEFT lora_ga": of_peft,
        "ours, sketch (default)": ours(Sketch()),
        "ours, sketch 4r, 2 passes": ours(Sketch(4, 2)),
        "ours, exact": ours(None),
    }
    if args.four_bit:
        kinds["ours, sketch, 4-bit base"] = lambda m, b: ours(Sketch())(four_bit(m), b)
    rows: list[Row] = []
    for kind, run in kinds.items():
        model: Any = llama(args.shape, args.device)
        batches = micro_batches(args.shape, args.device, 4)
        with torch.no_grad():
            model(**batches[0])  # libraries are loaded, kernels chosen
        before = 0
        if args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = clock(args.device)
        model = run(model, batches)
        row = {"init": kind, "seconds": clock(args.device) - start}
        if args.device == "cuda":
            row |= {"weights GiB": before / 2**30, "added GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}
        rows.append(row)
        print(row, flush=True)
        del model
        gc.collect()
    return rows


def preheat(args: argparse.Namespace) -> list[Row]:
    """Steps of the preheat at R = 128 beside LoRA steps at r = 16, same model and micro-batches; setup stated apart."""
    batches, steps, marks = micro_batches(args.shape, args.device, 4), args.steps, []
    model = put_in(llama(args.shape, args.device), recipe("lora", r=16))
    R = 128 if args.shape != "tiny" else 32
    start = clock(args.device)
    need = Preheated(lambda r: R, steps, "AB", micro_batches=4)
    collect(need, model, sites(model), batches, progress=lambda what, i, n: marks.append((what, i, clock(args.device))))
    total = clock(args.device) - start
    ticks = [t for what, _, t in marks if what == "preheat"]
    per_step = (ticks[-1] - ticks[1]) / (len(ticks) - 2)
    del model
    gc.collect()
    plain = recipe("lora", r=16)
    model = adapt(llama(args.shape, args.device), plain)
    opt, ticks = optimizer(model, plain, 1e-4), []
    for i in range(steps):
        model(**batches[i % 4]).loss.backward()
        opt.step()
        opt.zero_grad()
        ticks.append(clock(args.device))
    lora = (ticks[-1] - ticks[1]) / (len(ticks) - 2)
    row = {"preheat": f"R {R}, {steps} steps", "step ms": 1e3 * per_step, "LoRA step ms": 1e3 * lora}
    return [row | {"ratio": per_step / lora, "setup and SVD s": total - steps * per_step}]


def product(args: argparse.Namespace) -> list[Row]:
    rows = []
    for m, n in ((2048, 2048), (4096, 4096), (11008, 4096)) if args.shape != "tiny" else ((256, 256),):
        B, A = torch.randn(m, 128, device=args.device), torch.randn(128, n, device=args.device)
        t = best({"svd": lambda B=B, A=A: product_svd(B, A), "form": lambda B=B, A=A: B @ A}, args.device, 10)
        rows.append({"product": f"{m}x{n}, R 128", **{f"{k} ms": 1e3 * v for k, v in t.items()}})
        rows[-1]["svd/form"] = t["svd"] / t["form"]
    return rows


# ----------------------------------------------------------------------------------------------------------------- cora


def in_memory(matrices: Sequence[tuple[Any, Tensor]], width: int) -> Members:
    groups: dict[str, list[Any]] = {}
    for target, W in matrices:
        groups.setdefault(pattern(target.name), []).append(lambda t=target, W=W: leading(W, cut(width, t)))
    return Members(groups, width, {"kind": "weights", "sources": [], "base": None})


def resident(run: Callable[[], Any], smallest: int) -> int:
    """Most weight matrices that are alive at once while `run` reads a checkpoint."""
    alive, most, read = set(), [0], Checkpoint.read

    def counted(self: Checkpoint, target: Any) -> Tensor:
        W = read(self, target)
        alive.add(key := (id(W), len(alive)))
        weakref.finalize(W, alive.discard, key)
        most[0] = max(most[0], len(alive))
        return W

    Checkpoint.read = counted  # type: ignore[method-assign]
    try:
        run()
    finally:
        Checkpoint.read = read  # type: ignore[method-assign]
    return most[0]


def cora(args: argparse.Namespace) -> list[Row]:
    folder = assets() / "smollm2-135m"
    targets, checkpoint = targets_of(folder), Checkpoint(folder)
    matrices = [(t, checkpoint.read(t).float()) for t in targets]
    kinds: dict[str, Callable[[], Any]] = {
        "read only": lambda: [float(checkpoint.read(t).float().sum()) for t in targets],
        "SVDs only": lambda: consensus_of(in_memory(matrices, 32)),
        "extraction": lambda: extract([folder]),
    }
    t = best(kinds, args.device, args.repeats)
    row = {"cora": f"{len(targets)} sites", **{f"{k} s": v for k, v in t.items()}}
    del matrices
    gc.collect()
    ratio = t["extraction"] / max(t["read only"], t["SVDs only"])
    return [row | {"ratio": ratio, "matrices alive": resident(lambda: extract([folder]), 1)}]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "quality": quality,
    "init": init,
    "preheat": preheat,
    "product": product,
    "cora": cora,
}


def table(rows: Sequence[Row]) -> str:
    lines, head = [], None
    for row in rows:
        if list(row) != head:
            head = list(row)
            lines.append("  ".join(f"{k:>26}" if i == 0 else f"{k:>16}" for i, k in enumerate(head)))
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("  ".join(f"{c:>26}" if i == 0 else f"{c:>16}" for i, c in enumerate(cells)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default=None, choices=tuple(SHAPES), help="of init and preheat")
    parser.add_argument("--rank", type=int, default=8, help="of quality")
    parser.add_argument("--micro-batches", type=int, default=6, help="of quality, 2x256 tokens each")
    parser.add_argument("--steps", type=int, default=12, help="of preheat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--four-bit", action="store_true", help="init also on a 4-bit base (bitsandbytes)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.shape = args.shape or ("8b" if args.device == "cuda" else "tiny")
    if args.device == "cpu":
        torch.set_num_threads(1)
    results = {part: PARTS[part](args) for part in args.parts}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "device": args.device, "results": results}, indent=1))
    print("\n\n".join(table(rows) for rows in results.values()))


if __name__ == "__main__":
    main()
