"""How a method's best learning rate moves with the model's width: small Llamas that have read English, new text.

    python benchmarks/width_rates.py --json out.json --picture rates.png [--widths 64 128 256 512] [--methods spectral]

Needs the asset cache (scripts/assets.py bbc, multiemo de). Bytes are tokens. Every width is trained as a whole on BBC
articles (AdamW), then adapted to German reviews at rates a factor of two apart, rank and scale the same at all widths:
loss on held-out blocks after `--steps` steps, cosine. The best rate is the lowest point of the parabola in log lr
through the lowest loss and its neighbours; p of lr ∝ width^−p by least squares over widths.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loralign import Recipe, adapt, build, optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import asset_data

LENGTH, HELD_OUT = 128, 48
CENTRES = {"spectral": 1.6e-2, "lora": 4e-3, "full": 1e-3}
"""At width 256, of grids that move with 1/√width."""
SETTINGS = ("rank", "steps", "first_steps", "batch", "seeds")
"""What widths must have in common to be compared."""


def blocks(file: Path, most: int) -> Tensor:
    """(n, LENGTH) bytes of the texts, in the file's order."""
    lines = file.read_text(encoding="utf-8").splitlines()
    data = "\n".join(json.loads(line)["text"] for line in lines).encode()[: most * LENGTH]
    return torch.tensor(list(data[: len(data) // LENGTH * LENGTH])).view(-1, LENGTH)


def model_of(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    inner = 16 * round(width * 8 / 3 / 16)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=width, intermediate_size=inner, num_hidden_layers=2,
                    num_attention_heads=max(1, width // 32), use_cache=False, max_position_embeddings=LENGTH)
    )  # fmt: skip


def train(model: Any, stepper: torch.optim.Optimizer, rows: Tensor, steps: int, batch: int, seed: int) -> None:
    """Cosine to zero after 3 % of warm-up; the order of rows by the seed alone."""
    draw, first = torch.Generator().manual_seed(seed), max(1, round(0.03 * steps))
    rates = [group["lr"] for group in stepper.param_groups]
    for step in range(steps):
        share = min(1.0, (step + 1) / first) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(stepper.param_groups, rates, strict=True):
            group["lr"] = rate * share
        ids = rows[torch.randint(len(rows), (batch,), generator=draw)]
        model(input_ids=ids, labels=ids).loss.backward()
        stepper.step()
        stepper.zero_grad()


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    return float(torch.stack([model(input_ids=part, labels=part).loss for part in rows.split(16)]).mean())


def read_english(width: int, rows: Tensor, steps: int, batch: int) -> LlamaForCausalLM:
    model = model_of(width)
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3 * (128 / width) ** 0.5), rows, steps, batch, 0)
    return model


def adapted_loss(
    base: LlamaForCausalLM, method: str, lr: float, rows: tuple[Tensor, Tensor], args: argparse.Namespace, seed: int
) -> float:
    """Held-out loss of one run; infinite where it is not a number."""
    model: Any = copy.deepcopy(base)
    recipe = build(method, r=args.rank, seed=seed, **({} if method == "spectral" else {"alpha": args.rank**1.5}))
    if isinstance(recipe, Recipe):
        model = adapt(model, recipe)
        stepper = optimizer(model, recipe, lr)
    else:
        for name, p in model.named_parameters():
            p.requires_grad_("_proj" in name)
        stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    train(model, stepper, rows[0], args.steps, args.batch, seed)
    found = loss_of(model, rows[1])
    return found if math.isfinite(found) else math.inf


def best_rate(losses: Mapping[float, float]) -> tuple[float, bool]:
    """Lowest point of the parabola in log lr through the lowest loss and its neighbours; whether it lies inside."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1) or not all(math.isfinite(losses[rates[i]]) for i in (at - 1, at, at + 1)):
        return rates[at], False
    low, mid, high = (losses[rates[i]] for i in (at - 1, at, at + 1))
    shift = 0.5 * (low - high) / (low - 2 * mid + high)
    return rates[at] * (rates[at + 1] / rates[at]) ** shift, True


def power(best: Mapping[int, float]) -> float:
    """p of lr ∝ width^−p, least squares in logs."""
    x = [math.log(w) for w in best]
    y = [math.log(lr) for lr in best.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return -sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--methods", nargs="+", default=["spectral"], choices=tuple(CENTRES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--first-steps", type=int, default=300, help="of the English that every width reads first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    english = blocks(asset_data.build_bbc_articles() / "train.jsonl", 8000)
    german = blocks(asset_data.build_multiemo("de") / "train.jsonl", 8000)
    rows = german[HELD_OUT:], german[:HELD_OUT]
    found = begun(args)
    for width in args.widths:
        base = read_english(width, english, args.first_steps, args.batch)
        print(
            f"width {width}: {loss_of(base, english[:16]):.3f} on English, {loss_of(base, rows[1]):.3f} on German",
            flush=True,
        )
        for method in args.methods:
            centre = CENTRES[method] * (256 / width) ** 0.5
            for i in range(args.rates):
                lr = centre * 2.0 ** (i - args.rates // 2)
                found[method].setdefault(width, {})[lr] = own = [
                    adapted_loss(base, method, lr, rows, args, seed) for seed in range(args.seeds)
                ]
                print(f"  {method} {lr:.3g}: {' '.join(f'{x:.4f}' for x in own)}", flush=True)
        report(found, args)


def begun(args: argparse.Namespace) -> dict[str, dict[int, dict[float, list[float]]]]:
    """What an earlier call left in --json: further widths and methods join it, under its settings alone."""
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.is_file() else {}
    if kept and (other := [k for k in SETTINGS if kept["settings"].get(k) != vars(args)[k]]):
        there = ", ".join(f"{k.replace('_', '-')} {kept['settings'].get(k)}, not {vars(args)[k]}" for k in other)
        raise SystemExit(f"{args.json} was measured with {there}: name another file, or give the same settings")
    return {
        m: {int(w): {float(lr): own for lr, own in losses.items()} for w, losses in kept[m]["losses"].items()}
        if m in kept
        else {}
        for m in CENTRES
        if m in kept or m in args.methods
    }


def report(found: Mapping[str, Mapping[int, Mapping[float, Sequence[float]]]], args: argparse.Namespace) -> None:
    body: dict[str, Any] = {"settings": {k: vars(args)[k] for k in SETTINGS}}
    for method, widths in found.items():
        means = {w: {lr: sum(own) / len(own) for lr, own in losses.items()} for w, losses in widths.items()}
        best = {w: best_rate(losses) for w, losses in means.items()}
        inside = {w: lr for w, (lr, ok) in best.items() if ok}
        p = power(inside) if len(inside) > 1 else None
        for w, (lr, ok) in best.items():
            print(f"{method}, width {w}: best {lr:.3g}{'' if ok else ' (edge)'}, lr·√width {lr * w**0.5:.3g}")
        print(f"{method}: lr ∝ width^−{p:.2f}" if p is not None else f"{method}: every best lies at an edge")
        body[method] = {"losses": widths, "best": best, "power": p}
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(found, args.picture)


def draw(found: Mapping[str, Mapping[int, Mapping[float, Sequence[float]]]], file: Path) -> None:
    """Loss less the width's lowest, against the rate (left) and against rate·√width (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 2, figsize=(9, 3.4 * len(found)), squeeze=False, sharey="row")
    for row, (method, widths) in zip(axes, found.items(), strict=True):
        for i, (w, losses) in enumerate(widths.items()):
            y = [sum(own) / len(own) for own in losses.values()]
            y = [v - min(y) for v in y]
            colour = plt.get_cmap("viridis")(i / max(1, len(widths) - 1) * 0.85)
            row[0].plot(list(losses), y, "o-", color=colour, label=f"width {w}")
            row[1].plot([lr * w**0.5 for lr in losses], y, "o-", color=colour)
        for axis, label in zip(row, ("learning rate", "learning rate · √width"), strict=True):
            axis.set(xscale="log", xlabel=label, ylim=(-0.01, 0.35))
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{method}: loss above the width's best")
        row[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
