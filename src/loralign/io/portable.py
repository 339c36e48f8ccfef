"""The strict form of an adapter that servers read alike, and a checker that names what would go wrong where.

    vLLM        one scale for all modules (r, lora_alpha and use_rslora of the config; patterns are ignored), r at most
                its max_lora_rank, no modules_to_save, no DoRA, no bias
    llama.cpp   scale = the global lora_alpha over each tensor's own rank; any tensor but lora_A and lora_B aborts
    SGLang      scale = lora_alpha / r (use_rslora is ignored); k_proj needs q_proj and v_proj of the same layer
    TGI, LoRAX  lora_alpha / r of the config

Only equal ranks, lora_alpha = r and nothing but lora_A and lora_B are right everywhere.
Source: vLLM `lora/peft_helper.py` and `config/lora.py`, llama.cpp `convert_lora_to_gguf.py`, SGLang `srt/lora`, as read
        in 2026; the list of ranks is vLLM's `MaxLoRARanks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loralign.io.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loralign.io.json_file import read_json
from loralign.types import LoralignError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def needed_max_lora_rank(rank: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that serves this rank, None where none does."""
    return next((r for r in VLLM_RANKS if r >= rank), None)


def serving_note(rank: int) -> str:
    """What a server must be told."""
    needed = needed_max_lora_rank(rank)
    if needed is None:
        return f"rank {rank} is above vLLM's largest max_lora_rank ({VLLM_RANKS[-1]}): export with max_rank"
    return f"vLLM: --enable-lora --max-lora-rank {needed}" + (" (its default is 16)" if needed > 16 else "")


def check_portable(folder: Path) -> list[str]:
    """Every trap that a server would fall into with this adapter, one sentence each; empty: none is known.

    Raises LoralignError where the folder holds no readable adapter.
    """
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            names = list(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
            dtypes = {str(file.get_slice(key).get_dtype()) for key in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise LoralignError(f"{folder} holds no readable adapter ({error}): export it again") from error
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')}: servers read LORA only"]
    return [*_config_traps(config), *_tensor_traps(config, shapes, dtypes), *_group_traps(shapes)]


def _config_traps(config: Mapping[str, Any]) -> list[str]:
    r, alpha = int(config.get("r") or 0), config.get("lora_alpha")
    traps = {
        "rank_pattern: llama.cpp scales every module by its own rank, so ragged ranks get wrong scales": config.get(
            "rank_pattern"
        ),
        "alpha_pattern: vLLM, SGLang, TGI and llama.cpp ignore it and use one alpha": config.get("alpha_pattern"),
        "use_rslora: SGLang and llama.cpp ignore it and scale by alpha/r": config.get("use_rslora"),
        "use_dora: vLLM, SGLang and llama.cpp refuse or ignore the magnitudes": config.get("use_dora"),
        "bias: vLLM refuses adapters with a bias": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "modules_to_save: vLLM refuses it, llama.cpp aborts on its tensors": config.get("modules_to_save"),
        "trainable_token_indices: no server reads them": config.get("trainable_token_indices"),
        "target_parameters: no server reads them": config.get("target_parameters"),
        "layer_replication: no server repeats layers": config.get("layer_replication"),
        "lora_dropout: a server that trains or a careless merge would apply it": config.get("lora_dropout"),
        "init_lora_weights: a reader that initialises by it would change the base": config.get(
            "init_lora_weights", True
        )
        is not True,
        f"lora_alpha {alpha}: no integer, which readers with a typed config refuse": not float(alpha or 0).is_integer(),
        "target_modules: a regular expression, which several servers read as a list of names": not isinstance(
            config.get("target_modules"), list
        ),
    }
    found = [text for text, present in traps.items() if present]
    if needed_max_lora_rank(r) is None:
        found.append(serving_note(r))
    return found


def _tensor_traps(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtypes: set[str]) -> list[str]:
    found = []
    strange = [k for k in shapes if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        found.append(f"{strange[0]}: llama.cpp aborts on tensors other than lora_A and lora_B ({len(strange)} here)")
    ranks = {s[0] if k.endswith(".lora_A.weight") else s[-1] for k, s in shapes.items() if k not in strange}
    if ranks - {config.get("r")}:
        found.append(f"ranks {sorted(ranks)} with r {config.get('r')}: llama.cpp scales each tensor by its own rank")
    if len(dtypes) > 1:
        found.append(f"mixed dtypes {sorted(dtypes)}: servers cast all tensors to one")
    return found


def _group_traps(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """SGLang stacks q, k and v of a layer."""
    sites = {k.rsplit(".lora_", 1)[0] for k in shapes if ".lora_" in k}
    lonely = [s for s in sorted(sites) if s.endswith(".k_proj") and not {s[:-6] + "q_proj", s[:-6] + "v_proj"} <= sites]
    return [f"{lonely[0]} without q_proj and v_proj: SGLang needs all three of a layer"] if lonely else []
