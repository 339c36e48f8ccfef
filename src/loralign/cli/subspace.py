"""`loralign subspace extract | show`: the directions that several adapters or checkpoints share, as a basis file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralign.cli.run import progress, say

app = typer.Typer(
    name="subspace",
    help="Directions that several adapters or checkpoints share; `cora` and `cora-init` start from them.",
)


@app.command(epilog="Example: loralign subspace extract runs/a runs/b --out shared.safetensors")
def extract(
    sources: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of adapters or of checkpoints.")],
    out: Annotated[Path, typer.Option(help="Basis file to write.")],
    base: Annotated[
        str | None, typer.Option(help="Checkpoint that the sources were fine-tuned from; their deltas are compared.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Leading directions taken from each source.")] = 32,
) -> None:
    """Find what the sources share, one matrix at a time, and write it for `options.sources` of a recipe."""
    from loralign.evidence.subspace import extract as compare
    from loralign.evidence.subspace import show_basis, write_basis
    from loralign.io.folder import check_place, writing
    from loralign.types import LoralignError

    if out.is_dir():
        raise LoralignError(f"{out} is a folder: name a file, such as {out / 'basis.safetensors'}")
    check_place(out.absolute().parent)
    with progress() as bars:
        basis = compare(sources, base=base, width=width, progress=bars)
    with writing(out):
        write_basis(out, basis)
    say(show_basis(basis))
    say(f"Written: {out}")


@app.command(epilog="Example: loralign subspace show shared.safetensors --rank 8")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A basis file that `extract` wrote.")],
    rank: Annotated[int, typer.Option(min=1, help="State the share of this direction beside the first.")] = 16,
) -> None:
    """What a basis file holds: per module and side how many directions are shared, and how much."""
    from loralign.evidence.subspace import read_basis, show_basis

    say(show_basis(read_basis(file), rank))
