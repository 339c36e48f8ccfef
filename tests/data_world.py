"""Rows and tokenizers of the data tests: a byte tokenizer, files of rows, tiny TRL trainers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from loralign.data.table import Rows, collected
from toy import llama

SMOL = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
INST = """
{%- set ns = namespace(n=0) %}
{% for m in messages %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
{%- else %}{{ raise_exception('only user and assistant turns') }}{% endif %}
{%- endfor %}
"""


def byte_tokenizer(
    template: str | dict[str, str] | None = SMOL,
    *,
    chatml: bool = True,
    starts: bool = False,
    special: Iterable[str] = (),
) -> PreTrainedTokenizerFast:
    """One token per byte, plus the special ones; starts: it puts <s> before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = dict.fromkeys(["<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if chatml else []), *special])
    core.add_special_tokens([AddedToken(t, special=True) for t in marks])
    if starts:
        first = [("<s>", core.token_to_id("<s>"))]
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    end = "<|im_end|>" if chatml else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(folder: Path, rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def rows_of(*rows: dict[str, Any]) -> Rows:
    return collected(rows, "the data")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [user("q"), assistant("one"), user("r"), assistant("two")]},
    {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("three")]},
]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the runs of ones."""
    found: list[list[int]] = []
    before = 0
    for token, m in zip(ids, mask, strict=True):
        if m and not before:
            found.append([])
        if m:
            found[-1].append(token)
        before = m
    return [tokenizer.decode(run) for run in found]


def sft(folder: Path, rows: Any, tokenizer: PreTrainedTokenizerBase, **config: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "shuffle_dataset": False,
        "max_length": 64,
    }
    return SFTTrainer(
        llama(vocab_size=len(tokenizer), max_position_embeddings=128),
        args=SFTConfig(**{**settings, **config}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
