"""How the base of an adapter is loaded: as in training, which its folder records, unless somebody says otherwise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open

from loralign.carrier.quantise import Quantize, check_device, kind_of
from loralign.io.folder import PROBES
from loralign.train.begun import read_begun
from loralign.train.checkpoint import BEGUN
from loralign.train.model import stored_quantisation
from loralign.types import LoralignError

log = logging.getLogger("loralign")

AS_IT_IS = "none"
"""In place of a kind: the base as its files are."""


def kind_for(folder: Path, base: str, revision: str | None = None, asked: str | None = None) -> Quantize | None:
    """How to quantise `base` while it is loaded for the adapter in `folder`; a base that is stored quantised is not.

    asked: a kind, or "none"; None: as the folder records.
    Raises:
        LoralignError: no such kind, a record that cannot be read, a kind that does not run here.
    """
    kinds = get_args(Quantize)
    if asked is not None:
        if asked not in (*kinds, AS_IT_IS):
            raise LoralignError(f"`--quantize {asked}`: choose {', '.join(kinds)} or {AS_IT_IS}")
        return next((kind for kind in kinds if kind == asked), None)
    found = _recorded(folder)
    if found is None or stored_quantisation(base, revision=revision):
        return None
    mend = f"say `--quantize {AS_IT_IS}` for the base as it is, on which the adapter computes something near"
    check_device(found, "cuda" if torch.cuda.is_available() else "cpu", mend)
    log.info("the base is quantised while it is loaded, as in training: %s (`--quantize` says otherwise)", found)
    return found


def _recorded(folder: Path) -> Quantize | None:
    """The kind in the record of an export, or of the run that a checkpoint is of."""
    if (folder / PROBES).is_file():
        return kind_of(_proven(folder)["quantization"])
    checkpoints = folder.resolve().parent
    if (checkpoints / BEGUN).is_file():
        said = read_begun(checkpoints.parent).settings.get("quantize")
        return next((kind for kind in get_args(Quantize) if repr(kind) == said), None)
    return None


def _proven(folder: Path) -> dict[str, Any]:
    """How the stored logits were computed."""
    try:
        with safe_open(folder / PROBES, framework="pt") as file:
            how = json.loads((file.metadata() or {})["loralign"])
            return {"quantization": how["quantization"]}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoralignError(
            f"{PROBES} in {folder}, which says how the base was loaded, is damaged: copy it again, or say "
            f"`--quantize {AS_IT_IS}` if the base was loaded as it is"
        ) from error
