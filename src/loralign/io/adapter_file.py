"""The two files of a plain adapter: the config that stock PEFT reads, and the tensors under stock names.

Keys of `rank_pattern` and `alpha_pattern` are anchored full names (PEFT takes the first key for which
`(.*\\.)?(key)$` matches, and ignores keys that match nothing), and `target_modules` are short names with exceptions in
`exclude_modules` where that is the shorter list. `checked` asks PEFT's own matching for every module of the base: a
config that would adapt other modules, or with another rank or scale, is never written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loralign.carrier.sites import beside
from loralign.carrier.targets import PREFIX, anchored, by_weight
from loralign.io.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loralign.io.json_file import read_json
from loralign.io.layout import Stored
from loralign.types import LoralignError, WorkFailed

_CLASSIC = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias"),
    *("use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out"),
}
"""What readers of any age look for."""


def base_modules(model: PeftModel) -> list[str]:
    """Names of the modules as the untouched base model has them."""
    names: list[str] = []
    inside: list[str] = []
    for name, module in model.get_base_model().named_modules():
        if not name or any(name.startswith(outer) for outer in inside):
            continue
        names.append(name)
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            inside.append(name + ".")
    return names


def other_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What is stored besides the factors, under PEFT's names: modules that trained whole, wrapped by PEFT or not."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    found = {k: v for k, v in state.items() if not re.search(r"\.lora_[A-Za-z]", k)}
    base = model.get_base_model()
    for name in trained_modules(model):
        found |= {f"{PREFIX}{name}.{k}": v for k, v in base.get_submodule(name).state_dict().items()}
    return {k: v.detach().cpu() for k, v in found.items()}


def trained_modules(model: PeftModel) -> list[str]:
    """Modules of the base that train unwrapped (norms, an embedding), which `modules_to_save` can bring back.

    Raises LoralignError for tensors that no adapter file can hold.
    """
    base, alone = model.get_base_model(), beside(model)
    modules = dict(base.named_modules())
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in alone))
    shared: dict[int, int] = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    for name, parameter in alone.items():
        owner = name.rpartition(".")[0]
        whole = owner and not isinstance(modules[owner], LoraLayer) and not any(modules[owner].children())
        if not whole or shared[id(parameter)] > 1 or any(n.endswith(owner) and n not in owners for n in modules):
            raise LoralignError(
                f"{name} trains beside the adapter, and no adapter file can hold it: freeze it (requires_grad = False)"
            )
    return owners


def check_supported(config: LoraConfig) -> None:
    """Raise where the adapter holds more than factors and full modules can say."""
    more = {
        "use_dora": bool(config.use_dora),
        "bias": config.bias != "none",
        "lora_bias": bool(config.lora_bias),
        "target_parameters": any(not name.endswith(".weight") for name in config.target_parameters or ()),
        "layer_replication": bool(config.layer_replication),
        "trainable_token_indices": bool(config.trainable_token_indices),
    }
    for key, present in more.items():
        if present:
            raise LoralignError(f"the adapter uses PEFT's `{key}`, which loralign does not export: use save_pretrained")


def adapter_config(
    model: PeftModel, adapter: str, stored: Mapping[str, Stored], *, portable: bool, base: str, revision: str | None
) -> LoraConfig:
    """The config of these factors: r and alpha of the largest site, patterns for the others."""
    trained = model.peft_config[adapter]
    names = base_modules(model)
    R, alpha = max((s.rank, s.alpha) for s in stored.values())
    indirect = by_weight(model.get_base_model(), stored)
    weights = [f"{n}.weight" for n in indirect] or None
    named = {n: s for n, s in stored.items() if n not in indirect}
    common = {
        "r": R,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {anchored(n, weights): s.rank for n, s in stored.items() if s.rank != R},
        "alpha_pattern": {anchored(n, weights): _plain(s.alpha) for n, s in stored.items() if s.alpha != alpha},
        "lora_dropout": 0.0 if portable else trained.lora_dropout,
        "bias": "none",
        "target_parameters": weights,
        "modules_to_save": None if portable else [*(trained.modules_to_save or ()), *trained_modules(model)] or None,
        "fan_in_fan_out": trained.fan_in_fan_out,
        "task_type": trained.task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    for targets, exclude in _targets(set(named), names):
        config = LoraConfig(**common, target_modules=targets, exclude_modules=exclude or None)
        if not mismatches(config, names, named):
            return config
    raise LoralignError(
        f"no `target_modules` names exactly these {len(stored)} modules: {mismatches(config, names, named)[0]}"
    )


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def _targets(found: set[str], names: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Ways to name the sites, the tidiest first: (target_modules, exclude_modules)."""
    short = sorted({n.rsplit(".", 1)[-1] for n in found})
    exclude = sorted(n for n in names if n not in found and n.rsplit(".", 1)[-1] in short)
    ways = [(short, exclude), (sorted(found), [])]
    return ways if len(exclude) <= len(found) else ways[::-1]


def mismatches(config: LoraConfig, names: Iterable[str], stored: Mapping[str, Stored]) -> list[str]:
    """Where stock PEFT, reading this config, would do something else than these factors say."""
    found = []
    for name in names:
        if bool(check_target_module_exists(config, name)) != (name in stored):
            found.append(f"{name} would {'not ' if name in stored else ''}be adapted")
        elif name in stored:
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
            if (rank, float(alpha)) != (stored[name].rank, float(stored[name].alpha)):
                found.append(f"{name} would get rank {rank} and alpha {alpha}")
    return found


def write_adapter(
    folder: Path, config: LoraConfig, stored: Mapping[str, Stored], others: Mapping[str, Tensor], model: PeftModel
) -> None:
    """Both files; then the tensors are read back and compared with what was meant."""
    tensors = {f"{PREFIX}{n}.lora_{side}.weight": t for n, s in stored.items() for side, t in (("A", s.A), ("B", s.B))}
    tensors = {k: v.contiguous() for k, v in {**tensors, **others}.items()}
    seen: set[int] = set()
    for key, tensor in tensors.items():  # safetensors refuses aliases
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base = type(model.get_base_model())
    auto = {"base_model_class": base.__name__, "parent_library": base.__module__} if config.task_type is None else None
    config.save_pretrained(str(folder), auto_mapping_dict=auto)
    _tidy(folder / ADAPTER_CONFIG)
    _read_back(folder / ADAPTER_WEIGHTS, tensors)


def _tidy(path: Path) -> None:
    """Lists sorted (PEFT keeps sets), and without fields at their defaults that only recent versions of PEFT know."""
    fields = read_json(path)
    plain = LoraConfig().to_dict()
    fields = {
        k: sorted(v) if isinstance(v, list) else v for k, v in fields.items() if k in _CLASSIC or v != plain.get(k)
    }
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for name, meant in tensors.items():
            if name not in keys or tuple(file.get_slice(name).get_shape()) != tuple(meant.shape) or not meant.numel():
                raise WorkFailed(f"{name} was not written as meant to {path.name}: is the disk healthy?")
            if not torch.equal(file.get_tensor(name), meant):
                raise WorkFailed(f"{name} in {path.name} differs from what was written: is the disk healthy?")
