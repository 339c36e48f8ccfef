"""`spectral`: its scale follows the rank, it keeps no state without momentum, and what it leaves is plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loralign import Full, Recipe, adapt, build, optimizer, sites
from loralign.methods.build import _say_renamed
from loralign.methods.reference import Together, muon
from loralign.plan.memory import estimate
from loralign.plan.trace import Step
from toy import batch_for, llama
from trainers import attached_run


def spectral(**fields: Any) -> Recipe:
    made = build("spectral", **fields)
    assert isinstance(made, Recipe)
    return made


def test_the_scale_follows_the_rank_of_each_site() -> None:
    assert spectral().r == 64 and spectral().s() == 8.0 and spectral().max_grad_norm == 0.0
    assert spectral(r=16, alpha=8.0).s() == 2.0
    model = adapt(llama(), spectral(r=4, ranks={"q_proj": 9}))
    scales = {site.name.rsplit(".", 1)[-1]: site.s for site in sites(model)}
    assert scales["q_proj"] == pytest.approx(3.0) and scales["k_proj"] == pytest.approx(2.0)


@pytest.mark.parametrize(("momentum", "bytes_each"), [(0.8, 4), (0.0, 0)])
def test_plan_says_the_state_that_there_is(momentum: float, bytes_each: int) -> None:
    made = build("spectral", {"momentum": momentum}, r=4)
    assert isinstance(made, Recipe)
    with torch.device("meta"):
        base = llama().to("meta")
    planned = estimate(base, made, Step(rows=1, length=8))
    assert planned.optimizer_bytes == bytes_each * planned.trainable
    model = adapt(llama(), made)
    stepper = optimizer(model, made, 1e-3)
    model(**batch_for(model)).loss.backward()
    stepper.step()
    kept = sum(t.numel() * t.element_size() for st in stepper.state.values() for t in st.values())
    assert kept == planned.optimizer_bytes


def test_stop_and_resume_without_state(tmp_path: Path) -> None:
    made = build("spectral", {"momentum": 0.0}, r=4, seed=2)
    assert isinstance(made, Recipe)
    whole = attached_run(tmp_path / "whole", made)
    again = attached_run(tmp_path / "again", made, tmp_path / "whole" / "checkpoint-2")
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_old_name_says_what_to_use(caplog: pytest.LogCaptureFixture) -> None:
    _say_renamed.cache_clear()  # another test of this process may have asked
    build("muon-factors")
    assert "use spectral" in caplog.text


def test_full_fine_tuning_with_muon_is_torchs_own() -> None:
    made = build("full-muon")
    assert isinstance(made, Full) and made.optimizer is muon
    W, b = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.zeros(4))
    both = muon([{"params": [W], "lr": 0.1}, {"params": [b], "lr": 0.2, "weight_decay": 0.0}], 0.1, 0.0)
    assert isinstance(both, Together) and isinstance(muon([{"params": [W]}], 0.1, 0.0), torch.optim.Muon)
    lone = torch.optim.Muon(
        [torch.nn.Parameter(W.detach().clone())], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    (twin,) = lone.param_groups[0]["params"]
    both.param_groups[0]["lr"] = lone.param_groups[0]["lr"] = 0.05  # as a scheduler sets it
    W.grad, b.grad = torch.randn(6, 4), torch.ones(4)
    twin.grad = W.grad.clone()
    both.step()
    lone.step()
    assert torch.equal(W, twin) and torch.allclose(b, torch.full((4,), -0.2))
