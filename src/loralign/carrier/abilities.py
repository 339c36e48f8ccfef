"""What a model is and can do: by its config, its methods and Transformers' own lists, never by name endings."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

_LISTS = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
SAVED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains whole and saves by itself, by task type."""
_USUAL_HEADS = ("classifier", "score", "head", "qa_outputs")


def text_config(config: Any) -> Any:
    """The config of the language model inside a composite one, else the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def width(config: Any) -> int | None:
    """Width of the residual stream of the language model, None where the config has none."""
    found = getattr(text_config(config), "hidden_size", None)
    return int(found) if isinstance(found, int) else None


def positions(model: nn.Module) -> int | None:
    """Tokens of a row at most, where the model looks its positions up in a table; None where it computes them.

    A table is an embedding that is not the vocabulary's, or a buffer of sines, with a row for each of the config's
    positions; an embedding may have two more, for an offset, and with a padding index it begins after that.
    """
    count = getattr(text_config(model.config), "max_position_embeddings", None)
    if not isinstance(count, int):
        return None
    others, most = [f"{name}." for name in towers(model)], []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(other) for other in others):
            continue
        if any(b.is_floating_point() and b.dim() == 2 and len(b) == count for b in module.buffers(recurse=False)):
            most.append(count)
        if isinstance(module, nn.Embedding) and module is not _words(model):
            rows, padding = module.num_embeddings, module.padding_idx
            if count <= rows <= count + 2:
                most.append(count if padding is None or rows > count else count - padding - 1)
    return min(most, default=None)


def _words(model: nn.Module) -> nn.Module | None:
    try:
        words: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # of characters, by several tables
        return None
    return words


def takes_text(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "input_ids"


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of hidden states; None for models without a vocabulary to predict."""
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type, None where none fits (PEFT then adds nothing of its own)."""
    if not isinstance(model, PreTrainedModel):
        return None
    if output_head(model) is not None and model.can_generate() and takes_text(model):
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    names = {base.__name__ for base in type(model).__mro__}
    return next((task for task, listed in _LISTS.items() if names & set(listed.values())), None)


def fresh_heads(model: nn.Module) -> list[str]:
    """Modules on top of a backbone that `from_pretrained` draws anew for a task: they train whole, unadapted.

    A head that predicts the vocabulary comes with the model and is none of these.
    """
    if not isinstance(model, PreTrainedModel) or output_head(model) is not None:
        return []
    children = {n: m for n, m in model.named_children() if any(True for _ in m.parameters())}
    if model.base_model is model:
        return [n for n in _USUAL_HEADS if n in children]
    return [n for n, m in children.items() if m is not model.base_model]


def modules_to_save(model: nn.Module) -> list[str]:
    """Fresh heads that PEFT must be told to train and save."""
    known = SAVED_BY_PEFT.get(task_type(model) or "", ())
    return [name for name in fresh_heads(model) if name not in known]


def drops_layers(model: nn.Module) -> bool:
    """Whether the config says that layers are skipped at random in training (LayerDrop)."""
    config = getattr(model, "config", None)
    return config is not None and _says_layerdrop(config.to_dict())


def _says_layerdrop(fields: Any) -> bool:
    if not isinstance(fields, dict):
        return False
    return any(_says_layerdrop(v) or ("layerdrop" in str(k) and bool(v)) for k, v in fields.items())


def towers(model: nn.Module) -> list[str]:
    """Modules that rows of text never reach: image and audio towers and their projectors; none in a language model."""
    if not isinstance(model, PreTrainedModel) or text_config(model.config) is model.config:
        return []
    if task_type(model) != "CAUSAL_LM":
        return []
    decoder, head = model.get_decoder(), output_head(model)
    path = next((n for n, m in model.named_modules() if m is decoder), "")
    found, where, prefix = [], model, ""
    for step in path.split(".") if path else ():
        for name, child in where.named_children():
            if name != step and not any(m is head for m in child.modules()) and any(True for _ in child.parameters()):
                found.append(prefix + name)
        where, prefix = where.get_submodule(step), f"{prefix}{step}."
    return found
