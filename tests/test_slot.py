"""What the fixed-point B0 of a twin promises: near the start that the method chose, and kept through any update of B.

24 bits of a float32 are shared: 14 hold B0, so that it is rounded by at most 2^-14 of its largest entry, and 8 more are
for an update of B of up to 256 times that entry; fewer bits round B0 visibly, more would end a run earlier.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy
from loralign import adapt, build, sites
from loralign.carrier.sites import draw_for, weight
from loralign.carrier.slot import SlotLinear, live_of, to_grid, write
from loralign.methods.init.pissa import principal_svd
from loralign.types import Recipe, WorkFailed

GROWTH = 256


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-6, 0.37, 1.0, 1.0001, 3e4])
def test_a_grid_point_is_near_and_is_its_own(size: float) -> None:
    B = size * normal(50, 8) / normal(50, 8).abs().max()
    at = to_grid(B)
    assert float((at - B).abs().max()) <= 2.0**-14 * float(B.abs().max())
    assert torch.equal(to_grid(at), at)
    assert not to_grid(torch.zeros(3, 2)).any() and to_grid(torch.zeros(0, 2)).shape == (0, 2)


def twin() -> tuple[Any, SlotLinear]:
    made = build("pissa", r=4, alpha=8.0, targets=("0",))
    assert isinstance(made, Recipe)
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(24, 40, bias=False)), made)
    side = sites(model)[0].layer.lora_B["default"]  # type: ignore[index]
    assert isinstance(side, SlotLinear)
    return model, side


def test_the_start_is_the_methods_to_the_grid() -> None:
    """‖B0 − the method's B0‖ is at most 2^-14 of the largest entry, entry by entry; A0 is the method's own."""
    model, _ = twin()
    (site,) = sites(model)
    live = live_of(site.layer, site.adapter)
    wanted = principal_svd()(weight(site), 4, site.s, None, draw_for(0, site.name))
    assert torch.equal(live.A0, wanted.A.float())
    assert 0 < float((live.B0 - wanted.B).abs().max()) <= 2.0**-14 * float(wanted.B.abs().max())


@pytest.mark.parametrize("times", [1e-6, 1.0, 30.0, GROWTH - 1.0])
def test_a_file_gives_the_start_back_whatever_was_trained(times: float) -> None:
    """Folded columns [B0 + ΔB | ΔB] hold B0 to the bit, for updates up to 256 times its largest entry."""
    _, side = twin()
    top = float(side.frozen.abs().max())
    for seed in range(20):
        update = normal(*side.live.shape, seed=seed)
        write(side.live, times * top * update / update.abs().max())
        update, start = side.unfold(side.folded(side.live))
        assert torch.equal(start, side.frozen) and torch.equal(update, side.live.detach())


def test_an_update_that_hides_the_start_is_a_diverged_run() -> None:
    _, side = twin()
    update = normal(*side.live.shape)
    write(side.live, 64 * GROWTH * float(side.frozen.abs().max()) * update)
    with pytest.raises(WorkFailed, match=f"outgrown the start by more than {GROWTH} times: the run has diverged"):
        side.folded(side.live)


def test_constants_keep_their_precision_and_never_go_to_meta() -> None:
    model, side = twin()
    start = side.frozen.clone()
    for move in (model.bfloat16, model.double, lambda: model.to("meta")):
        move()
        assert side.frozen.dtype == torch.float32 and torch.equal(side.frozen, start)


def test_what_was_loaded_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP live and frozen slots stand apart in a state dict, which a checkpoint is read into in place."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    _, side = twin()
    state, start = side.state_dict(), side.frozen.clone()
    assert set(state) == {"weight", "frozen"} and state["weight"].shape == side.live.shape
    side.load_state_dict(state)
    state["frozen"].zero_()
    assert torch.equal(side.frozen, start)


@pytest.mark.parametrize("columns", [2, 4, 6])
def test_a_file_that_lacks_the_start_is_refused(columns: int) -> None:
    """[B0 + ΔB | ΔB] has eight columns here; without them the base would move."""
    _, side = twin()
    before = side.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"a twin of rank 4 needs 8|no frozen slots in this file, the model has 4"):
        side.load_state_dict({"weight": torch.ones(40, columns)})
    assert columns == 4 or torch.equal(side.weight, before)


@pytest.mark.parametrize("name", ["pissa", "chain-of-lora", "sbora-fa", "sora"])
def test_a_forward_folds_no_weight_that_nobody_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own forward reads `lora_A.weight.dtype`; a mixed batch, a merge and a file still get the folded factor."""
    recipe = build(name, r=2)
    assert isinstance(recipe, Recipe)
    model = adapt(toy.llama(), recipe).eval()
    batch = toy.batch_for(model)
    reads: list[Any] = []
    fold = SlotLinear.weight.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(SlotLinear, "weight", property(lambda self: reads.append(self) or fold(self)))
    straight = model(**batch).logits
    assert not reads
    mixed = model(**batch, adapter_names=["default"] * len(batch["input_ids"])).logits
    assert reads and torch.allclose(mixed, straight, atol=1e-5)
