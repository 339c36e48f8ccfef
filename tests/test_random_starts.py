"""The starts that draw both factors: their laws and bounds, from streams of their own, keyed by the module."""

from __future__ import annotations

import pytest
import torch

from loralign.carrier.sites import draw_for
from loralign.methods.init.gaussian import gaussian
from loralign.methods.init.kaiming_both import kaiming_both
from loralign.types import Init, Start, Weight

D_OUT, D_IN, R = 600, 400, 24


def start(init: Init, name: str = "w") -> Start:
    return init(Weight(name, (D_OUT, D_IN), lambda: torch.zeros(D_OUT, D_IN)), R, 1.0, None, draw_for(3, name))


def test_gaussian_has_standard_deviation_0_02() -> None:
    made = start(gaussian())
    for X in (made.A, made.B):
        assert float(X.std()) == pytest.approx(0.02, rel=0.03) and abs(float(X.mean())) < 1e-3


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
