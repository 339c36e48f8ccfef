"""Files by their content: what binds a study, and a run that is resumed, to its model and data, wherever they lie."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from loralign.io.json_file import read_json

SAMPLES, SAMPLE_BYTES = 64, 65536
"""Of a weight file: so many pieces, evenly spread, are read; the first and the last are among them."""
NOT_CONTENT = ("_name_or_path", "transformers_version")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt")


def file_print(name: str) -> str:
    """Hash of a file, or of all files of a folder; a name that is neither stands for itself."""
    path = Path(name).expanduser()
    if not path.exists():
        return f"hub:{name}"
    found = blake2b(digest_size=12)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(file.read_bytes())
    return found.hexdigest()


def model_print(name: str, revision: str | None = None) -> str:
    """Hash of config, tokenizer and samples of the weights."""
    found = blake2b(digest_size=12)
    for file in _model_files(name, revision):
        found.update(file.name.encode())
        if file.suffix in (".safetensors", ".gguf"):
            _sample(file, found)
        elif file.name == "config.json":
            kept = {k: v for k, v in read_json(file).items() if k not in NOT_CONTENT}
            found.update(json.dumps(kept, sort_keys=True).encode())
        else:
            found.update(file.read_bytes())
    return found.hexdigest()


def tensors_print(model: nn.Module) -> str:
    """Hash of the tensors of a model in memory, by name."""
    found = blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sample(file: Path, found: Any) -> None:
    size = file.stat().st_size
    found.update(str(size).encode())
    with file.open("rb") as f:
        for i in range(SAMPLES):
            f.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            found.update(f.read(SAMPLE_BYTES))


def _model_files(name: str, revision: str | None) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    small = ("config.json", *_TOKENIZER)
    if path.is_dir():
        return [*(path / n for n in small if (path / n).exists()), *sorted(path.glob("*.safetensors"))]
    index = _fetched(name, "model.safetensors.index.json", revision)
    shards = sorted(set(read_json(index)["weight_map"].values())) if index else ["model.safetensors"]
    return [p for n in (*small, *shards) if (p := _fetched(name, n, revision))]


def _fetched(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub model, None where the model has no such file or cannot be reached."""
    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
