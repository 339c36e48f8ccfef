"""Which modules of a model a recipe adapts: `targets` and `exclude` resolved to names, and what they name in vain.

targets   "all-linear" (every linear layer but heads, fused experts and what PEFT cannot adapt), endings of module
          names, or a regular expression for whole names
exclude   endings of names, of a linear layer or of a module around it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralign.carrier.abilities import fresh_heads, output_head
from loralign.types import LoralignError

PREFIX = "base_model.model."
ALL = "all-linear"
READ = ("x_proj", "dt_proj")
"""Layers of a state-space mixer whose weight its kernels take, besides those that PEFT knows."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with a weight matrix that LoRA can adapt, by its name in the base model."""
    wrapped = [f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    plain = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if ".lora_" not in n}
    return {n: m for n, m in plain.items() if _is_linear(m) and not any(n.startswith(w) for w in wrapped)}


def _is_linear(module: nn.Module) -> bool:
    quantised = type(module).__name__ in ("Linear4bit", "Linear8bitLt", "HQQLinear", "QuantLinear")
    return isinstance(module, nn.Linear | Conv1D) or quantised


def matches(name: str, key: str) -> bool:
    """key: a module's name or its ending."""
    return name == key or name.endswith("." + key)


def _within(name: str, key: str) -> bool:
    """key: the name or ending of the module or of one around it."""
    return f".{key}." in f".{name}."


def inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def expert_blocks(model: nn.Module) -> set[str]:
    """Modules that hold fused experts, (experts, d_out, d_in) parameters; with their routers and shared experts.

    A pair (A, B) adapts one matrix: "all-linear" leaves these blocks as they are, `skipped` lists them.
    """
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name and ".lora_" not in name:
            owner = name.removeprefix(PREFIX).replace(".base_layer", "").rpartition(".")[0]
            found.add(owner.rpartition(".")[0] if owner.endswith("experts") else owner)
    return found


def chosen(model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The linear layers of a base model that are to be adapted, by name.

    Raises LoralignError for names that match nothing, with the names there are.
    """
    linear = linear_modules(model)
    _check_exclude(model, exclude)
    wanted = _wanted(model, linear, targets)
    heads = fresh_heads(model)
    found = {n: linear[n] for n in wanted if not inside(f"{n}.", heads) and not any(_within(n, e) for e in exclude)}
    if not found:
        why = "; all that match are fresh heads, which train whole, or in `exclude`" if wanted else _known(linear)
        raise LoralignError(f"no module matches targets {targets!r}{why}")
    if targets != ALL:
        _check_adaptable(model, found)
    return found


def _wanted(model: nn.Module, linear: dict[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    if targets == ALL:
        head, blocks = output_head(model), expert_blocks(model)
        plain = [n for n, m in linear.items() if m is not head and not inside(n, blocks)]
        return [n for n in plain if not refusal(model, n)]
    if isinstance(targets, str) and (by_pattern := _by_pattern(linear, targets)):
        return by_pattern
    keys = [key.strip() for key in targets.split(",")] if isinstance(targets, str) else list(targets)
    vain = [key for key in keys if not any(matches(n, key) for n in linear)]
    if vain:
        _explain(model, linear, targets, keys, vain)
    return [n for n in linear if any(matches(n, key) for key in keys)]


def _by_pattern(linear: dict[str, nn.Module], pattern: str) -> list[str]:
    try:
        return [n for n in linear if re.fullmatch(pattern, n)]
    except re.error:
        return []


def _explain(
    model: nn.Module, linear: dict[str, nn.Module], targets: Any, keys: Sequence[str], vain: Sequence[str]
) -> None:
    """Raise for keys that no linear layer matches."""
    others = {key: type(m).__name__ for key in vain for n, m in model.named_modules() if matches(n, key)}
    if others:
        key, kind = next(iter(others.items()))
        raise LoralignError(
            f"targets {targets!r} names {key!r}, a {kind}, which is no linear layer (fused experts are not supported): "
            "leave it out of `targets`"
        )
    if len(vain) == len(keys):
        raise LoralignError(f"no module matches targets {targets!r}{_known(linear)}")
    raise LoralignError(f"`targets` names {', '.join(map(repr, vain))}, which no module here ends with{_known(linear)}")


def _known(linear: dict[str, nn.Module]) -> str:
    names = sorted({n.rsplit(".", 1)[-1] for n in linear})
    return f"; linear modules here: {names} ({ALL}: all but heads)"


def _check_exclude(model: nn.Module, exclude: Sequence[str]) -> None:
    names = [n.removeprefix(PREFIX).replace(".base_layer", "") for n, _ in model.named_modules()]
    vain = [key for key in exclude if not any(matches(n, key) for n in names)]
    if vain:
        said, known = ", ".join(map(repr, vain)), _known(linear_modules(model))
        raise LoralignError(f"`exclude` names {said}, which no module here ends with{known}")


def refusal(model: nn.Module, name: str) -> str:
    """Why a linear layer of this name can't be adapted, "" where it can: PEFT's own rule, and what it leaves out."""
    mixer, _, last = name.rpartition(".")
    kind = getattr(getattr(model, "config", None), "model_type", "")
    why = f"the kernels of {kind} read its weight past any adapter"
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, last)
    except ValueError:
        return why
    return why if last in READ and hasattr(model.get_submodule(mixer), "A_log") else ""


def by_weight(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules that PEFT reaches by their weight alone: in some mixtures it takes their names for the fused experts'."""
    names = list(names)
    last = {n.rpartition(".")[2] for n in names}
    fused = {name for name in last if not _stays(model, name)}
    return [n for n in names if n.rpartition(".")[2] in fused]


def _stays(model: nn.Module, target: str) -> bool:
    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one half of a fused pair
        return False
    return target in (config.target_modules or ())


def anchored(name: str, weights: Iterable[str] | None = None) -> str:
    """The key of `rank_pattern` for one module; weights: `target_parameters` of the config."""
    found = f"{name}.weight" in (weights or ())
    return f"^{re.escape(name)}{'([.]weight)?' if found else ''}$"


def _check_adaptable(model: nn.Module, found: dict[str, nn.Module]) -> None:
    for name in found:
        if why := refusal(model, name):
            raise LoralignError(f"{name} can't be adapted ({why}): name {name.rpartition('.')[2]!r} in `exclude`")


def strangers(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Modules that PEFT would adapt too, because their names end with one that was chosen."""
    names = set(found)
    parts = ((n, n.split(".")) for n, _ in model.named_modules() if n not in names)
    return [n for n, p in parts if any(".".join(p[i:]) in names for i in range(1, len(p)))]


def ranks_of(linear: Iterable[str], r: int, ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of every module: r, or that of the last key of `ranks` that it ends with."""
    names = list(linear)
    vain = [key for key in ranks if not any(matches(n, key) for n in names)]
    if vain:
        said = ", ".join(map(repr, vain))
        raise LoralignError(f"`ranks` names {said}, which no adapted module ends with{_known(dict.fromkeys(names))}")  # type: ignore[arg-type]
    return {n: next((ranks[key] for key in reversed(list(ranks)) if matches(n, key)), r) for n in names}
