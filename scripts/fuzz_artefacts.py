"""Inputs that machines write and disks damage: adapters, checkpoints, bases, basis files, kept evidence."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuzz_world import CASE, KEPT, Input, Kind, write

GOOD = Path("good")
Damage = Callable[[random.Random, Path], bool | None]
"""Changes a folder; whether what is left is bad (None: nobody can say)."""


def copied(name: str) -> Path:
    if (GOOD / name).is_dir():
        return Path(shutil.copytree(GOOD / name, CASE / name))
    return Path(shutil.copy(GOOD / name, CASE / name))


# ---------------------------------------------------------------------------------------------------------- one file


def cut(draw: random.Random, file: Path) -> bool:
    whole = file.read_bytes()
    write(file, whole[: draw.choice([0, 1, len(whole) // 2, len(whole) - 2])])
    return True


def flipped(draw: random.Random, file: Path) -> None:
    whole = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 8)):
        whole[draw.randrange(len(whole))] = draw.randrange(256)
    write(file, bytes(whole))


def of_json(draw: random.Random, file: Path) -> bool:
    write(file, draw.choice([b"[]", b"3", b"null", b'"a"', b"{", b"\xff", b"[" * 3000, b"{}"]))
    return True


def pickled(draw: random.Random, file: Path) -> bool:
    write(file, pickle.dumps({"a": 1}))
    return True


def gone(draw: random.Random, file: Path) -> bool:
    file.unlink()
    return True


# ----------------------------------------------------------------------------------------------------------- adapters


def tensors(draw: random.Random, folder: Path) -> bool:
    """Factors that are missing, renamed, of other shapes or types, or not finite."""
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    name = draw.choice(sorted(held))
    t = held.pop(name)
    change = draw.randrange(9)
    changed: dict[str, torch.Tensor] = [
        {}, {name.replace("q_proj", "k_proj").replace("v_proj", "o_proj"): t}, {name: t.T.contiguous()},
        {name: t[:, :1].contiguous()}, {name: t.int()}, {name: t * float("nan")}, {name: t[0].contiguous()},
        {name: t, name.replace("layers.", "layers.9"): t.clone()}, {name: torch.zeros(0)},
    ][change]  # fmt: skip
    kept = {} if draw.random() < 0.1 else held
    save_file({**kept, **changed}, file, metadata={"format": "pt"})
    return True


def config(draw: random.Random, folder: Path) -> bool | None:
    """An adapter_config.json with one field of another value."""
    file = folder / "adapter_config.json"
    fields: list[tuple[str, list[Any]]] = [
        ("r", [0, -4, "x", None, 3, 10**12]),
        ("target_modules", [[], ["q_proj"], "(([a-z.0-9_]+)+)+X", "([", ["nothing"], 3]),
        ("peft_type", ["FOO", "IA3", None, 3]), ("lora_alpha", ["x", None, "nan"]), ("init_lora_weights", ["foo"]),
        ("rank_pattern", [{"([": 3}, 3, {"q_proj": -1}]), ("use_dora", [True]), ("layer_replication", [[[0, 2]]]),
        ("base_model_name_or_path", [3, "nowhere/at/all", "x" * 5000]), ("layers_to_transform", ["x", [99]]),
    ]  # fmt: skip
    field, values = draw.choice(fields)
    held = json.loads(file.read_text(encoding="utf-8"))
    write(file, json.dumps({**held, field: draw.choice(values)}))
    return None if field in ("base_model_name_or_path", "init_lora_weights") else True


def adapter(draw: random.Random, number: int) -> Input:
    """A damaged adapter, given to every command that reads one."""
    folder = copied("out")
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    ways: list[Callable[[], bool | None]] = [
        lambda: tensors(draw, folder), lambda: tensors(draw, folder), lambda: config(draw, folder),
        lambda: config(draw, folder),
        lambda: draw.choice([cut, pickled, gone])(draw, weights),
        lambda: draw.choice([cut, of_json, gone])(draw, settings),
        lambda: flipped(draw, weights), lambda: flipped(draw, settings),
    ]  # fmt: skip
    bad = ways[number % len(ways)]()
    calls = [
        ["generate", str(folder), "--base", "base", "--prompt", "w5"],
        ["export", str(folder), "--base", "base", "--out", "case/e"],
        ["eval", str(folder), "--base", "base", "--data", "rows.jsonl", "--limit", "1"],
        ["subspace", "extract", str(folder), "good/other", "--out", "case/b.safetensors"],
        ["verify", str(folder), "--base", "base"],
    ]  # fmt: skip
    turn = number // len(ways)
    call = calls[-1] if number % 25 == 0 else calls[turn % (len(calls) - 1)]  # verify starts a process
    if call[0] == "subspace" and number % len(ways) < 4:
        bad = None  # it asks for pairs, and not for those that a base would have
    return Input(call, bad)


def base(draw: random.Random, number: int) -> Input:
    """A damaged model folder."""
    folder = Path(shutil.copytree("base", CASE / "base"))
    file = folder / draw.choice(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    way = draw.choice([cut, gone, flipped] if file.suffix == ".safetensors" else [cut, of_json, flipped])
    way(draw, file)
    bad = True if way is cut and file.name in ("model.safetensors", "config.json") else None
    return Input(["init", "r.yaml", "--set", f"model={folder}"], bad)


BASE_VALUES: dict[str, list[Any]] = {
    "num_hidden_layers": [3, 0, -1, 10**7, "x", None, 1.5],
    "hidden_size": [32, 0, -16, 10**9, "x"],
    "vocab_size": [65, 0, -1, 10**12],
    "num_attention_heads": [0, 3, 10**6],
    "num_key_value_heads": [0, 3],
    "head_dim": [0, 7, 10**6],
    "intermediate_size": [0, 33, 10**9],
    "attention_dropout": [2.0, -1, "x"],
    "rms_norm_eps": ["x", -1e9],
    "hidden_act": ["foo", 3],
    "model_type": ["foo", "bert", "t5", 3, None],
    "architectures": [["Foo"], [], 3],
    "is_encoder_decoder": [True],
    "dtype": ["float8", 3, "float16"],
    "pad_token_id": [999, -5, "x"],
    "eos_token_id": [[1, 2], 10**9, "x"],
    "rope_parameters": [{"rope_type": "foo"}, {"rope_type": "linear", "factor": 0.0}, 3],
    "quantization_config": [{"quant_method": "foo"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, 3],
    "auto_map": [{"AutoConfig": "x.Y"}],
    "max_position_embeddings": [0, 2, -1],
}
TEMPLATES = (
    "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ messages[99]['content'] }}",
    "{{ 1 / 0 }}",
    "{% for m in",
    "{{ raise_exception('no') }}",
    "{{ messages }}",
    "",
    "fixed text",
    "{{ 'x' * 99999999999 }}",
    "{% include 'a' %}",
    "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}{{ m.content | nothing }}{% endfor %}",
    "{{ bos_token * 3 }}",
    "{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ none.x }}",
    "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "{% set x = range(10**9) | list %}",
    "\ud800",
)

WHOLE = ("{{ messages }}", "{{ messages | tojson }}")
"""Odd, but nothing is lost in them."""


def base_config(draw: random.Random, number: int) -> Input:
    """A model folder whose config has one field of another value."""
    folder = Path(shutil.copytree("base", CASE / "base"))
    pairs = [(key, value) for key, values in BASE_VALUES.items() for value in values]
    key, value = pairs[number % len(pairs)]
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(folder / "config.json", json.dumps({**held, key: value}))
    call = ["plan", "init", "train"][number // len(pairs) % 3]
    return Input([call, "r.yaml", "--set", f"model={folder}"], None)


def template(draw: random.Random, number: int) -> Input:
    """A chat template that does not end, fails, or loses what the turns say."""
    folder = Path(shutil.copytree("base", CASE / "base"))
    write(folder / "chat_template.jinja", TEMPLATES[number % len(TEMPLATES)])
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    write(CASE / "turns.jsonl", "\n".join([json.dumps({"messages": turns})] * 4))
    bad = None if TEMPLATES[number % len(TEMPLATES)] in WHOLE else True
    return Input(["train", "r.yaml", "--set", f"model={folder}", "--set", "data={train: case/turns.jsonl}"], bad)


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(draw: random.Random, number: int) -> Input:
    """A run that is gone on with after one part of its last checkpoint was damaged; where parts of the run are
    missing it may go back to the checkpoint before and end well."""
    folder = copied("out")
    last = folder / "checkpoints" / "checkpoint-3"
    shutil.rmtree(last)
    last = folder / "checkpoints" / "checkpoint-2"
    parts = sorted(
        p for p in (*last.iterdir(), folder / "checkpoints" / "begun.json", folder / "log.jsonl") if p.is_file()
    )
    file = parts[number % len(parts)]
    way = draw.choice([cut, gone, flipped, pickled, of_json])
    way(draw, file)
    return Input(["train", "r.yaml", "--resume"], None)


def neighbour(draw: random.Random, number: int) -> Input:
    """A checkpoints folder with something beside the checkpoints: it is gone on with all the same."""
    folder = copied("out") / "checkpoints"
    shutil.rmtree(folder / "checkpoint-3")
    name = ["checkpoint-2 (copy)", "checkpoint-best", "checkpoint-9", "checkpoint--1", "notes.txt", "checkpoint-x"][
        number % 6
    ]
    if draw.random() < 0.5:
        (folder / name).mkdir()
    else:
        write(folder / name, "x")
    return Input(["train", "r.yaml", "--resume"], None)


# ------------------------------------------------------------------------------------------- basis files and evidence


def basis(draw: random.Random, number: int) -> Input:
    """A basis file that is damaged or says other things than `subspace extract` writes."""
    file = copied("basis.safetensors")
    bad: bool | None = True
    way = number % 4
    if way == 0:
        draw.choice([cut, pickled, of_json])(draw, file)
    elif way == 1:
        flipped(draw, file)
        bad = None
    else:
        held = load_file(file)
        said: Any = draw.choice(["", "3", "[]", '"a"', "{}", '{"format": 1}', '{"format": 1, "groups": {}}', "{"])
        save_file(held, file, metadata={"loralign_basis": said})
    if draw.random() < 0.5:
        return Input(["subspace", "show", str(file)], bad)
    return Input(["init", "r.yaml", "--set", "method=cora", "--set", f"options={{sources: {file}}}"], bad)


def evidence(draw: random.Random, number: int) -> Input:
    """Kept evidence that is damaged: it is collected again."""
    file = next(copied("kept").glob("*.safetensors"))
    draw.choice([cut, flipped, pickled, of_json])(draw, file)
    return Input(["init", "r.yaml", *KEPT], None)


ARTEFACTS = (
    Kind("adapter", 160, adapter),
    Kind("base model", 40, base),
    Kind("base config", 2 * sum(map(len, BASE_VALUES.values())), base_config),
    Kind("template", len(TEMPLATES), template),
    Kind("checkpoint", 40, checkpoint),
    Kind("beside checkpoints", 12, neighbour),
    Kind("basis file", 60, basis),
    Kind("kept evidence", 16, evidence),
)
