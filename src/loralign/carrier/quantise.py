"""Quantising a base while it is loaded: a recipe's `quantize`, a kind a line.

    nf4     bitsandbytes, 4 bits a number, its scales quantised again; products in the precision of the run
    int8    torchao, 8 bits a number and a scale a row; a weight is de-quantised for each product

A kind is what the config of a checkpoint that is stored so would say (`quantization_config`): Transformers quantises by
it, a plan counts bytes by it, a proof remembers it. Linear layers but the head are quantised.

Source: nf4 and its double quantisation: Dettmers et al., "QLoRA", arXiv 2305.14314, sections 2 and 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from loralign.types import LoralignError

Quantize = Literal["nf4", "int8"]
CPU_MEND = "set `quantize: int8`, or leave it out"


@dataclass(frozen=True)
class Kind:
    """One way to quantise. computes_in: the key of `section` that names the precision of products, "" where they are in
    that of their inputs. only_gpu: why it is refused elsewhere."""

    package: str
    section: Mapping[str, Any]
    computes_in: str = ""
    only_gpu: str = ""

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """The whole section, for a base whose other weights have this dtype."""
        name = str(dtype).removeprefix("torch.")
        return {**self.section, **({self.computes_in: name} if self.computes_in else {})}


_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
KINDS: dict[Quantize, Kind] = {
    "nf4": Kind(
        "bitsandbytes",
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        computes_in="bnb_4bit_compute_dtype",
        only_gpu="bitsandbytes packs weights on a CPU in evaluation, and computes something else from then on",
    ),
    "int8": Kind(
        "torchao",
        {
            "quant_method": "torchao",
            "quant_type": {
                "default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": _PER_ROW}}
            },
        },
    ),
}


def kind_of(section: Any) -> Quantize | None:
    """The kind whose settings are among these, None where none is."""
    return next((name for name, kind in KINDS.items() if _within(kind.section, section)), None)


def short(section: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without what is the default, where the kind is one of ours."""
    name = kind_of(section)
    if name is None:
        return dict(section)
    kind = KINDS[name]
    return {**kind.section, **({kind.computes_in: section[kind.computes_in]} if kind.computes_in in section else {})}


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(k in whole and _within(v, whole[k]) for k, v in part.items())
    return bool(part == whole)


def check_device(name: Quantize, device: str, mend: str) -> None:
    """Raise where a kind does not run. device: cpu or cuda. mend: what to do instead."""
    if KINDS[name].only_gpu and device != "cuda":
        raise LoralignError(f"`quantize: {name}` needs a GPU ({KINDS[name].only_gpu}): {mend}")


def check_installed(name: Quantize) -> None:
    package = KINDS[name].package
    if find_spec(package) is None:
        raise LoralignError(f"`quantize: {name}` needs the package {package}: pip install 'loralign[quantised]'")


def check_plain(name: Quantize, model: str, stored: Mapping[str, Any]) -> None:
    """Raise where the weights in the model's files are quantised already. stored: `quantization_config`, or nothing."""
    if model.endswith(".gguf"):
        raise LoralignError(
            f"{model} is de-quantised while it is loaded, and is not quantised again: leave `quantize: {name}` out, or "
            "name the folder or hub id of the model"
        )
    if stored:
        how = stored.get("quant_method", "by an unnamed method")
        raise LoralignError(
            f"{model} is stored quantised ({how}) and is loaded as it is stored: leave `quantize: {name}` out"
        )


def as_data(config: Any) -> dict[str, Any]:
    """A `quantization_config` as plain data, {} for none."""
    said = config if config is None or isinstance(config, Mapping) else config.to_dict()
    return {} if said is None else dict(json.loads(json.dumps(said, default=str)))
