"""A long collection that was stopped goes on where it was: tensors and a step number, kept beside the cache file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loralign.evidence.ranks import from_rank_0, rank, same_everywhere
from loralign.maths.whole import replacing

log = logging.getLogger("loralign")

EVERY_S = 120.0
"""Between two writes; the state of an 8B model at rank 128 is 4 GB."""
FACTS = ("step", "tokens", "micro_batches")


class Partial:
    """path: None where nothing is kept. Rank 0 reads and writes, all ranks go on from its values."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._written = path, time.monotonic()

    def due(self) -> bool:
        return bool(self.path) and time.monotonic() - self._written >= EVERY_S

    def keep(self, tensors: Mapping[str, Tensor], facts: Mapping[str, int]) -> None:
        """Replace what was kept; called between two steps."""
        if self.path is not None and rank() == 0:
            on_disk = {k: t.detach().contiguous() for k, t in tensors.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                save_file(on_disk, temporary, metadata={k: str(facts[k]) for k in FACTS})
        self._written = time.monotonic()

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
        """Fill the tensors with what was kept and return the facts; None where there is nothing to go on from."""
        facts = same_everywhere(self._read(tensors) if self.path is not None and rank() == 0 else None)
        if facts is not None:
            for t in tensors.values():
                t.copy_(from_rank_0(t))
            log.info("evidence: goes on after step %d of a run that was stopped", facts["step"])
        return facts

    def _read(self, tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
        assert self.path is not None
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as f:
                facts = {k: int(f.metadata()[k]) for k in FACTS}
                read = {key: f.get_tensor(key) for key in tensors}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("the stopped evidence %s cannot be read (%s): it starts again", self.path.name, error)
            return None
        for key, t in tensors.items():
            t.copy_(read[key])
        return facts

    def done(self) -> None:
        if self.path is not None and rank() == 0:
            self.path.unlink(missing_ok=True)


def adam_state(optimizer: torch.optim.Optimizer, moving: Sequence[Tensor]) -> dict[str, Tensor]:
    """The factors and their moments by name; created where no step has been taken. All are changed in place."""
    named: dict[str, Tensor] = {}
    for i, p in enumerate(moving):
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        named |= {f"{i}|{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")} | {f"{i}|factor": p}
    return named
