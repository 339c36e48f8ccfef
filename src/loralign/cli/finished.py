"""`loralign export`, `verify`, `eval` and `generate`: what is done with a finished adapter."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loralign.cli.parameters import AsJson, Base, Folder, Quantise
from loralign.cli.run import progress, say


class Profile(StrEnum):
    peft = "peft"
    portable = "portable"
    gguf = "gguf"
    merged = "merged"


class Store(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    profile: Annotated[
        Profile,
        typer.Option(help="peft; portable: for vLLM; gguf: for llama.cpp, Ollama; merged: no adapter."),
    ] = Profile.peft,
    base: Base = None,
    quantize: Quantise = None,
    dtype: Annotated[Store | None, typer.Option(help="Of the stored factors; default: float32.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Truncate to this rank; the loss is stated.")] = None,
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="Pad the rank of `portable`.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result, write beside other files.")
    ] = False,
) -> None:
    """Write a trained adapter in another form, exact or with its loss stated."""
    import torch

    from loralign.cli.run import opened
    from loralign.io.card import read_card
    from loralign.io.export import export as write
    from loralign.train.use import has_tokenizer

    model, tokenizer, named = opened(folder, base, quantize, out)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype.value)} if dtype else {}
    own = profile.value == "merged" or has_tokenizer(folder)
    report = write(
        model, out, profile=profile.value, max_rank=max_rank, power_of_two=power_of_two, overwrite=overwrite,
        tokenizer=tokenizer if own else None, card=read_card(folder, named["base_id"]), **named, **options,
    )  # fmt: skip
    for line in report.lines():
        say(line)
    say(f"Written: {out}")


def verify(folder: Folder, base: Base = None) -> None:
    """Reload an exported folder in a clean process; its logits must be the stored ones (else exit 3)."""
    from loralign.io.verify import verify as check

    say(check(folder, base).line())


def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Rows with answers: a file, a folder or a hub id.")],
    base: Base = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Names of columns, as `data.columns` has them; default: those of the adapter's training."),
    ] = None,
    quantize: Quantise = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Exact match of greedy answers on held-out rows, by the adapter and by its base."""
    from loralign.config.sources import columns_of
    from loralign.train.use import evaluate as measure

    names = None if columns is None else columns_of(columns)
    with progress() as report:
        found = measure(
            folder,
            data,
            base=base,
            columns=names,
            quantize=quantize,
            limit=limit,
            max_new_tokens=max_new_tokens,
            progress=report,
        )
    if as_json:
        say(json.dumps(found))
        return
    for name, value in found.items():
        say(f"{name}: {value:.4g}")


def generate(
    folder: Folder,
    prompt: Annotated[list[str], typer.Option(help="A user's turn; may be repeated.")],
    base: Base = None,
    quantize: Quantise = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
) -> None:
    """One greedy answer per prompt."""
    from loralign.train.use import generate as answer

    for text in answer(folder, prompt, base=base, quantize=quantize, max_new_tokens=max_new_tokens):
        say(text)
