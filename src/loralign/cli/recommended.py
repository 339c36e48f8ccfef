"""A recipe file with `method: recommended` as one that names its method, for the model and the memory at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralign.cli.machine import device_here, gpu_memory
from loralign.config.recipe import RunFile, parse
from loralign.io.host import host_memory
from loralign.plan import recommended as rule
from loralign.types import LoralignError

CHOSEN = ("rank", "alpha", "ranks", "preset")


def asks(content: Mapping[str, Any]) -> bool:
    method = content.get("method")
    return isinstance(method, str) and method.strip().lower() == rule.NAME


def resolved(
    content: Mapping[str, Any],
    name: str,
    *,
    device: str = "auto",
    spread: tuple[int, bool] | None = None,
    resume: bool = False,
) -> tuple[RunFile, str]:
    """The file as it is run, and why so.

    content: as it stands in a file; its `options.memory` is the memory of one device in GiB, omitted: this machine's.
    spread: over how many GPUs, and whether by FSDP2; None: as `accelerate launch` spreads this process's run.
    resume: the run in its output goes on with what it began with, whatever this machine's memory is.
    Raises:
        LoralignError: the file sets what the name chooses, its rows repeat, or nothing fits.
    """
    from loralign.cli.plan import planned
    from loralign.plan.several import Layout
    from loralign.train.job import USUAL_LENGTH
    from loralign.train.model import described, hidden_size, row_length

    rule.check_alone(content, CHOSEN)
    memory = _memory_option(content.get("options"))
    plain = {key: value for key, value in content.items() if key not in ("options", *CHOSEN)}
    files = {rank: parse({**plain, "method": rule.METHOD, "rank": rank}, name) for rank in rule.RANKS}
    file = files[rule.RANKS[0]]
    rule.check_passes(file.train.epochs or 1.0)
    rule.check_mix(file.data.mix)
    if resume and (begun := _begun_with(Path(file.output).expanduser())) in files:
        return files[begun], f"{rule.NAME}: {rule.METHOD}, rank {begun}, as the run began"
    where = device_here(device)
    layout = Layout(*(spread or _launched()))
    room = 2**30 * memory if memory else _all_memory(where)
    place: dict[str, Any] = {"revision": file.revision, "trust_remote_code": file.trust_remote_code}
    most = row_length(described(file.model, **place), file.model, file.data.max_length, "data.max_length", USUAL_LENGTH)
    data = file.data.model_copy(update={"max_length": most})  # settled and said once, for all ranks
    files = {rank: each.model_copy(update={"data": data}) for rank, each in files.items()}

    def peak(rank: int) -> int:
        return planned(files[rank], where, layout).estimate.fullest_bytes

    width = hidden_size(file.model, **place)
    rank, needed = rule.first_that_fits(rule.ranks(width), peak, room)
    return files[rank], rule.said(rank, needed, room)


def _memory_option(options: Any) -> float | None:
    if options in (None, {}):
        return None
    if not isinstance(options, Mapping) or set(options) != {"memory"}:
        raise LoralignError(f"`method: {rule.NAME}` has one option, `memory` in GiB: leave the others out")
    memory = options["memory"]
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < 1e6:
        raise LoralignError("`options.memory` is the memory of one device in GiB, a number above 0")
    return float(memory)


def _begun_with(output: Path) -> int:
    """The rank that the run in a folder began with; 0: none is known."""
    from loralign.train.begun import read_begun

    try:
        return int(read_begun(output).settings["rank"])
    except (LoralignError, KeyError, ValueError):
        return 0


def _launched() -> tuple[int, bool]:
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    return gpus, gpus > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _all_memory(where: str) -> float:
    """All of it, not what is free: an interrupted run is chosen the same again."""
    return gpu_memory("in GiB with `--set options.memory=80`") if where == "cuda" else host_memory()
