"""`loralign suggest`: a recipe to begin with, each part with its reason and the record that it rests on."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralign.cli.machine import device_here, gpu_memory
from loralign.cli.parameters import AsJson
from loralign.cli.run import replace_text, say
from loralign.io.host import free_host_memory

if TYPE_CHECKING:
    from loralign.cli.plan import Planned
    from loralign.plan.suggest import Choice

STEPS = 300
"""Of the recorded studies: shorter runs go through their rows more than once, three times at most."""


def suggest(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or hub id; only its config is read.")],
    rows: Annotated[str | None, typer.Option(help="The rows to train on, as `data.train` takes them.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of their columns, as `data.columns` has them.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the rows in all, where --rows is not given.")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB; default: this machine's GPU, or its RAM.")] = None,
    length: Annotated[
        int | None,
        typer.Option(min=8, max=1 << 20, help="Tokens of a row at most; default: 1024, or the model's positions."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto: where it will run.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the recipe file here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A recipe to begin with: method, rank, scale and rate, why, what they rest on, and what a step takes."""
    from loralign.cli.plan import costs, planned, trained
    from loralign.config.recipe import parse
    from loralign.config.sources import columns_of
    from loralign.io.folder import check_place
    from loralign.plan.suggest import caution, findings, first_that_fits, judged, on_nf4, ranked, rate
    from loralign.train.job import USUAL_LENGTH
    from loralign.train.model import described, hidden_size, row_length, stored_quantisation
    from loralign.types import LoralignError

    if device not in ("auto", "cpu", "cuda"):
        raise LoralignError(f"--device {device}: choose auto, cpu or cuda")
    if rows is not None and tokens is not None:
        raise LoralignError("--rows and --tokens: the rows tell how much they are, leave --tokens out")
    if columns is not None and rows is None:
        raise LoralignError("--columns says which columns are which in the rows: name them with --rows")
    data: dict[str, Any] = {"train": rows or "train.jsonl"} | ({"columns": columns_of(columns)} if columns else {})
    if out is not None:
        if out.exists() or out.is_symlink():
            raise LoralignError(f"{out} is there already: choose another name for --out")
        check_place(out.absolute().parent)
    where = device_here(device)
    most = row_length(described(model), model, length, "--length", USUAL_LENGTH)
    data["max_length"] = most
    answers, count = _kind(rows, data.get("columns"), tokens, most)
    width = hidden_size(model)
    plans: dict[str, Planned] = {}

    def peak(choice: Choice) -> int:
        plain = plans.get(repr(replace(choice, quantize=None)))
        known = None if plain is None else plain.estimate
        found = planned(parse(_recipe(choice, model, data, count)), where, plain=known)
        plans[repr(choice)] = found
        return found.estimate.fullest_bytes

    room = 2**30 * memory if memory else gpu_memory("with --memory") if where == "cuda" else free_host_memory()
    first = judged(findings(), width) if _epochs(count) == 1 else []
    recorded = ranked(findings(), answers, width)
    last = on_nf4(recorded) if where == "cuda" and not stored_quantisation(model) else []
    choice, needed = first_that_fits([*first, *recorded, *last], peak, room)
    found, file = plans[repr(choice)], _recipe(choice, model, data, count)
    prior = found.job.training
    file["train"]["learning_rate"], said = rate(choice, width, prior.learning_rate, prior.lr_source)
    lines = _reasons(choice, found, said, _memory(needed, room, where), count)
    if choice.quantize:
        lines["base"] = f"quantised to {choice.quantize} while it is loaded: as it is, nothing fits; not in any record"
    if against := caution(findings(), choice, file["train"]["epochs"]):
        lines["caution"] = against
    if out is not None:
        _write(out, file, lines)
    if as_json:
        told = {"recipe": file, "reasons": lines, "peak_bytes": needed, "trainable": found.estimate.trainable}
        say(json.dumps({**told, "learning_rate": file["train"]["learning_rate"], "prior": prior.learning_rate}))
        return
    for name, line in lines.items():
        say(f"{name:18} {line}")
    say(f"\n`loralign plan`: {trained(found)}")
    say("\n".join(costs(found)))
    if out is not None:
        say(f"Written: {out}; train it with `loralign train {out}`")


def _recipe(choice: Choice, model: str, data: dict[str, Any], count: int) -> dict[str, Any]:
    """The recipe file, as plain data; data: its section of that name."""
    f = choice.finding
    scale = {} if f.alpha is None else {"alpha": f.alpha}
    options = {"options": f.options} if f.options else {}
    base = {"quantize": choice.quantize} if choice.quantize else {}
    return {
        "model": model,
        "data": data,
        "method": choice.method,
        "rank": choice.rank,
        **base,
        **scale,
        **options,
        "train": {"epochs": _epochs(count), "gradient_checkpointing": choice.checkpointing},
        "output": "runs/suggested",
    }


def _reasons(choice: Choice, found: Planned, rate: str, memory: str, count: int) -> dict[str, str]:
    """A line for each part of the recipe."""
    recipe = found.job.recipe
    record = choice.record
    return {
        "method": f"{choice.method}, rank {choice.rank}: {choice.reason}",
        "rests on": f"{record}: a small model, few steps; `loralign compare` on your rows tells for yours",
        "scale": f"s = {recipe.s():.3g}" if hasattr(recipe, "s") else "",
        "learning rate": rate,
        "length of the run": f"epochs: {_epochs(count)}" + (f" of {count:,} rows" if count else ""),
        "memory": memory + (", activations recomputed" if choice.checkpointing else ""),
    }


def _kind(rows: str | None, columns: dict[str, str] | None, tokens: int | None, length: int) -> tuple[bool, int]:
    """Whether the rows have answers, and how many there are; without rows: text, as many as so many tokens fill."""
    if rows is None:
        return False, math.ceil(tokens / length) if tokens else 0
    from loralign.data.rows import read_named, rows_format

    found = read_named(rows, columns)
    return rows_format(found) != "text", len(found)


def _epochs(count: int) -> int:
    return min(3, max(1, math.ceil(STEPS * 16 / count))) if count else 1


def _memory(needed: float, room: float, where: str) -> str:
    """In the units of `--memory` and of `plan`."""
    return f"{needed / 2**30:.2f} GiB ({needed / 1e9:.2f} GB) of {room / 2**30:.1f} GiB on {where}"


def _write(out: Path, file: dict[str, Any], lines: dict[str, str]) -> None:
    import yaml

    parts = [f"{name}: {line}" for name, line in lines.items() if line]
    rows = [row for part in parts for row in textwrap.wrap(part, 116, subsequent_indent="  ", break_on_hyphens=False)]
    said = "".join(f"# {row}\n" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, said + yaml.safe_dump(file, sort_keys=False, allow_unicode=True))
