"""What a stored adapter must be before anything computes with it; `verify` asks the same of it.

    read_config     adapter_config.json: plain LoRA, every field of a kind that PEFT acts on as it stands
    check_stored    adapter_model.safetensors by its header: floating pairs A and B of the ranks that the config says
    read_tensors    the same, read: whole and finite
    load_adapter    stock PEFT on a base: every stored tensor arrives, none is missing

Nothing here imports loralign, nothing is unpickled and no hub is asked: a file that is not in the folder is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import runpy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

within = runpy.run_path(str(Path(__file__).parents[1] / "maths" / "deadline.py"))["within"]  # also without the package

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MATCHING_S = 5.0  # for a pattern over all modules of a model
MOST = {**dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 10_000), "vocab_size": 10**8}
COUNTS = (*MOST, "hidden_size")
MEND = "copy or export the adapter again"


class BadInput(Exception):
    """Something that is not there, or is no adapter."""


class Broken(Exception):
    """An adapter that is damaged or computes something else."""


# -------------------------------------------------------------------------------------------------------------- config


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < math.inf


def _names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(n, str) and n for n in x)


def _pattern(value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or (isinstance(x, dict) and all(isinstance(k, str) and value(v) for k, v in x.items()))


_NEEDED = ("r", "lora_alpha", "target_modules")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_count, "a whole number from 1"),
    "lora_alpha": (_number, "a finite number"),
    "target_modules": (lambda x: bool(x) and (isinstance(x, str) or _names(x)), "names of modules or a pattern"),
    "exclude_modules": (lambda x: x is None or isinstance(x, str) or _names(x), "names of modules or a pattern"),
    "modules_to_save": (lambda x: x is None or _names(x), "names of modules"),
    "rank_pattern": (_pattern(_count), "a table of whole numbers from 1"),
    "alpha_pattern": (_pattern(_number), "a table of finite numbers"),
    "lora_dropout": (lambda x: _number(x) and 0 <= x < 1, "a share below 1"),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), (lambda x: x is None or isinstance(x, bool), "true or false")),
    "target_parameters": (
        lambda x: not x or (_names(x) and all(n.endswith(".weight") for n in x)),
        "weights of linear layers",
    ),
    **dict.fromkeys(("base_model_name_or_path", "revision"), (lambda x: x is None or isinstance(x, str), "a name")),
}
_PLAIN = {"bias": "none", "use_dora": False, "lora_bias": False}
_ABSENT = (
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora"),
    *("arrow_config", "megatron_config", "velora_config", "kasa_config", "monteclora_config", "use_bdlora"),
)
_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Values of `init_lora_weights` by which a reader leaves the base as it is."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a plain LoRA adapter, checked one by one."""
    path = folder / CONFIG
    if not is_file(path):
        raise BadInput(f"{shown(folder)} is no adapter folder: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Broken(f"{shown(path)} is damaged ({first_line(error)}): {MEND}") from error
    if not isinstance(config, dict):
        raise Broken(f"{shown(path)} is damaged (it holds no table): {MEND}")
    if config.get("peft_type") != "LORA":
        raise Broken(f"{shown(path)} says peft_type {short(config.get('peft_type'))}: only LORA adapters are read here")
    for key, (fine, wanted) in _FIELDS.items():
        if (key in config or key in _NEEDED) and not fine(config.get(key)):
            raise Broken(f"{shown(path)} has `{key}` {short(config.get(key))}, which must be {wanted}: {MEND}")
    other = {key: config[key] for key, plain in _PLAIN.items() if config.get(key, plain) not in (plain, None)}
    other |= {key: config[key] for key in _ABSENT if config.get(key)}
    for key, value in other.items():
        raise Broken(f"{shown(path)} has `{key}` {short(value)}, which plain LoRA has not: use it with PEFT itself")
    for pattern in patterns_of(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise Broken(f"{shown(path)} holds {short(pattern)}, which is no pattern ({error}): {MEND}") from error
    return config


def check_loadable(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where PEFT would change the base while it reads this adapter."""
    value = config.get("init_lora_weights", True)
    if not isinstance(value, bool | str | None) or value not in _STARTS:
        said = f"{shown(folder / CONFIG)} has `init_lora_weights` {short(value)}"
        raise Broken(
            f"{said}, by which PEFT may change the base: save it with PEFT's argument "
            "`path_initial_model_for_weight_conversion`, which makes it plain LoRA"
        )


def patterns_of(config: Mapping[str, Any]) -> list[str]:
    """Everything that PEFT matches as a regular expression."""
    whole = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    return [*whole, *(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]


def check_patterns(config: Mapping[str, Any], names: list[str], folder: Path) -> None:
    """Match every pattern once against every module, for a limited time: PEFT would match without an end."""
    wild = [p for p in patterns_of(config) if not re.fullmatch(r"[\w.\\^$-]*", p)]
    for pattern in wild:
        said = f"{shown(folder / CONFIG)} holds {short(pattern)}, which takes for ever to match: name modules instead"
        with within(MATCHING_S, Broken(said)):
            found = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
            found += [name for name in names if re.fullmatch(pattern, name)]


# ------------------------------------------------------------------------------------------------------------- tensors


def check_stored(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the header alone."""
    path = folder / WEIGHTS
    if not is_file(path):
        raise BadInput(f"{shown(folder)} has no {WEIGHTS}: {MEND} (other formats are not read)")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
            kinds = {key: str(s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise Broken(f"{shown(path)} is damaged ({first_line(error)}): {MEND}") from error
    if not shapes:
        raise Broken(f"{shown(path)} holds no tensors: {MEND}")
    for name, shape in shapes.items():
        if not math.prod(shape):
            raise Broken(f"{name} in {shown(path)} is empty: {MEND}")
        if not kinds[name].startswith(("F", "BF")):
            raise Broken(f"{name} in {shown(path)} holds {kinds[name]}, not floating numbers: {MEND}")
    for name in shapes:
        if ".lora_embedding_" in name:
            raise Broken(f"{name} in {shown(path)} adapts an embedding, not a layer: use it with PEFT itself")
        _check_pair(name, shapes, config, path)
    return shapes


def _check_pair(name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], path: Path) -> None:
    """A without B, another rank than the config says."""
    for side, other in (("A", "B"), ("B", "A")):
        if not name.endswith(f".lora_{side}.weight"):
            continue
        stem = name.removesuffix(f".lora_{side}.weight")
        if f"{stem}.lora_{other}.weight" not in shapes:
            raise Broken(f"{stem}.lora_{other}.weight is missing in {shown(path)}: {MEND}")
        shape, wanted = shapes[name], rank_of(config, stem.removeprefix("base_model.model."))
        rank = shape[0] if side == "A" else shape[min(1, len(shape) - 1)]
        if len(shape) < 2 or rank != wanted:
            raise Broken(f"{name} in {shown(path)} has shape {shape}, its config says rank {wanted}: {MEND}")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that PEFT gives a module."""
    pattern = config.get("rank_pattern") or {}
    with within(MATCHING_S, Broken(f"the patterns of {CONFIG} take for ever to match: name modules instead")):
        return int(pattern.get(get_pattern_key(pattern, module), config["r"]))


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stored tensors, whole and finite."""
    check_stored(folder, config)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise Broken(f"{shown(path)} is damaged ({first_line(error)}): {MEND}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise Broken(f"{name} in {shown(path)} holds NaN or infinite values: it diverged or is damaged; {MEND}")
    return tensors


# ---------------------------------------------------------------------------------------------------------- on a model


def check_base(config: Any) -> None:
    """Raise where the config of a base says what no model has: more layers or words than could be gone through in the
    time that anybody waits, a dropout that is no share."""
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key, value in inner.to_dict().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        share = key.endswith(("dropout", "pdrop", "dropout_prob"))
        least = 1 if key in COUNTS else 0 if share else -math.inf
        if number and not least <= value <= (1 if share else MOST.get(key, math.inf)):
            raise BadInput(
                f"its config.json says `{key}` {short(value)}, which no model has; download or copy it again"
            )


def load_adapter(model: Any, folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Any:
    """Stock PEFT on the base; every stored tensor must have arrived, and none may be missing."""
    check_loadable(config, folder)
    check_patterns(config, [name for name, _ in model.named_modules()], folder)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Broken(f"stock PEFT cannot load {shown(folder)} on this base: {_why(error)}; is it its base?") from error
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        first = re.sub(r".*?'(.*?)'.*", r"\1", missing[0], flags=re.DOTALL).replace(".default.", ".")
        raise Broken(f"{first} is not in {shown(folder)}, but its config asks for it: {MEND}")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in stored.items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            why = "the base has no such module, or the config does not name it"
            raise Broken(f"stock PEFT does not load {name} of {shown(folder)}: {why}; {MEND}")
    if set(loaded) - set(stored):
        first = sorted(set(loaded) - set(stored))[0]
        raise Broken(f"{first} is not in {shown(folder)}, but its config asks for it: {MEND}")
    return model


def _why(error: Exception) -> str:
    """Of PEFT's and torch's errors the line that says something."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    sizes = re.search(r"size mismatch for ([\w.]+).*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", str(error))
    return f"{sizes[1]} is {sizes[2]}, must be {sizes[3]}" if sizes else first_line(error)[:120]


# ------------------------------------------------------------------------------------------------------ digests, words


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """`sha256` of a file, of a config without what says where the base lies; "" where it cannot be read."""
    try:
        if path.suffix == ".json":
            fields = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps({k: v for k, v in fields.items() if k not in _FREE}, sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()
        return sha256(path)
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


_FREE = ("base_model_name_or_path", "revision", "inference_mode", "_name_or_path", "transformers_version")


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_file(path: Path) -> bool:
    """Also of names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shown(path: Path) -> str:
    """A path as a sentence has it: the end of a long one."""
    text = str(path)
    return text if len(text) <= 80 else f"…{text[-79:]}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:200]
