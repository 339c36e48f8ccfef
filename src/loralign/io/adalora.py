"""An adapter folder of PEFT's AdaLoRA as plain LoRA, which PEFT itself does not convert.

    ΔW = alpha/(r_init + 1e-5)·B·diag(E)·A   ->   s·(B·diag(E))·A without the slots whose E is zero

Shapes:  A (r, d_in) · B (d_out, r) · E (r, 1); r differs by module, modules without a slot are left out
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from loralign.carrier.sites import exact_alpha
from loralign.carrier.stored import CONFIG, WEIGHTS, out_of_memory
from loralign.carrier.targets import PREFIX
from loralign.io.json_file import read_json
from loralign.types import LoralignError


def is_adalora(folder: Path) -> bool:
    """Whether PEFT's AdaLoRA wrote this folder."""
    try:
        found = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("peft_type") == "ADALORA"


def write_plain(folder: Path, out: Path) -> None:
    """Write the adapter of `folder` into `out` as plain LoRA. Raises LoralignError for a folder that is damaged."""
    try:
        config = read_json(folder / CONFIG)
        state = load_file(folder / WEIGHTS)
        r_init, alpha = int(config["init_r"]), float(config["lora_alpha"])
        factors = _folded(state)
    except Exception as error:  # whatever a damaged file makes of numbers and shapes
        if out_of_memory(error):
            raise
        raise LoralignError(
            f"{folder.name} is no whole AdaLoRA adapter ({type(error).__name__}): copy it again"
        ) from error
    if not factors:
        raise LoralignError(f"{folder.name} has no slot that is not zero: there is nothing to export")
    s, R = (alpha if alpha > 0 else r_init) / (r_init + 1e-5), max(len(A) for A, _ in factors.values())
    odd = {n: len(A) for n, (A, _) in factors.items() if len(A) != R}
    kept = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "fan_in_fan_out")
    made = {
        **{key: config.get(key) for key in kept},
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": exact_alpha(s, R),
        "target_modules": sorted(factors),
        "rank_pattern": {f"^{re.escape(n)}$": r for n, r in odd.items()},
        "alpha_pattern": {f"^{re.escape(n)}$": exact_alpha(s, r) for n, r in odd.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (out / CONFIG).write_text(json.dumps(made), encoding="utf-8")
    rest = {key: value for key, value in state.items() if not re.search(r"\.lora_[A-Z]$", key)}
    for name, (A, B) in factors.items():
        rest |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    save_file(rest, out / WEIGHTS, metadata={"format": "pt"})


def _folded(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B·diag(E)) by module, fp32."""
    found: dict[str, Any] = {}
    for key, E in state.items():
        if not key.endswith(".lora_E"):
            continue
        head = key.removesuffix(".lora_E")
        on = E.flatten() != 0
        A, B = state[f"{head}.lora_A"].float()[on], (state[f"{head}.lora_B"].float() * E.flatten().float())[:, on]
        if bool(on.any()):
            found[head.removeprefix(PREFIX)] = (A.contiguous(), B.contiguous())
    return found
