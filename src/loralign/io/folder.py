"""Folders that appear whole: everything is written beside the target and renamed at the end; inside it where it is
there already, since it may be a link or a disk of its own, into which nothing can be renamed from beside it."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loralign.io.json_file import read_json
from loralign.io.lock import locked
from loralign.types import LoralignError, WorkFailed

PROBES = Path("verify") / "probes.safetensors"
"""In a sub-folder: SGLang and vLLM read every *.safetensors file of the folder itself."""

COMPACT = Path("compact") / "compact.safetensors"

GGUF = "adapter.gguf"

ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
"""Here too: what verifies (`carrier/stored.py`) imports PEFT, and a bad recipe is answered without it."""
_MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
_LAST = (ADAPTER_WEIGHTS, GGUF, "config.json", ADAPTER_CONFIG)


def is_ours(folder: Path) -> bool:
    """Whether an earlier export or run of loralign made this folder."""
    if (folder / PROBES).is_file():
        return True
    try:
        run = read_json(folder / "run.json")
    except (OSError, ValueError):
        return False
    return isinstance(run, dict) and "loralign" in run


@contextmanager
def fresh_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out`, or whose files move into the `out` that is there, when the block succeeds.

    On any failure the temporary folder is removed and `out` is as it was. Raises LoralignError where `out` is
    not empty or another process writes into it, WorkFailed on a full disk.
    """
    with locked(out):
        yield from _made(out, overwrite)


@contextmanager
def removed_on_failure(out: Path) -> Iterator[None]:
    """Within: what is added to a folder that was just made; where that fails the folder goes, too."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _made(out: Path, overwrite: bool) -> Iterator[Path]:
    check_free(out, overwrite=overwrite)
    temporary = (out if out.is_dir() else out.parent) / f".{out.name}.{os.getpid()}.partial"
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_left(out)
            temporary.mkdir()
            yield temporary
            readable = temporary.stat().st_mode & 0o666  # safetensors writes files that only their owner may read
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(readable)
            _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_left(out: Path) -> None:
    """Temporary folders of exports that were killed; those of processes that run, or may run, are left alone."""
    alive = Path("/proc")
    for left in (*_left(out.parent, out), *_left(out, out)):
        pid = left.name.split(".")[-2]
        if pid == str(os.getpid()) or (alive.is_dir() and not (alive / pid).exists()):
            shutil.rmtree(left, ignore_errors=True)


def _left(place: Path, out: Path) -> set[Path]:
    return set(place.glob(f".{glob.escape(out.name)}.*.partial"))


def disk_full(error: BaseException) -> str:
    """What a full disk (or quota, or file-size limit) said, "" for other errors."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return os.strerror(number)
    torchs_writer = isinstance(error, RuntimeError) and ("inline_container" in str(error) or "iostream" in str(error))
    return "torch could not write the whole file" if torchs_writer else ""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failing disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise WorkFailed(f"no space left on the disk of {out}: free some, then try again") from error
        said = getattr(error, "strerror", None) or str(error)
        raise LoralignError(f"cannot write {out}: {said[:1].lower()}{said[1:]}; name another place") from error


def check_place(out: Path, key: str = "") -> None:
    """Raise where no folder can be made or written into; before anything is spent. key: of a file that names it."""
    if link := next((p for p in (out, *out.absolute().parents) if p.is_symlink() and not p.exists()), None):
        raise LoralignError(f"cannot write {out}: {link} is a link to nothing; remove it, or name another folder{key}")
    if out.exists() and not out.is_dir():
        raise LoralignError(f"{out} is a file: name a folder{key}")
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        kind = "not writable" if above.is_dir() else "no folder"
        raise LoralignError(f"cannot write {out}: {above} is {kind}; name another folder{key}")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise where no folder can be written, or something that must be kept lies in the way."""
    check_place(out)
    if out.is_dir() and not overwrite and set(out.iterdir()) - _left(out, out):
        raise LoralignError(f"{out} {_holds(out)}: name another folder, or pass overwrite (--overwrite)")


def _holds(out: Path) -> str:
    if not is_ours(out):
        return "is not empty and was not made by loralign"
    return "holds a trained run" if (out / "checkpoints").is_dir() else "holds an earlier result"


def _publish(temporary: Path, out: Path) -> None:
    if not out.exists():
        os.replace(temporary, out)
        return
    new = {p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file()}
    ours = is_ours(out)
    for path in sorted(new, key=lambda p: (p.name in _LAST, _LAST.index(p.name) if p.name in _LAST else 0, str(p))):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / path, out / path)
    if ours:  # a former export in another profile must not stay beside this one
        for pattern in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, GGUF, str(COMPACT), *_MODEL):
            for old in out.glob(pattern):
                if old.relative_to(out) not in new:
                    old.unlink()
