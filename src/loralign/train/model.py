"""Load a base model and its tokenizer: folders, hub ids, GGUF files; plain layers are treated as plain."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoQuantizationConfig

from loralign.carrier.abilities import fresh_heads, positions, width
from loralign.carrier.quantise import CPU_MEND, KINDS, Quantize, as_data, check_device, check_installed, check_plain
from loralign.carrier.slot import is_adapted
from loralign.carrier.storage import will_be_split
from loralign.carrier.stored import CONFIG, BadInput, check_base, out_of_memory
from loralign.types import LoralignError

log = logging.getLogger("loralign")
NO_TOKENIZER = "it has no tokenizer; copy tokenizer.json and tokenizer_config.json beside it"


def described(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model as its config describes it, on the meta device: no weights are read."""
    where, extra = _source(name)
    with loading(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code, **extra)
        check_causal(config)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return made


def described_classifier(where: str, *, revision: str | None = None) -> PreTrainedModel:
    """A text classifier as its config describes it, on the meta device: no weights are read."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(where, revision=revision)
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return made


def check_length(model: PreTrainedModel, name: str, length: int, key: str) -> None:
    """Raise where rows of so many tokens, as `key` allows them, have no positions. model: may be on the meta device."""
    most = positions(model)
    if most is not None and length > most:
        raise LoralignError(f"rows of {length} tokens are more than the {most} positions of {name!r}: lower `{key}`")


def row_length(model: PreTrainedModel, name: str, given: int | None, key: str, usual: int) -> int:
    """Tokens of a row at most: as `key` gives them, else the usual number or, where fewer, all that have a position."""
    if given is not None:
        check_length(model, name, given, key)
        return given
    most = positions(model)
    if most is None or usual <= most:
        return usual
    log.info("rows of at most %d tokens: %r has no more positions (`%s` is not given)", most, name, key)
    return most


def load(
    name: str,
    *,
    revision: str | None = None,
    precision: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with its tokenizer, on the GPU where there is one; on the host where FSDP will split it.

    name: a folder, a hub id, or a `.gguf` file. precision: "fp32", "bf16" or "auto" (bf16 on a GPU that has it).
    trust_remote_code: run code that a model repository ships; off unless asked for. quantize: a kind, which the files'
    own quantisation excludes. Nothing is unpickled.
    """
    where, extra = _source(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, **extra}
    with loading(name):
        config = AutoConfig.from_pretrained(where, **options)
        check_causal(config)
    if quantize is not None:
        options |= _quantising(quantize, name, config, dtype_of(precision))
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    with loading(name):
        model, told = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype_of(precision), use_safetensors=True, output_loading_info=True, **options
        )
        _check_whole(told)
    as_plain(model)
    if is_adapted(model):
        raise LoralignError(f"{name!r} is an adapter, not a base model: give the base model in `model`")
    if torch.cuda.is_available() and not will_be_split():
        model.to("cuda")
    return model, tokenizer


def stored_quantisation(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The `quantization_config` of a model's own files; {} where its weights are plain, or de-quantised in loading."""
    where, extra = _source(name)
    with loading(name):
        config = AutoConfig.from_pretrained(where, revision=revision, **extra)
    return {"quant_method": "gguf"} if extra else as_data(getattr(config, "quantization_config", None))


def _quantising(quantize: Quantize, name: str, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise a base while it is read, a tensor at a time on its device."""
    check_plain(quantize, name, as_data(getattr(config, "quantization_config", None)))
    check_device(quantize, "cuda" if torch.cuda.is_available() else "cpu", CPU_MEND)
    check_installed(quantize)
    place = {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
    with loading(name):
        return {"quantization_config": AutoQuantizationConfig.from_dict(KINDS[quantize].settings(dtype)), **place}


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal language model; one without a token to pad with pads with the end token."""
    where, extra = _source(name)
    with loading(name):
        tokenizer: PreTrainedTokenizerBase = read_tokenizer(
            where, revision=revision, trust_remote_code=trust_remote_code, **extra
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(where: str, labels: int, revision: str | None = None) -> tuple[Any, tuple[str, ...], list[str]]:
    """A text classifier in fp32, the modules of its head, which has `labels` labels and which the caller draws, and
    what else its files lack, a pooler: that is drawn here, alike by every process."""
    torch.manual_seed(0)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        where,
        num_labels=labels,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # a head of another number of labels
        output_loading_info=True,
        revision=revision,
    )
    head = tuple(fresh_heads(model))
    if odd := sorted(name for name, *_ in told["mismatched_keys"] if name.split(".")[0] not in head):
        raise LoralignError(f"{where}: {odd[0]} has another shape than config.json says: download or copy it again")
    return model, head, sorted(name for name in told["missing_keys"] if name.split(".")[0] not in head)


def read_tokenizer(where: str, **options: Any) -> Any:
    """The tokenizer beside a model. Raises where the files hold none: some classes then read every word as unknown."""
    found = AutoTokenizer.from_pretrained(where, **options)
    if found.vocab_size <= len(found.all_special_ids):
        raise BadInput(NO_TOKENIZER)
    return found


OTHER_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice")
"""Endings of architectures whose weights hold no language head."""


def check_causal(config: Any) -> None:
    """Raise where the config says what no causal language model has."""
    check_base(config)
    heads = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder or (heads and all(head.endswith(OTHER_HEADS) for head in heads)):
        raise BadInput("its config.json says that it is no causal language model, which task sft needs")


def _check_whole(told: dict[str, Any]) -> None:
    """Raise where the file lacks weights that the config asks for: Transformers would draw them at random."""
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise BadInput(f"its files lack {missing[0]}{more}, which its config.json asks for; download or copy it again")
    if left := sorted(told["unexpected_keys"]):
        log.warning("%d weights of the model's files are not asked for by its config.json: %s …", len(left), left[0])


def _source(name: str) -> tuple[str, dict[str, str]]:
    if not name.strip():
        raise LoralignError("the base model has no name: give its folder or hub id")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoralignError(f"no such file: {name}; give the .gguf file of the model, or its folder")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / CONFIG).exists() and not (path / "config.json").exists():
            raise LoralignError(f"{name} holds an adapter, not a base model: give the base model in `model`")
        if not (path / "config.json").exists():
            raise LoralignError(f"{name} is no model folder: it has no config.json")
        return str(path), {}
    if path.is_absolute() or name.startswith("."):
        raise LoralignError(f"no such folder: {name}; give the folder or hub id of the base model in `model`")
    return name, {}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the frozen base; the adapter's own tensors are fp32 always."""
    bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return torch.bfloat16 if bf16 else torch.float32


def as_plain(model: PreTrainedModel) -> None:
    """Drop the marks of a quantisation that is not there: a GGUF file is de-quantised while it is loaded."""
    method = str(getattr(model, "quantization_method", "") or "").lower()
    if "gguf" not in method and not _says_gguf(model):
        return
    odd = [n for n, m in model.named_modules() if "Linear" in type(m).__name__ and not isinstance(m, nn.Linear)]
    if odd:
        return
    model.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    log.info("the GGUF file was de-quantised while loading; its layers are plain and are trained as such")


def _says_gguf(model: PreTrainedModel) -> bool:
    config = getattr(model.config, "quantization_config", None)
    said = config.get("quant_method", "") if isinstance(config, dict) else getattr(config, "quant_method", "")
    return "gguf" in str(said).lower()


def hidden_size(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Width of the residual stream, from the config alone; 2000 (where priors are stated) when it has none."""
    where, extra = _source(name)
    with loading(name):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code, **extra)
        check_base(config)
    return width(config) or 2000


@contextmanager
def loading(name: str, kind: str = "a causal language model, which task sft needs") -> Iterator[None]:
    """Within: what goes wrong while a model is read becomes one sentence with the mend. kind: what it must be."""
    try:
        yield
    except LoralignError:
        raise
    except Exception as error:  # a damaged config or tokenizer may raise anything
        if out_of_memory(error):
            raise
        raise LoralignError(f"cannot load the model {name!r}: {_why(error, kind)}") from error


def _why(error: Exception, kind: str) -> str:
    text = str(error).strip()
    if isinstance(error, BadInput):
        return text
    if isinstance(error, KeyError):
        return f"Transformers does not know {text}; check its config.json"
    said = " ".join(text.split("\n")[: 2 if text.split("\n")[0].endswith(":") else 1]).split(". ")[0].rstrip(".")
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({said}); download or copy them again"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says; download or copy it again"
    if "backend tokenizer" in text:
        return NO_TOKENIZER
    if "trust_remote_code" in text:
        return "it needs code that its repository ships; set `trust_remote_code: true` if you trust that code"
    if "couldn't connect" in text:
        away = "HF_HUB_OFFLINE forbids asking the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"it is not in the Hugging Face cache, and {away}; check the name, or give the folder of the model"
    if "no file named" in text and "safetensors" in text:
        return "it has no safetensors weights, and nothing is unpickled; save it again with `save_pretrained`"
    if "Unrecognized configuration class" in text:
        return f"it is no {kind.removeprefix('a ')}; give another `model`"
    return f"{said[:150] or type(error).__name__}; check the name, or give the folder of the model"
