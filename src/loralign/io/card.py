"""The model card: what was trained, on what, at which learning rate and why, what the export lost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from loralign.carrier.quantise import short
from loralign.io.folder import CARD, GGUF, writing
from loralign.io.json_file import read_json
from loralign.io.provenance import versions, write_text
from loralign.io.public import is_local, scrub
from loralign.io.report import ExportReport
from loralign.types import LoralignError


@dataclass(frozen=True)
class Card:
    """Everything a card states; only `base` is needed."""

    base: str
    revision: str | None = None
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's options and the recipe's fields that matter: r, alpha, gamma, …"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """name (of several sources: names), rows, fingerprint, …"""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """How the rows asked: form (text, chat), ends (tokens), options of the chat template, given (a template by us)."""
    learning_rate: float | None = None
    lr_source: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    export: ExportReport | None = None
    verified: bool | str | None = None
    """None: not yet; a sentence: what the verification said."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The recipe file, parsed."""
    trained: bool = True
    """False: only the start, for another trainer."""


_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def read_card(folder: Path, base: str) -> Card:
    """What the `run.json` of a trained folder says, for the card of another form of it; a bare card without one.

    Raises:
        LoralignError: it is damaged: how the model was asked would be lost without a word.
    """
    if not (folder / "run.json").exists():
        return Card(base)
    try:
        said = read_json(folder / "run.json")
    except (OSError, ValueError):
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("prompts", {}), dict):
        raise LoralignError(f"run.json in {folder} is damaged: copy it again, or delete it")
    known = {f.name for f in fields(Card)} - {"base", "revision", "export", "verified"}
    return Card(base, **{key: value for key, value in said.items() if key in known})


def write_card(folder: Path, card: Card) -> None:
    """Write README.md; a card written before is replaced."""
    with writing(folder):
        write_text(folder / CARD, render(card))


def note_verified(folder: Path, said: bool | str) -> None:
    """State in a card that was written before what the verification said since."""
    text = (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, text.replace(_verified(None), _verified(said)))


def render(card: Card) -> str:
    """The card as Markdown with front matter; no local path survives."""
    sections = [_front(card), _title(card), _use(card), _training(card), _export(card), _recipe(card), _versions()]
    return "\n\n".join(part.strip() for part in sections if part) + "\n"


def _merged(card: Card) -> bool:
    """Whether the folder holds a whole model; without an export it was trained as one (method `full`)."""
    return card.export is None or card.export.profile == "merged"


def _base(card: Card) -> str:
    return card.export.base if card.export is not None else str(scrub(card.base))


def _suffix(card: Card) -> str:
    name = card.export.model_class if card.export is not None else "ForCausalLM"
    return next((suffix for suffix in _PIPELINES if name.endswith(suffix)), "")


def _front(card: Card) -> str:
    base, merged, suffix = _base(card), _merged(card), _suffix(card)
    gguf = card.export is not None and card.export.profile == "gguf"
    front: dict[str, Any] = {"library_name": "transformers" if merged else "gguf" if gguf else "peft"}
    if suffix:
        front["pipeline_tag"] = _PIPELINES[suffix]
    front["base_model"] = base
    if merged:
        front["base_model_relation"] = "finetune"
    kind = "finetune" if merged else "adapter"
    front["tags"] = [f"base_model:{kind}:{base}", *(["lora"] if card.export else []), "transformers", "loralign"]
    names = card.data.get("name", "")
    data = [str(name) for name in (names if isinstance(names, list) else [names])]
    if hub := [name for name in data if name.count("/") == 1 and not is_local(name)]:
        front["datasets"] = hub
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def _title(card: Card) -> str:
    revision = card.revision or (card.export.revision if card.export else None)
    at = f" at revision `{revision}`" if revision else ""
    kind = "A fine-tuned copy of" if _merged(card) else "A LoRA adapter for"
    name, method = _base(card).rsplit("/", 1)[-1], card.method
    how = f", {'trained with' if card.trained else 'not trained yet, initialised by'} {method}" if method else ""
    return f"# {name}{f', {method}' if method else ''}\n\n{kind} `{_base(card)}`{at}{how}."


def _use(card: Card) -> str:
    suffix = _suffix(card)
    auto = _AUTO.get(suffix, f"AutoModel{suffix}" if suffix else "AutoModel")
    if card.export is not None and card.export.profile == "gguf":
        code = f"# FROM: {_base(card)} as GGUF\nFROM BASE.gguf\nADAPTER ./{GGUF}"
        return f"## Use\n\nA Modelfile for `ollama create`:\n\n```\n{code}\n```" + _asking(card)
    if _merged(card):
        code = f'from transformers import {auto}\nmodel = {auto}.from_pretrained("path/to/this/folder")'
    else:
        revision = card.export.revision if card.export else card.revision
        pinned = f', revision="{revision}"' if revision else ""
        pinned += f", num_labels={card.export.labels}" if card.export and card.export.labels is not None else ""
        settings = card.export.quantization if card.export else None
        pinned += f", quantization_config={short(settings)}" if settings else ""
        code = (
            f"from peft import PeftModel\nfrom transformers import {auto}\n"
            f'model = PeftModel.from_pretrained({auto}.from_pretrained("{_base(card)}"{pinned}), "path/to/this/folder")'
        )
    return f"## Use\n\n```python\n{code}\n```" + _asking(card)


def _asking(card: Card) -> str:
    """How to ask the model as it was trained."""
    said = card.prompts
    if not said:
        return ""
    how = "with text as it stands, after the start token of the tokenizer"
    if said.get("form") == "chat":
        how = "through the chat template of the tokenizer"
        if options := said.get("options"):
            how += f" with {', '.join(f'{k}={v!r}' for k, v in options.items())}"
    if said.get("given"):
        how += (
            ", which is not the base's: it is in this folder (`chat_template.jinja`), so load the tokenizer from here, "
            '`AutoTokenizer.from_pretrained("path/to/this/folder")`'
        )
    ends = " or ".join(f"`{token}`" for token in said.get("ends", ()))
    return f"\n\nAsk it as it was trained: {how}." + (f" Answers end with {ends}." if ends else "")


def _training(card: Card) -> str:
    rows: dict[str, Any] = {**({"method": card.method} if card.method else {}), **card.options}
    for key, value in card.data.items():
        parts = value if isinstance(value, list) and all(isinstance(part, Mapping) for part in value) else None
        if parts is None:
            rows[f"data: {key}" if key != "name" else "data"] = value
        for n, part in enumerate(parts or (), 1):
            rows[f"data: {key.removesuffix('s')} {n}"] = "; ".join(f"{k} {_flat(v)}" for k, v in part.items())
    if card.learning_rate is not None:
        rows["learning rate"] = f"{card.learning_rate:.3g}"
        rows["learning rate chosen by"] = card.lr_source or "not stated"
    tables = [("Training", ("setting", "value"), rows), ("Metrics", ("metric", "value"), card.metrics)]
    return "\n\n".join(f"## {name}\n\n{_table(head, content)}" for name, head, content in tables if content)


def _export(card: Card) -> str:
    if card.export is None:
        return ""
    lines = card.export.lines()
    lines.append(_verified(card.verified))
    return "## Export\n\n" + "\n".join(f"- {line}" for line in lines)


def _verified(said: bool | str | None) -> str:
    if said is None:
        return "Not verified yet: `loralign verify path/to/this/folder` reloads it in a clean process."
    if said is False:
        return "**Verification failed**: the reloaded folder does not give the stored logits."
    if said is True:
        return "Verified: reloaded in a clean process without loralign, the stored logits were reproduced."
    return said


def _recipe(card: Card) -> str:
    if not card.source:
        return ""
    text = yaml.safe_dump(scrub(card.source), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"## Recipe\n\n```yaml\n{text}```"


def _versions() -> str:
    return "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in versions().items())


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())])


def _flat(value: Any) -> str:
    """A value inside a cell."""
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _cell(value: Any) -> str:
    value = scrub(value)
    text = (
        f"{value:.4g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
    return text.replace("|", "\\|").replace("\n", " ")
