"""The base model with the update added in: W0 + B·A in fp32, then cast to the base's own dtype.

The training model is not touched: the merged weights go into a state dict under the base model's names, which its own
`save_pretrained` writes. A quantised base is merged into its dequantised weights, and the result is not quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralign.carrier.packed import is_packed, is_quantised
from loralign.carrier.sites import weight
from loralign.io.layout import Product
from loralign.io.probes import Layer
from loralign.types import LoralignError, Site, WorkFailed


def merged_state(model: PeftModel, found: Sequence[Site], products: Mapping[str, Product]) -> dict[str, Tensor]:
    """State dict of the merged base model under its own names; tensors that are not adapted are shared, not copied."""
    base, quantised = model.get_base_model(), is_quantised(model)
    state = (_dequantised_state if quantised else _plain_state)(base, found[0].adapter)
    _refuse_tied(state, found)
    dtype = base_dtype(model)
    for site in found:
        A, B = products[site.name]
        read = weight(site).read()
        if quantised:
            _check_dequantised(site, read)
        W = read + B.to(read.device) @ A.to(read.device)
        W = W.T if isinstance(site.layer.get_base_layer(), Conv1D) else W  # type: ignore[operator]
        key = f"{site.name}.weight"
        state[key] = W.to(dtype if quantised else state[key].dtype).cpu().contiguous()
    return state


def base_dtype(model: PeftModel) -> torch.dtype:
    """The dtype of the base's floating weights."""
    base = model.get_base_model()
    return next(p.dtype for n, p in base.named_parameters() if p.is_floating_point() and "lora_" not in n)


def _plain_state(base: nn.Module, adapter: str) -> dict[str, Tensor]:
    layers = {n for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    heads = {n for n, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    state = {}
    for key, tensor in base.state_dict().items():
        name = _base_name(key, layers, heads, adapter)
        if name is not None:
            state[name] = tensor.detach()
    return state


def _base_name(key: str, layers: set[str], heads: set[str], adapter: str) -> str | None:
    """The name that a tensor has in the untouched base, None for what an adapter added or replaced."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        owner, rest = ".".join(parts[:i]), parts[i:]
        if owner in layers:
            return ".".join([owner, *rest[1:]]) if rest[0] == "base_layer" else None
        if owner in heads:
            own = rest[:2] == ["modules_to_save", adapter]
            return ".".join([owner, *rest[2:]]) if own else None
    return key


def _dequantised_state(base: Any, adapter: str) -> dict[str, Tensor]:
    state = _plain_state(base, adapter)
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        if is_packed(module.weight) or not module.weight.is_floating_point():
            state[f"{name.removesuffix('.base_layer')}.weight"] = dequantize_module_weight(module).to(dtype).cpu()
    wanted = skeleton(base).state_dict().keys()
    return {k: v for k, v in state.items() if k in wanted}


@torch.no_grad()
def _check_dequantised(site: Site, W: Tensor) -> None:
    """The layer must compute with what it dequantises to; on a CPU bitsandbytes repacks weights at a forward."""
    layer: Any = site.layer.get_base_layer()  # type: ignore[operator]
    x = torch.ones(1, site.d_in, device=W.device)
    x[:, ::2] = -1.0
    y = layer(x).float() - (0.0 if layer.bias is None else layer.bias.float())
    if not float((y - x @ W.T).norm()) <= 0.1 * float(y.norm()):
        raise WorkFailed(
            f"{site.name} computes with other weights than it dequantises to (bitsandbytes does so on a CPU after a "
            "forward): load the model on a GPU, or load model and adapter again and merge before any forward"
        )


def skeleton(base: Any) -> Any:
    """The base model's class without weights and without quantisation: its `save_pretrained` writes any state dict."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(base)(config)


def _refuse_tied(state: Mapping[str, Tensor], found: Sequence[Site]) -> None:
    owners: dict[int, list[str]] = {}
    for key, tensor in state.items():
        owners.setdefault(tensor.data_ptr(), []).append(key)
    for site in found:
        shared = [k for k in owners[state[f"{site.name}.weight"].data_ptr()] if k != f"{site.name}.weight"]
        if shared:
            raise LoralignError(
                f"{site.name} shares its weight with {shared[0]}, so merging would change both: use profile peft"
            )


def merged_layers(found: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Layer]:
    """W·x + bias with the merged weights, for computing the merged model's logits."""

    def merged(site: Site) -> Layer:
        def layer(x: Tensor) -> Tensor:
            base: Any = site.layer.get_base_layer()  # type: ignore[operator]
            W = state[f"{site.name}.weight"].to(x.device, x.dtype)
            return nn.functional.linear(x, W.T if isinstance(base, Conv1D) else W, base.bias)

        return layer

    return {site.name: merged(site) for site in found}


def write_merged(folder: Path, model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """The model's own `save_pretrained`; then shapes are read back."""
    base: Any = model.get_base_model()
    marked = getattr(base, "hf_quantizer", None) is not None  # also after GGUF, whose layers are plain
    saver = skeleton(base) if marked or is_quantised(base) else base
    if saver is not base and base.can_generate():
        saver.generation_config = base.generation_config
    saver.save_pretrained(str(folder), state_dict=dict(state))
    written = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes = [tuple(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
        if any(0 in shape for shape in shapes):
            raise WorkFailed(f"{path.name} holds an empty tensor: is the disk healthy?")
        written += len(shapes)
    if not written:
        raise WorkFailed("the merged model was written without weights: is the disk healthy?")
