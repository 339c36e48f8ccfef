"""Where common subspaces come from: files of adapters and checkpoints, read one matrix at a time.

    adapters    X = B·A of every module, by `product_svd`, never densified; ranks and scales may differ
    deltas      X = W − W_base of every module, directions above the noise edge std(X)·(√m + √n) only
    weights     X = W: the layers of one checkpoint that share a name up to its numbers, or one module of several ones

At most two matrices are in memory. A checkpoint's keys may carry fewer or more leading parts than a model's names;
fused tensors are not taken apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from loralign.carrier.stored import CONFIG, WEIGHTS, BadInput, Broken, check_stored, read_config
from loralign.carrier.targets import PREFIX, linear_modules
from loralign.maths.linalg import product_svd, top_svd
from loralign.types import LoralignError

Leading = Callable[[], tuple[Tensor, Tensor]]
"""Reads one source and returns its leading directions U (d_out, ℓ), V (d_in, ℓ)."""

WEIGHTS_WARNING = (
    "a basis from weights alone says almost nothing about where fine-tuning moves them (it holds no more of a real "
    "gradient than random directions do): give adapters, or checkpoints with their `base`, where you have any"
)
LINEAGE = 0.3
"""‖W − W_base‖/‖W_base‖ of a fine-tuned model stays below."""


@dataclass(frozen=True)
class Target:
    """One matrix. transposed: the file stores (d_in, d_out)."""

    name: str
    d_out: int
    d_in: int
    transposed: bool = False


@dataclass(frozen=True)
class Members:
    """What to compare: readers by group. moved: filled while reading deltas with ‖W − W_base‖/‖W_base‖."""

    groups: Mapping[str, Sequence[Leading]]
    width: int
    facts: Mapping[str, Any]
    moved: list[float] = field(default_factory=list)

    def warnings(self) -> list[str]:
        found = [WEIGHTS_WARNING] if self.facts["kind"] == "weights" else []
        if self.moved and median(self.moved) > LINEAGE:
            far = f"{median(self.moved):.0%}"
            found.append(f"the sources differ from the base by {far} of its norm: are they fine-tuned from it?")
        return found


def members(sources: Sequence[Path], base: Path | None, targets: Sequence[Target] | None, width: int) -> Members:
    """List what the sources hold; nothing is read yet but headers."""
    if not sources:
        raise LoralignError("a common subspace needs at least one source")
    for path in (*sources, *([base] if base else ())):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise LoralignError(f"{path} {what}: give the folder of an adapter or a checkpoint")
    doubled = [p for i, p in enumerate(sources) if p.resolve() in [q.resolve() for q in sources[:i]]]
    if doubled:
        raise LoralignError(f"{doubled[0]} is given twice and would agree with itself: name every source once")
    facts = {"sources": [_identity(p) for p in sources], "base": _identity(base) if base else None, "width": width}
    adapters = [is_adapter(p) for p in sources]
    if any(adapters) and base:
        raise LoralignError("adapters are differences from their base already: leave `base` out")
    if len(sources) < 2 and (all(adapters) or base):
        raise LoralignError(f"{sources[0]} alone has nothing to share: give two or more adapters or fine-tuned models")
    if all(adapters):
        return Members(_of_adapters(sources, targets), width, {"kind": "adapters", **facts})
    if any(adapters):
        raise LoralignError("the sources mix adapters and checkpoints: give one kind")
    opened = [Checkpoint(p) for p in sources]
    wanted = targets_of(base or sources[0]) if targets is None else list(targets)
    if base is None:
        return Members(_of_weights(opened, wanted, width), width, {"kind": "weights", **facts})
    moved: list[float] = []
    origin = Checkpoint(base)
    groups = {t.name: [partial(_delta, c, origin, t, width, moved) for c in opened] for t in wanted}
    return Members(groups, width, {"kind": "deltas", **facts}, moved)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _identity(folder: Path) -> dict[str, str]:
    """Name of a folder and a hash of its tensor files' headers and sizes (no path)."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            digest.update(f"{file.name} {file.stat().st_size}".encode() + f.read(min(length, 1 << 26)))
    return {"name": folder.name, "headers": digest.hexdigest()}


def pattern(name: str) -> str:
    """The name with `*` for every number in it: the layers of one model that are compared with one another."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def cut(width: int, target: Target) -> int:
    """Directions taken from one matrix: at most a quarter of its smaller side, or agreement would be forced."""
    return max(1, min(width, target.d_out // 4, target.d_in // 4))


def leading(W: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Leading singular vectors U (d_out, width), V (d_in, width); pretrained spectra are flat, hence the iterations."""
    U, _, V = top_svd(W, width, oversample=2, niter=4)
    return U, V


# ------------------------------------------------------------------------------------------------------------- adapters


def _of_adapters(folders: Sequence[Path], targets: Sequence[Target] | None) -> dict[str, list[Leading]]:
    opened = [Adapter(folder) for folder in folders]
    present = dict.fromkeys(n for a in opened for n in a.names)
    names = list(present) if targets is None else [t.name for t in targets]
    groups: dict[str, list[Leading]] = {}
    for name in names:
        groups[name] = [partial(a.leading, name) for a in opened if name in a.names]
    if not any(groups.values()):
        raise LoralignError(f"the adapters hold none of the modules, {names[0]} first: is the base model the same?")
    return {name: found for name, found in groups.items() if found}


class Adapter:
    """The factors of one saved adapter, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / WEIGHTS
        try:
            self.config = read_config(folder)
            self.shapes = check_stored(folder, self.config)
        except (BadInput, Broken) as error:
            raise LoralignError(str(error)) from error

    @cached_property
    def names(self) -> dict[str, str]:
        """Module name -> key stem in the file."""
        stems = [k.removesuffix(".lora_A.weight") for k in self.shapes if k.endswith(".lora_A.weight")]
        return {stem.removeprefix(PREFIX): stem for stem in stems}

    def leading(self, name: str) -> tuple[Tensor, Tensor]:
        with reading(self.file), _opened(self.file) as f:
            stem = self.names[name]
            A, B = (f.get_tensor(f"{stem}.lora_{side}.weight").float() for side in "AB")
            fit = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
            if not fit or not (A.isfinite().all() and B.isfinite().all()):
                raise ValueError(f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} are no finite pair")
        U, S, V = product_svd(B, A)  # of any scale
        live = S / S[0].clamp_min(torch.finfo(S.dtype).tiny) > 1e-6
        return U[:, live], V[:, live]


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoint:
    """The tensors of a safetensors checkpoint, one file or many shards, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            with reading(index):
                named = json.loads(index.read_text("utf-8"))["weight_map"]
                if any(Path(v).name != v for v in named.values()):
                    raise ValueError("it names files outside of its folder")
                self.files = {k: folder / v for k, v in named.items()}
        else:
            self.files = {}
            for file in sorted(folder.glob("*.safetensors")):
                with _opened(file) as f:
                    self.files |= dict.fromkeys(f.keys(), file)
        if not self.files:
            raise LoralignError(f"{folder} holds no safetensors files: convert the checkpoint first")
        self._open: dict[Path, Any] = {}

    def key(self, name: str) -> str:
        """The key of a module's weight."""
        wanted = f"{name}.weight"
        if wanted in self.files:
            return wanted
        near = [k for k in self.files if k.endswith("." + wanted) or wanted.endswith("." + k)]
        if len(near) != 1:
            raise LoralignError(
                f"{self.folder.name} has {len(near)} tensors for {name}: it is another model, or its tensors are fused "
                "or named otherwise and must be saved again by a current transformers"
            )
        return near[0]

    def read(self, target: Target) -> Tensor:
        """W (d_out, d_in) in the dtype of the file."""
        key = self.key(target.name)
        file = self.files[key]
        if file not in self._open:
            self._open[file] = _opened(file)
        W: Tensor = self._open[file].get_tensor(key)
        W = W.T if target.transposed else W
        if tuple(W.shape) != (target.d_out, target.d_in) or not W.is_floating_point():
            raise LoralignError(
                f"{key} of {self.folder.name} is {tuple(W.shape)} {W.dtype}, wanted {(target.d_out, target.d_in)}: "
                "another model, or a quantised checkpoint, for which the unquantised one must be given"
            )
        return W


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Within: what a damaged file makes of its readers becomes one sentence."""
    try:
        yield
    except (
        SafetensorError,
        RecursionError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        re.error,
    ) as error:
        why = " ".join(str(error).split())[:120]
        raise LoralignError(f"{file.parent.name}/{file.name} is damaged ({why}): copy or save it again") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoralignError(f"{file} is missing or cut off ({error}): copy it again") from None


def targets_of(folder: Path) -> list[Target]:
    """Every linear module but the output head, from a skeleton without memory."""
    try:
        config = AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model = architecture(config)
    except Exception as error:  # whatever a class makes of sizes that are none
        raise LoralignError(f"{folder.name}/config.json makes no model of transformers: give another folder") from error
    head = model.get_output_embeddings()
    found = []
    for name, module in linear_modules(model).items():
        if module is not head:
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape  # type: ignore[misc]
            found.append(Target(name, *((columns, rows) if transposed else (rows, columns)), transposed))
    return found


def _of_weights(opened: Sequence[Checkpoint], targets: Sequence[Target], width: int) -> dict[str, list[Leading]]:
    groups: dict[str, list[Leading]] = {}
    for t in targets:
        name = t.name if len(opened) > 1 else pattern(t.name)
        groups.setdefault(name, []).extend(partial(_weight, c, t, width) for c in opened)
    return groups


def _weight(checkpoint: Checkpoint, target: Target, width: int) -> tuple[Tensor, Tensor]:
    return leading(checkpoint.read(target).float(), cut(width, target))


def _delta(
    checkpoint: Checkpoint, base: Checkpoint, target: Target, width: int, moved: list[float]
) -> tuple[Tensor, Tensor]:
    X = checkpoint.read(target).to(torch.float32, copy=True)
    origin = base.read(target)
    norm = float(torch.linalg.vector_norm(origin, dtype=torch.float32))
    X -= origin
    del origin
    moved.append(float(X.norm()) / norm if norm else 0.0)
    U, S, V = top_svd(X, cut(width, target), oversample=2, niter=4)
    edge = X.std() * (target.d_out**0.5 + target.d_in**0.5)
    return U[:, edge < S], V[:, edge < S]
