"""The starts that draw both factors: their laws and bounds, from streams of their own, keyed by the module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loralign import adapt, build
from loralign.carrier.sites import draw_for
from loralign.methods.init.gaussian import Gaussian, gaussian
from loralign.methods.init.kaiming import kaiming, kaiming_frozen
from loralign.methods.init.kaiming_both import kaiming_both
from loralign.train.start import is_trained
from loralign.types import Directions, Draw, Init, Recipe, Start, Weight, WorkFailed
from toy import llama

D_OUT, D_IN, R = 600, 400, 24


def start(init: Init, name: str = "w") -> Start:
    return init(Weight(name, (D_OUT, D_IN), lambda: torch.zeros(D_OUT, D_IN)), R, 1.0, None, draw_for(3, name))


def test_gaussian_has_standard_deviation_0_02() -> None:
    made = start(gaussian())
    for X in (made.A, made.B):
        assert float(X.std()) == pytest.approx(0.02, rel=0.03) and abs(float(X.mean())) < 1e-3


def test_kaiming_has_the_law_of_pefts_own_start() -> None:
    """`kaiming_uniform_` with a = √5, and B = 0."""
    made, frozen = start(kaiming()), start(kaiming_frozen())
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(R, D_IN), a=5**0.5, generator=torch.Generator().manual_seed(0))
    bound = D_IN**-0.5
    for A in (made.A, theirs):
        assert bound * 0.99 < float(A.abs().max()) <= bound
        assert float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.03) and abs(float(A.mean())) < 0.03 * bound
    assert not made.B.any() and made.B.shape == (D_OUT, R)
    assert torch.equal(made.A, frozen.A) and not frozen.B.any() and (made.train, frozen.train) == ("AB", "B")


def test_kaiming_both_is_uniform_by_each_factors_own_fan_in() -> None:
    made = start(kaiming_both())
    for X, fan_in in ((made.A, D_IN), (made.B, R)):
        bound = (6 / fan_in) ** 0.5
        assert bound * 0.99 < float(X.abs().max()) <= bound
        assert float(X.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("init", [gaussian(), kaiming_both()], ids=["gaussian", "kaiming_both"])
def test_draws_are_keyed_and_apart(init: Init) -> None:
    made, again, other = start(init), start(init), start(init, "v")
    assert torch.equal(made.A, again.A) and torch.equal(made.B, again.B)
    assert not torch.equal(made.A, other.A)
    assert not torch.equal(made.A.flatten()[:100], made.B.flatten()[:100])
    assert made.train == "AB" and not made.twin and init.fits(D_OUT, D_IN, R) == ""


@dataclass(frozen=True)
class MovesOne(Gaussian):
    """B is zero but for one module of a real size."""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        made = super().__call__(W, r, s, evidence, draw)
        return made if W.name.endswith("1.mlp.up_proj") else Start(made.A, torch.zeros_like(made.B))


def test_a_start_that_moves_a_module_is_refused_by_its_name() -> None:
    recipe = build("lora", r=2)
    assert isinstance(recipe, Recipe)
    with pytest.raises(WorkFailed, match=r"the init of lora moves model\.layers\.1\.mlp\.up_proj away from W0"):
        adapt(llama(), replace(recipe, init=MovesOne()))


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_start_reads_as_little_from_many_modules_as_from_few() -> None:
    """On a GPU that several processes share every read waits for the others' kernels."""
    found = []
    for layers in (1, 6):
        model = llama(num_hidden_layers=layers)
        with Reads() as reads:
            adapted = adapt(model, build("lora", r=2))
            assert not is_trained(adapted)
        found.append(reads.found)
    assert found[0] == found[1] < 20
