"""`maths.jacobi`: eigenvectors of many matrices at once, beside LAPACK's; what decides between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy
from loralign import Recipe, adapt, build, optimizer
from loralign.maths import jacobi as room
from loralign.maths.jacobi import eigh, jacobi
from loralign.methods.transform import lora_pro, lora_rite


def matrices(r: int, dtype: torch.dtype) -> Tensor:
    """Well and ill conditioned, of low rank, 0, I, −I, ones with equal and with negative eigenvalues, tiny and huge."""
    torch.manual_seed(r)
    X = torch.randn(9, r, 2 * r, dtype=dtype)
    X[1] *= torch.logspace(0, -8, r, dtype=dtype)[:, None]
    X[2, :, 1:] = 0
    X[3] = 0
    H = X @ X.mT
    Q = torch.linalg.qr(X[0]).Q
    equal = torch.arange(r, dtype=dtype) // 2
    H[4], H[5], H[6] = torch.eye(r), -torch.eye(r), (Q * (equal - r // 4)) @ Q.mT
    H[7] *= 1e-30
    H[8] *= 1e30
    return (H + H.mT) / 2


@pytest.mark.parametrize("r", [1, 2, 3, 10, 32, 33, 34, 64, 100])
def test_it_is_lapacks(r: int) -> None:
    dtype = torch.float32
    H = matrices(r, dtype)
    lam, E = jacobi(H)
    wanted, _ = torch.linalg.eigh(H)
    size = H.double().flatten(1).norm(dim=1).clamp_min(1e-38)
    limit = 3 * r**0.5 * torch.finfo(dtype).eps
    rest = (H.double() @ E.double() - E.double() * lam.double()[:, None, :]).flatten(1).norm(dim=1)
    assert lam.dtype == E.dtype == dtype and bool((lam.diff(dim=1) >= 0).all())
    assert float((rest / size).max()) < limit
    assert float(((lam - wanted).abs().amax(1).double() / size).max()) < limit
    assert float((E.mT @ E - torch.eye(r, dtype=dtype)).abs().max()) < limit


def test_small_eigenvalues_keep_what_the_precision_knows() -> None:
    """Those of a matrix of rank 3 stay far below the cut of 1e-6 at which transforms call a direction dead."""
    X = torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(0))
    lam, _ = jacobi(X @ X.mT)
    assert float((lam[:, :-3].abs() / lam[:, -1:]).max()) < 5e-7 and bool((lam[:, -3:] > 0.1 * lam[:, -1:]).all())


@pytest.mark.parametrize(("r", "most"), [(32, 1), (34, 6), (64, 6), (128, 8)])
def test_sweeps_are_few(r: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convergence is quadratic at the end, and rounding does not keep it from ending."""
    calls: list[Tensor] = []
    inner = room._near_identity
    monkeypatch.setattr(room, "_near_identity", lambda P: (calls.append(P), inner(P))[1])
    X = torch.randn(9, r, 2 * r, generator=torch.Generator().manual_seed(0))
    jacobi(X @ X.mT)
    assert len(calls) <= most * max(1, 2 * -(-r // 32) - 1)
    assert all(P.shape[-1] <= room.BATCHED for P in calls)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 8])
def test_in_a_sweep_every_two_blocks_meet_once(pairs: int) -> None:
    order, blocks = room._round(pairs, 2, torch.device("cpu")).tolist(), list(range(4 * pairs))
    met: list[tuple[int, ...]] = []
    for _ in range(max(1, 2 * pairs - 1)):
        met += [tuple(sorted({i // 2 for i in blocks[k : k + 4]})) for k in range(0, 4 * pairs, 4)]
        blocks = [blocks[i] for i in order]
    assert sorted(met) == [(i, j) for i in range(2 * pairs) for j in range(i + 1, 2 * pairs)]
    assert blocks == list(range(4 * pairs))


def test_leading_dimensions_and_numbers_that_are_not_finite() -> None:
    H = matrices(6, torch.float64)[:4].reshape(2, 2, 6, 6)
    lam, E = jacobi(H)
    assert lam.shape == (2, 2, 6) and E.shape == H.shape
    assert torch.allclose(lam[1], jacobi(H[1])[0], rtol=0, atol=1e-12 * float(H[1].abs().max()))
    for bad in (torch.nan, torch.inf):
        broken = H.clone()
        broken[1, 0, 2, 3] = bad
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinity"):
            jacobi(broken)


class OnCuda:
    """Stands for a tensor of a GPU: only what decides is asked of it."""

    is_cuda = True
    dtype = torch.float32

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@pytest.mark.parametrize(
    ("shape", "ours"),
    [
        ((9, 64, 64), True), ((2, 9, 34, 34), True), ((9, 256, 256), True), ((9, 32, 32), False), ((9, 33, 33), True),
        ((64, 64), False), ((1, 64, 64), False), ((9, 257, 257), False),
    ],
    ids=str,
)  # fmt: skip
def test_which_matrices_are_rotated(shape: tuple[int, ...], ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "jacobi", lambda H: "ours")
    monkeypatch.setattr(torch.linalg, "eigh", lambda H: ("torch's", ""))
    taken: Any = eigh(OnCuda(*shape))  # type: ignore[arg-type]
    assert (taken == "ours") is ours
    assert eigh(torch.eye(64).expand(9, 64, 64))[0] == "torch's"  # type: ignore[comparison-overlap]


def trained(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    recipe = build(name, options, r=4, alpha=8.0, seed=3)
    assert isinstance(recipe, Recipe)
    model: nn.Module = adapt(toy.llama().double(), recipe)
    stepper = optimizer(model, recipe, lr=1e-2)
    for k in range(4):
        model(**toy.batch_for(model, seed=k)).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "options", "where"),
    [("lora-pro", {}, lora_pro), ("lora-pro", {"moments": "full"}, lora_pro), ("lora-rite", {}, lora_rite)],
    ids=["lora-pro", "full", "lora-rite"],
)
def test_steps_do_not_depend_on_who_decomposes(
    name: str, options: dict[str, Any], where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained(name, options)
    seen: list[int] = []

    def counted(H: Tensor, rotate: Callable[[Tensor], tuple[Tensor, Tensor]] = jacobi) -> tuple[Tensor, Tensor]:
        seen.append(H.shape[-1])
        return rotate(H)

    monkeypatch.setattr(where, "eigh", counted)
    found = trained(name, options)
    assert seen and set(seen) == {4}
    for key, value in wanted.items():
        assert float((found[key] - value).abs().max()) < 1e-7 * float(value.abs().max()), key
