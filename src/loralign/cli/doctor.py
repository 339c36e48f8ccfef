"""`loralign doctor`: what is installed, and whether it works together."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from loralign.carrier.slot_check import self_test
from loralign.types import LoralignError


def diagnose() -> tuple[list[str], bool]:
    """What is installed and whether it works: lines, and whether all is well."""
    found = [_requirement(Requirement(text)) for text in requires("loralign") or ()]
    lines, healthy = [line for line, _ in found if line], all(ok for _, ok in found)
    lines += _devices()
    try:
        self_test()
        lines.append("ok     adapter layers: forward, merge and save agree")
    except (LoralignError, RuntimeError, AttributeError, TypeError) as error:
        lines.append(f"WRONG  adapter layers: {error}")
        healthy = False
    return [*lines, "All is well." if healthy else "Something is wrong, see the lines above."], healthy


def _requirement(wanted: Requirement) -> tuple[str, bool]:
    """A line about one requirement; those of extras may be missing."""
    extra = re.search(r'extra == "(\w+)"', str(wanted.marker or ""))
    if extra and extra.group(1) == "dev":
        return "", True
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        mend = (
            f"pip install 'loralign[{extra.group(1)}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
        )
        return f"{'absent' if extra else 'WRONG '} {wanted.name}: {mend}", extra is not None
    if not wanted.specifier.contains(installed, prereleases=True):
        return f"WRONG  {wanted.name} {installed}: loralign is tested with {wanted.specifier}", False
    return f"ok     {wanted.name} {installed}", True


def _devices() -> list[str]:
    lines = [f"ok     CPU: {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(f"ok     GPU {i}: {p.name}, {p.total_memory / 1e9:.0f} GB, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("ok     MPS (not tested)")
    return lines
