"""What may be published: no path of this machine, however it is spelt, and no secret.

A path is cut down to its last part, a home folder to `~`, a secret to "hidden". Other relative names stay, which may be
hub ids, unless they end like a file, name a home folder or lie here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from loralign.io.json_file import read_json
from loralign.types import LoralignError

HIDDEN = "hidden"
_SECRET_KEY = re.compile(
    r"(^|[_\-. ])(token|secret|api_?key|passw(or)?d|passphrase|credential|auth|(private|access|secret)_?key)s?$"
)
_WORD_KEY = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|image|audio|video|stop|end|start)_token$|tokens$")
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abpr]-[\w-]{10,})"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_START = re.compile(
    r"file:|/(?=[^\s/])|~[\w.-]*([/\\]|$)|[A-Za-z]:[\\/]|\\\\\w|\.{1,2}[/\\]|(\$\w+|\$\{\w+\}|%\w+%)[/\\]", re.I
)
_HOME = re.compile(
    r"(file:/{0,3})?([A-Za-z]:)?[/\\]{0,2}(home|Users)[/\\][^/\\]+[/\\]?|[/\\]root[/\\]?|~[\w.-]*[/\\]?", re.I
)
_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|ya?ml|safetensors|gguf|bin|pt|md|zip|gz)$", re.I)
_INSIDE = re.compile(
    r"""(file:/{1,3}|(?<![\w.:/~\\*]))(~[\w.-]*/|[A-Za-z]:[\\/]|\\\\|/)([^\s/\\'"`,;)|]+[/\\])+[^\s/\\'"`,;)|]*"""
)


def is_local(name: str) -> bool:
    """Whether a model or data name is a path of this machine rather than a hub id."""
    if not name or PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute() or "\\" in name:
        return bool(name)
    return name[0] in "~." or name.endswith("/") or name.count("/") > 1 or name.startswith("file:") or _exists(name)


def scrub(value: Any) -> Any:
    """The value as plain json data that may be published."""
    if isinstance(value, Mapping):
        return {_key(str(k)): HIDDEN if _is_secret(str(k), v) else scrub(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, PurePath):
        return last_part(str(value))
    if isinstance(value, str):
        return public(value)
    return value if value is None or isinstance(value, int | float | bool) else public(str(value))


def _key(name: str) -> str:
    return last_part(name) if _START.match(name) else name


def public(text: str) -> str:
    """A text without secrets and without paths, also inside of a sentence."""
    text = _LOGIN.sub("", _SECRET.sub(HIDDEN, text))
    return last_part(text) if _is_path(text) else _INSIDE.sub(lambda found: last_part(found[0]), text)


def last_part(path: str) -> str:
    """Of a path of any system; `~` for a home folder."""
    path = path.strip()
    return "~" if _HOME.fullmatch(path) else PureWindowsPath(path.rstrip("/\\")).name or path


def _is_secret(key: str, value: Any) -> bool:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    secret = bool(_SECRET_KEY.search(name)) and not _WORD_KEY.search(name)
    return secret and not isinstance(value, bool | int | float | None)


def _is_path(text: str) -> bool:
    """Whether the whole text is a path."""
    text = text.strip()
    if "\n" in text or not re.search(r"[/\\~]", text):
        return False
    if _START.match(text):
        return True
    if "://" in text or re.search(
        r"[*()|^$?<>={}\[\]]|\s([A-Za-z]:)?[/\\~]", text
    ):  # an address, a pattern, a sentence
        return False
    parts = re.split(r"[/\\]", text)
    if len(parts) > 2 and {p.lower() for p in parts[:-1]} & {"home", "users", "root", "documents and settings"}:
        return True
    if _exists(text):
        return True
    return not re.search(r"\s", text) and (bool(_FILE.search(text)) or text.endswith("/"))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


NAMES = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
    "trainer_state.json": "best_model_checkpoint",
}
"""Where other libraries write a path of this machine."""
PRIVATE = ("training_args.bin", "README.md")
"""The arguments with their tokens, pickled; a card of another library. Neither is read to go on."""


def remove_private(folder: Path) -> None:
    for name in PRIVATE:
        (folder / name).unlink(missing_ok=True)


def make_public(folder: Path) -> None:
    """Names of folders that other libraries wrote into their configs."""
    for name, key in NAMES.items():
        path = folder / name
        if path.is_file():
            fields = read_json(path)
            if isinstance(fields.get(key), str) and is_local(fields[key]):
                path.write_text(json.dumps({**fields, key: last_part(fields[key])}, indent=2) + "\n", encoding="utf-8")


def base_name(model: Any, base_id: str | None, revision: str | None) -> tuple[str, str | None]:
    """The name under which others find the base, and its commit: a hub id wherever one is known, never a local path.

    A folder of the Hugging Face cache says both; any other local folder gives its config's `_name_or_path` if that is
    no path, else its own name.
    """
    base: Any = model.get_base_model()
    name = base_id or base.name_or_path
    commit = revision or getattr(base.config, "_commit_hash", None)
    if not name:
        raise LoralignError("the base model has no name (it was built from a config): pass base_id")
    if not is_local(name):
        return name, commit
    path = Path(name).expanduser().resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), revision or path.name
    if path.is_file():
        path = path.parent
    said = _config_name(path)
    return (said if said and not is_local(said) else path.name), revision


def _config_name(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("_name_or_path", ""))
    except (OSError, ValueError):
        return ""
