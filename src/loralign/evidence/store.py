"""Results of evidence: the container and the cache by content hash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loralign.carrier.packed import is_packed
from loralign.carrier.slot import whole
from loralign.evidence.ranks import from_every_rank, world
from loralign.evidence.tap import Spent
from loralign.maths.whole import replacing
from loralign.types import Batch, Directions, LoralignError, Recipe, Site

log = logging.getLogger("loralign")


class Evidence(dict[str, Directions]):
    """Site name to what is known about it. spent: what it cost."""

    def __init__(self, found: Mapping[str, Directions] | None = None, spent: Spent | None = None) -> None:
        super().__init__(found or {})
        self.spent = spent or Spent()

    def facts(self) -> dict[str, Any]:
        """What is worth a line of a log: the cost, and per site the shares, without the directions; empty if none."""
        if not self:
            return {}
        told = ("captured", "held_out", "quality", "exact", "note")
        sites = {n: {k: v for k in told if (v := getattr(d, k)) not in (None, "")} for n, d in self.items()}
        return {**asdict(self.spent), "sites": sites}

    def on_cpu(self) -> Evidence:
        """The same, to be sent to other ranks."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.cpu()

        return Evidence({n: replace(d, U=moved(d.U), V=moved(d.V)) for n, d in self.items()}, self.spent)


def _bytes(t: Tensor) -> bytes:
    copy = t.detach().to("cpu", copy=True).contiguous()  # numpy pins the storage it sees, which FSDP2 must resize
    return copy.view(torch.uint8).numpy().tobytes()


def weights_sample(model: nn.Module) -> bytes:
    """A strided sample of each of the base's parameters."""
    found = []
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            stored = p.detach()
            if is_packed(stored):  # no views of its numbers
                stored = stored.dequantize()
            flat = whole(stored).reshape(-1)
            found.append(b"" if flat.is_meta else _bytes(flat[:: max(1, flat.numel() // 1024)]))
    return b"".join(found)


def check_replicas(model: nn.Module, recipe: Recipe) -> None:
    """Raise where this process holds other weights than the others: its evidence, and what it reads of W, is wrong."""
    if world() == 1:
        return
    found = from_every_rank(hashlib.blake2b(weights_sample(model), digest_size=16).hexdigest())
    if len(set(found)) > 1:
        raise LoralignError(
            f"the processes hold different base weights, and {recipe.name} starts from them: set "
            "cpu_ram_efficient_loading: false, which leaves all but the first one empty, or load the same model on each"
        )


def evidence_key(
    need: Any, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], seed: int, loss: float
) -> str:
    """Content hash of settings, named files, weights (a strided sample of each), every rank's data and its loss there.

    loss: of the first micro-batch; it tells other loss functions apart.
    """
    digest = hashlib.blake2b(digest_size=16)
    rank_of = getattr(need, "rank", lambda r: None)
    settings = [(f.name, getattr(need, f.name)) for f in fields(need) if not callable(getattr(need, f.name))]
    about = [(s.name, s.r, s.s, s.d_out, s.d_in, rank_of(s.r)) for s in sites]
    digest.update(repr((type(need).__name__, settings, seed, about, f"{loss:.4g}")).encode())
    for folder in filter(None, (*getattr(need, "sources", ()), getattr(need, "base", None))):
        digest.update(folder_state(Path(folder)).encode())
    digest.update(weights_sample(model))
    data = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for name, value in sorted(batch.items()):
            data.update(name.encode() + (_bytes(value) if isinstance(value, Tensor) else repr(value).encode()))
    digest.update(repr(from_every_rank(data.hexdigest())).encode())
    return digest.hexdigest()


def folder_state(path: Path) -> str:
    """Names, sizes and times of the tensor files in a folder (or of one file)."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()])


def cache_folder(folder: Path) -> Path:
    """The folder, made where it was not: found before anything is collected for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if isinstance(error, FileExistsError) else f"cannot be made ({error.strerror})"
        raise LoralignError(f"the cache {folder} {what}: name another folder in `cache`") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LoralignError(f"the cache {folder} is not writable: name another folder in `cache`")
    return folder


def save_evidence(path: Path, found: Evidence) -> None:
    """Kept whole or not at all."""
    tensors, facts = {}, {}
    for name, d in found.items():
        sides = (("U", d.U), ("S", d.S), ("V", d.V))
        tensors.update({f"{name}|{k}": v.clone().contiguous() for k, v in sides if v is not None})  # sites may share
        facts[name] = [d.captured, d.exact, d.note, d.held_out, d.quality]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts), "spent": json.dumps(asdict(found.spent))})


def load_evidence(path: Path, sites: Sequence[Site]) -> Evidence | None:
    """What `save_evidence` wrote about these sites; None where there is no such file, or none that can be used."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            facts, spent = json.loads(f.metadata()["facts"]), json.loads(f.metadata()["spent"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - not a mapping
        sides = {n: (tensors.get(f"{n}|U"), tensors[f"{n}|S"], tensors.get(f"{n}|V")) for n in facts}
        found = {n: Directions(*sides[n], *facts[n]) for n in facts}
        _check(found, sites)
        return Evidence(found, Spent(**{**spent, "cached": True}))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        log.warning("the kept evidence %s cannot be read (%s): it is collected again", path.name, error)
        return None


def _check(found: Mapping[str, Directions], sites: Sequence[Site]) -> None:
    """Raise ValueError where this is not about these sites, or not of the form that was written."""
    if found.keys() != {s.name for s in sites}:
        raise ValueError("it is about other modules")
    for site in sites:
        d = found[site.name]
        sides = [(t, n) for t, n in ((d.U, site.d_out), (d.V, site.d_in)) if t is not None]
        if not sides or d.S.ndim != 1 or any(tuple(t.shape) != (n, len(d.S)) for t, n in sides):
            raise ValueError(f"the directions of {site.name} have other shapes")
        if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (d.S, *(t for t, _ in sides))):
            raise ValueError(f"the directions of {site.name} are not finite")
        shares = (d.captured, d.held_out, d.quality)
        if not all(x is None or isinstance(x, (int, float)) for x in shares) or not isinstance(d.note, str):
            raise ValueError(f"the facts of {site.name} are none")
