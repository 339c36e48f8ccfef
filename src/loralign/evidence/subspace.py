"""Directions that several sources share, and the basis file that several runs can use.

    T = [U_1 … U_J],  T = Q·Σ·(·)ᵀ,  e_i = σ_i²/J        mean squared cosine between q_i and the sources' subspaces
    λ_null = [1 + (J − 2)g + 2√((J − 1)g(1 − g))]/J,  g = ℓ/m        upper edge for J random subspaces of dimension ℓ

U_j (m, ℓ): the leading left (or right) singular vectors of source j. e is free of every source's scale, 1 where all
agree; a direction counts as shared where e_i > 1.05·λ_null. The columns are ordered, so one basis serves every rank.

    >>> import torch
    >>> from loralign.evidence.subspace import Consensus
    >>> eye, consensus = torch.eye(6), Consensus(keep=2)
    >>> for other in (1, 2, 3): consensus.add(eye[:, [0, other]])
    >>> shared = consensus.shared()
    >>> round(float(shared.share[0]), 4), shared.basis[0, 0].item(), shared.significant
    (1.0, 1.0, 1)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loralign.evidence.sources import Members, Target, is_adapter, members, pattern
from loralign.maths.linalg import canonical_columns, top_svd
from loralign.maths.whole import replacing
from loralign.types import LoralignError

log = logging.getLogger("loralign")

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")
MARGIN = 1.05
"""A share this much above the null level counts."""
FORMAT = 1


def null_level(g: float, sources: int) -> float:
    """λ_null of the module docstring; 1 for a single source, which shares nothing with anyone."""
    if sources < 2:
        return 1.0
    return min(1.0, (1 + (sources - 2) * g + 2 * ((sources - 1) * g * max(0.0, 1 - g)) ** 0.5) / sources)


@dataclass(frozen=True)
class Shared:
    """What the sources share on one side. basis: (m, k) orthonormal, best first. share: (k,) e. null: λ_null."""

    basis: Tensor
    share: Tensor
    null: float
    sources: int

    @property
    def significant(self) -> int:
        """Number of leading directions above the null level."""
        return int((self.share > MARGIN * self.null).sum())


class Consensus:
    """The running consensus of one group: one subspace at a time; more than 2·cap columns are compressed to cap."""

    def __init__(self, keep: int, cap: int | None = None) -> None:
        self.keep, self.cap = keep, cap or 8 * keep
        self.columns: list[Tensor] = []
        self.widths: list[int] = []

    def add(self, U: Tensor) -> None:
        """U (m, ℓ) orthonormal; ℓ = 0 for a source without directions of its own, which then agrees with nobody."""
        self.widths.append(U.shape[1])
        self.columns.append(U)
        if sum(c.shape[1] for c in self.columns) > 2 * self.cap:
            Q, S = self._leading(self.cap)
            self.columns = [Q * S]

    def _leading(self, k: int) -> tuple[Tensor, Tensor]:
        T = torch.cat(self.columns, dim=1)
        if not min(T.shape):
            return T, T.new_zeros(0)
        Q, S, _ = top_svd(T, min(k, *T.shape), niter=8)
        return Q, S

    def shared(self) -> Shared:
        Q, S = self._leading(self.keep)
        J, heard = len(self.widths), sum(w > 0 for w in self.widths)
        g = sum(self.widths) / max(1, heard) / max(1, Q.shape[0])
        null = null_level(g, heard) * max(1, heard) / J
        live = S.square() / J > 1e-6
        return Shared(canonical_columns(Q[:, live]), S[live].square() / J, null, J)


@dataclass(frozen=True)
class Basis:
    """Shared directions by group: a module name, or one with `*` for every number in it (layers of one model)."""

    groups: Mapping[str, Mapping[Side, Shared]]
    facts: Mapping[str, Any]
    """kind: adapters | deltas | weights. sources, base, width: where it comes from."""

    def at(self, name: str) -> Mapping[Side, Shared] | None:
        """The group of a module, None where the sources have nothing to say about it."""
        for key in (name, pattern(name)):
            if key in self.groups:
                return self.groups[key]
        return None


def check_sources(sources: Sequence[str], base: str | None = None) -> None:
    """Raise where these cannot be the sources of a subspace; before anything is spent, only headers are read."""
    paths = [Path(s) for s in sources]
    if len(paths) == 1 and paths[0].is_file():
        read_basis(paths[0])
    elif paths:
        members(paths, Path(base) if base else None, None if all(map(is_adapter, paths)) else [], 1)


def extract(
    sources: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    targets: Sequence[Target] | None = None,
    width: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> Basis:
    """What the sources share, streamed from their files one matrix at a time; no model is built.

    Args:
        sources: folders of adapters (adapter_config.json) or of checkpoints (safetensors).
        base: the checkpoint that the sources were fine-tuned from: their deltas are compared instead of their weights.
        targets: the matrices; None: all modules of the adapters, or all linear ones but the head of the checkpoints.
        width: leading directions taken from each source.
    Raises:
        LoralignError: unreadable or mismatched sources, with the mend.
    """
    return consensus_of(members([Path(s) for s in sources], Path(base) if base else None, targets, width), progress)


def consensus_of(found: Members, progress: Callable[[str, int, int], None] | None = None) -> Basis:
    """The basis of already listed members; each one is read, decomposed and dropped."""
    groups: dict[str, Mapping[Side, Shared]] = {}
    done, total = 0, sum(len(m) for m in found.groups.values())
    for name, leading in found.groups.items():
        left, right = Consensus(found.width), Consensus(found.width)
        for read in leading:
            U, V = read()
            left.add(U)
            right.add(V)
            done += 1
            if progress:
                progress("subspaces", done, total)
        groups[name] = {"left": left.shared(), "right": right.shared()}
    for warning in found.warnings():
        log.warning("%s", warning)
    _warn_of_shared_start(found.facts["kind"], groups)
    return Basis(groups, found.facts)


def _warn_of_shared_start(kind: str, groups: Mapping[str, Mapping[Side, Shared]]) -> None:
    rows = [g["right"] for g in groups.values() if g["right"].sources > 1 and len(g["right"].share)]
    if kind == "adapters" and rows and sum(float(s.share.mean()) > 0.9 for s in rows) > len(rows) / 2:
        log.warning(
            "the adapters span nearly the same rows, as adapters do that started from one seed: their right sides say "
            "nothing about the tasks; use the left ones"
        )


# ----------------------------------------------------------------------------------------------------------- basis file


def write_basis(path: Path, basis: Basis) -> None:
    """A safetensors file: `<group>|<side>` (m, k) and `<group>|<side>|share` (k,), everything else in the metadata."""
    tensors, rows = {}, {}
    for name, sides in basis.groups.items():
        for side, shared in sides.items():
            tensors[f"{name}|{side}"] = shared.basis.float().contiguous()
            tensors[f"{name}|{side}|share"] = shared.share.float().contiguous()
            rows[f"{name}|{side}"] = [shared.null, shared.sources]
    about = {"format": FORMAT, "loralign": version("loralign"), "facts": dict(basis.facts), "groups": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"loralign_basis": json.dumps(about)})
        temporary.chmod(0o644)


def read_basis(path: Path) -> Basis:
    """A basis that `write_basis` wrote."""
    if not path.is_file():
        raise LoralignError(f"{path} {'is a folder' if path.exists() else 'does not exist'}: name a basis file")
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get("loralign_basis", "null"))
            if about["format"] != FORMAT:
                raise ValueError("of another version")
            groups: dict[str, dict[Side, Shared]] = {}
            for key, (null, count) in about["groups"].items():
                name, side = key.rsplit("|", 1)
                shared = Shared(f.get_tensor(key), f.get_tensor(f"{key}|share"), null, count)
                groups.setdefault(name, {})[side] = shared
        basis = Basis(groups, about["facts"])
        _check(basis)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LoralignError(f"{path.name} is no basis file: make one with `loralign subspace extract`") from None
    except OSError as error:
        raise LoralignError(f"cannot read the basis file {path}: {error}") from None
    return basis


def _check(basis: Basis) -> None:
    """Raise ValueError, TypeError or KeyError for what `write_basis` does not write."""
    facts = basis.facts
    named = [*facts["sources"], *([facts["base"]] if facts.get("base") else [])]
    if facts["kind"] not in ("adapters", "deltas", "weights") or not all(isinstance(s["name"], str) for s in named):
        raise ValueError("facts")
    for sides in basis.groups.values():
        for s in (sides[side] for side in SIDES):
            if (
                s.basis.ndim != 2
                or tuple(s.share.shape) != (s.basis.shape[1],)
                or not 0 <= s.null <= 1
                or s.sources < 1
            ):
                raise ValueError("shapes")
            if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (s.basis, s.share)):
                raise ValueError("numbers")


def show_basis(basis: Basis, r: int = 16) -> str:
    """A table: per group and side how many directions are shared, the first and the r-th share, and the null level."""
    facts = basis.facts
    names = ", ".join(s["name"] for s in facts["sources"])
    lines = [f"{facts['kind']} of {names}" + (f" over {facts['base']['name']}" if facts.get("base") else "")]
    wide = max((len(n) for n in basis.groups), default=5)
    head = f"{'shared':>7} {'first':>6} {f'{r}th':>6} {'null':>6}"
    lines += [f"{'':{wide}}  {'left':^28}  {'right':^28}", f"{'group':{wide}}  {head}  {head}"]
    for name, sides in basis.groups.items():
        cells = []
        for side in SIDES:
            s = sides[side]
            first = f"{float(s.share[0]):6.2f}" if len(s.share) else "     -"
            last = f"{float(s.share[r - 1]):6.2f}" if len(s.share) >= r else "     -"
            cells.append(f"{s.significant:7d} {first} {last} {s.null:6.2f}")
        lines.append(f"{name:{wide}}  {'  '.join(cells)}")
    lines.append(
        f"left: outputs (B's side), right: inputs (A's). shared: directions beyond chance. first, {r}th: how far the "
        "sources\nagree on that one, 1 where all do. null: what as many random subspaces reach."
    )
    return "\n".join(lines)
