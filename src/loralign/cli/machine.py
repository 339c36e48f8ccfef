"""The device at hand, and its memory."""

from __future__ import annotations


def device_here(device: str) -> str:
    """cuda or cpu, of auto too."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def gpu_memory(mend: str) -> float:
    """All bytes of the first GPU; without one it is said, with `mend`."""
    import torch

    from loralign.types import LoralignError

    if not torch.cuda.is_available():
        raise LoralignError(f"there is no GPU here: say its memory {mend}")
    return float(torch.cuda.get_device_properties(0).total_memory)
