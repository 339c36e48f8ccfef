"""`loralign expand`: a compact file back to the plain adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralign.cli.run import say


def expand(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="compact/compact.safetensors of an exported folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Write the plain adapter that a compact file stands for, bit for bit."""
    from loralign.io.compact import expand as write

    count = write(file, out)
    say(f"Written: {out} ({count} modules)")
