"""Arguments and options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file; may be repeated.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `train`, `init` or `export` wrote.")]
Base = Annotated[str | None, typer.Option(help="Folder or hub id of the base model; default: what the adapter names.")]
Quantise = Annotated[
    str | None,
    typer.Option("--quantize", help="The base while it is loaded: nf4, int8, none; default: as trained."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
