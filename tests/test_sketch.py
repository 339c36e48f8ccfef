"""Sketches of gradients against exact ones: float64 oracles, real backward passes, bf16, quantised, fall-back."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from loralign import LoralignError, Recipe, adapt, build, sites
from loralign.carrier.sites import put_in, weight
from loralign.carrier.slot import live_of
from loralign.evidence import collect, exact_gradient, model_loss
from loralign.evidence.sketch import (
    Dense,
    Draws,
    Shares,
    Side,
    Staging,
    Stream,
    estimated_quality,
    orthonormal,
    triples,
)
from loralign.methods.init.lora_ga import gradient_svd
from loralign.types import Batch, Site, Sketch, TopGradient, WorkFailed
from oracles import sketch as oracle
from toy import batch_for, batches_for, bert, gpt2, llama

M, N, K = 24, 20, 8
ONLY_SKETCH: dict[str, Any] = {"exact_above": 1.0, "held_out": 0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recipe(name: str = "lora", options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options, **{"r": 2, "alpha": 4.0, **fields})
    assert isinstance(made, Recipe)
    return made


def site(m: int = M, n: int = N) -> Site:
    return Site("w", nn.Identity(), "default", m, n, 2, 1.0)


def uses(count: int, rank: int, decay: float = 0.5, tokens: int = 30) -> list[tuple[Tensor, Tensor]]:
    """δ, x of `count` micro-batches, whose gradients share `rank` decaying directions and have noise on top."""
    L, R = normal(M, rank, seed=1) * decay ** torch.arange(rank), normal(N, rank, seed=2)
    found = []
    for i in range(count):
        h = normal(tokens, rank, seed=10 + i)
        noise = 0.01 * normal(tokens, M, seed=50 + i)
        found.append((h @ L.T + noise, h @ R.T + 0.01 * normal(tokens, N, seed=80 + i)))
    return found


def run(a: Any, given: list[tuple[Tensor, Tensor]]) -> Any:
    for delta, x in given:
        a.add(delta, x)
    a.reduce()
    return a


# ------------------------------------------------------------------------------------------------------- accumulators


def test_dense_is_the_gradient() -> None:
    given = uses(3, 5)
    assert torch.allclose(run(Dense(site(), Staging()), given).G, oracle.gradient(given), atol=1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_low_rank_gradients_are_found_exactly(count: int) -> None:
    """rank G ≤ k: one pass gives the singular triples to rounding, however the micro-batches are cut."""
    L, R = normal(M, 5, seed=1), normal(N, 5, seed=2)
    given = [(h @ L.T, h @ R.T) for h in (normal(9, 5, seed=10 + i) for i in range(count))]
    U, S, V = run(Stream(site(), K, Draws(0)), given).found(5)
    wanted = oracle.leading(oracle.gradient(given), 5)
    assert torch.allclose(S[:5], wanted[1], rtol=1e-9)
    assert torch.allclose(oracle.projector(U), oracle.projector(wanted[0]), atol=1e-9)
    assert torch.allclose(oracle.projector(V), oracle.projector(wanted[2]), atol=1e-9)
    assert torch.allclose(U * S[:5] @ V.T, oracle.gradient(given), atol=1e-9)  # signs belong together


def test_further_passes_are_subspace_iteration() -> None:
    """A side pass is the exact product; each one brings the directions closer to the best."""
    given = uses(4, 8, decay=0.7)
    G = oracle.gradient(given)
    found, qualities = run(Stream(site(), 6, Draws(0)), given), []
    for _ in range(4):
        U, S, V = found.found(4)
        qualities.append(oracle.quality(U, V, G))
        assert estimated_quality(S, 4, len(qualities)) <= qualities[-1] + 1e-3
        following = run(found.next(), given)
        product = G @ following.basis if following.left else G.T @ following.basis
        assert torch.allclose(following.sum, product, atol=1e-9)
        found = following
    assert qualities[-1] >= qualities[0] and qualities[-1] > 0.9999 and qualities[0] > 0.98


@pytest.mark.parametrize("left", [True, False])
def test_one_side_is_the_thin_svd(left: bool) -> None:
    """H13's two-pass sketch: Y = G·P, P orthonormal, gives the triples of G·P·Pᵀ (or its mirror)."""
    G = normal(M, N)
    P = torch.linalg.qr(normal(N if left else M, K, seed=3)).Q
    side = Side(site(), P, left=left)
    side.add(torch.eye(M, dtype=torch.float64), G)  # δᵀ·x = G
    U, S, V = side.found(K)
    projected = G @ P @ P.T if left else P @ P.T @ G
    assert torch.allclose((U * S) @ V.T, projected, atol=1e-10)
    for X in (U, V):
        assert torch.allclose(X.T @ X, torch.eye(K, dtype=torch.float64), atol=1e-9)


def test_triples_of_deficient_products() -> None:
    """Columns without content still come back orthonormal, with value zero."""
    Y = torch.cat([normal(M, 2), torch.zeros(M, 3, dtype=torch.float64)], 1)
    P = torch.linalg.qr(normal(N, 5, seed=3)).Q
    U, S, V = triples(Y, P, 4)
    assert torch.allclose(U.T @ U, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((U * S[:4]) @ V.T, Y @ P.T, atol=1e-7) and float(S[2]) < 1e-6 * float(S[0])


def test_orthonormal_spans_the_columns() -> None:
    Y = normal(M, 5)
    Q = orthonormal(Y)
    assert torch.allclose(Q.T @ Q, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(oracle.projector(Q), oracle.projector(Y), atol=1e-10)


def test_share_of_another_gradient() -> None:
    """Equal to the dense measure up to the random probes of the norm, in [0, 1], None for G = 0."""
    U, _, V = oracle.leading(normal(M, N), 4)
    other = normal(M, N, seed=9)
    errors = []
    for seed in range(20):
        shares = Shares(site(), U.float(), V.float(), Draws(seed))
        shares.add(torch.eye(M), other.float())
        errors.append(float(shares.share() or 0) - oracle.share(U, V, other))
    assert max(map(abs, errors)) < 0.15 and abs(sum(errors) / 20) < 0.02
    whole = Shares(site(), torch.eye(M), torch.eye(N), Draws(0))
    whole.add(torch.eye(M), other.float())
    assert math.isclose(whole.share() or 0, 1.0, abs_tol=1e-5)
    silent = Shares(site(), U.float(), V.float(), Draws(0))
    silent.add(torch.zeros(3, M), torch.zeros(3, N))
    assert silent.share() is None


def test_estimated_quality() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    lost = sum(s**2 * (0.5 / s) ** 4 for s in (4.0, 2.0))
    assert math.isclose(estimated_quality(S, 2, 2), 1 - lost / 20, rel_tol=1e-6)
    assert estimated_quality(torch.zeros(4), 2, 1) == 1.0 and estimated_quality(torch.ones(4), 4, 3) == 0.0


# ------------------------------------------------------------------------------------------------------- in real models


def both(model: Any, batches: list[Batch], need: TopGradient, loss: Any = model_loss) -> tuple[Any, dict[str, Tensor]]:
    """Evidence and exact gradients of the same micro-batches."""
    found = sites(model)
    G = exact_gradient(model, found, batches[: need.micro_batches], loss)
    return collect(need, model, found, batches, loss=loss), G


def worst(evidence: Any, G: dict[str, Tensor]) -> float:
    return min(oracle.quality(d.U, d.V, G[name]) for name, d in evidence.items())


@pytest.mark.parametrize("family", [llama, gpt2, bert])
def test_exact_mode_is_the_svd(family: Any) -> None:
    """No sketch: the leading triples of the mean gradient, Conv1D in the orientation (d_out, d_in)."""
    model = put_in(family(), recipe())
    evidence, G = both(model, batches_for(model, 3), TopGradient(2, 3, None))
    for name, d in evidence.items():
        U, S, _ = oracle.leading(G[name], 4)
        assert d.exact and d.quality == 1.0
        assert torch.allclose(d.S.double(), S, rtol=1e-3)
        assert float((d.U.double().T @ U).square().sum()) > 4 - 1e-2
        assert math.isclose(d.captured, float(S.square().sum() / G[name].square().sum()), rel_tol=1e-3)


@pytest.mark.parametrize(("sketch", "least"), [(Sketch(4, 1), 0.85), (Sketch(4, 2), 0.93), (Sketch(4, 4), 0.95)])
def test_sketch_against_exact(sketch: Sketch, least: float) -> None:
    """Per site the energy of the directions over the best, and S is that of the mean gradient.

    Gradients of random weights have nearly flat spectra; benchmarks/bench_evidence.py measures real ones.
    """
    sketch = Sketch(sketch.width, sketch.passes, **ONLY_SKETCH)
    model = put_in(llama(hidden_size=64, intermediate_size=96), recipe())
    evidence, G = both(model, batches_for(model, 3), TopGradient(2, 3, sketch))
    assert not any(d.exact for d in evidence.values())
    assert worst(evidence, G) > least
    for name, d in evidence.items():
        assert math.isclose(float(d.S[0]), float(torch.linalg.matrix_norm(G[name], 2)), rel_tol=0.06)
        assert d.quality <= oracle.quality(d.U, d.V, G[name]) + 0.02  # the estimate is from below
    assert evidence.spent.micro_batches == 3 * sketch.passes


def test_micro_batches_add_up() -> None:
    """Rows of equal length in one micro-batch or in several: one gradient, one set of directions."""
    model = put_in(llama(), recipe())
    rows = {k: v[:-1] for k, v in batch_for(model, rows=5).items()}  # the last row is padded
    cut = [{k: v[i : i + 2] for k, v in rows.items()} for i in (0, 2)]
    found = sites(model)
    whole = exact_gradient(model, found, [rows], model_loss)
    parts = exact_gradient(model, found, cut, model_loss)
    for name, G in whole.items():
        assert torch.allclose(G, parts[name], atol=1e-5 * float(G.abs().max()))
    need = {n: TopGradient(2, n, Sketch(6, 2, **ONLY_SKETCH)) for n in (1, 2)}
    one, two = collect(need[1], model, found, [rows]), collect(need[2], model, found, cut)
    for name, d in one.items():
        assert torch.allclose(d.S, two[name].S, rtol=2e-2), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_checkpointing(reentrant: bool, passes: int) -> None:
    """Both kinds, also in the first block, with the values of the run without."""
    need, results = TopGradient(2, 2, Sketch(4, passes, **ONLY_SKETCH)), []
    for checkpointing in (False, True):
        base = llama(hidden_size=64, intermediate_size=96)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = put_in(base, recipe())
        model.train()
        results.append(collect(need, model, sites(model), batches_for(model, 2)))
        assert all(p.grad is None for p in model.parameters())
    for name, d in results[0].items():
        assert torch.allclose(d.S, results[1][name].S, rtol=1e-4), name
        assert torch.allclose(d.U, results[1][name].U, atol=1e-3), name


def test_dropout_masks_repeat_between_passes() -> None:
    """Every pass over a micro-batch sees the gradient of the same masks: more passes converge to it."""
    model = put_in(llama(attention_dropout=0.3, hidden_size=64, intermediate_size=96), recipe())
    model.train()
    evidence, G = both(model, batches_for(model, 2), TopGradient(2, 2, Sketch(4, 3, **ONLY_SKETCH)))
    assert worst(evidence, G) > 0.97


class Twice(nn.Module):
    """One linear map used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(40, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(torch.tanh(self.map(x)))
        return out


def test_module_used_twice() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(8, 40)
    (expected,) = torch.autograd.grad(model(x).square().mean(), [model.map.weight])
    wrapped = put_in(model, recipe(targets=("map",)))
    need = TopGradient(2, 1, Sketch(8, 1, **ONLY_SKETCH))
    d = collect(need, wrapped, sites(wrapped), [{"x": x}], loss=lambda m, b: m(b["x"]).square().mean())["map"]
    assert d.U is not None and d.V is not None and not d.exact
    assert oracle.quality(d.U, d.V, expected) > 0.995


def test_bf16_base() -> None:
    """fp32 sums of bf16 δ and x: as good as the exact gradient of the same backward passes."""
    model = put_in(llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16), recipe())
    evidence, G = both(model, batches_for(llama(), 3), TopGradient(2, 3, Sketch(4, 2, **ONLY_SKETCH)))
    assert all(d.U.dtype == d.V.dtype == d.S.dtype == torch.float32 for d in evidence.values())
    assert all(g.dtype == torch.float32 for g in G.values()) and worst(evidence, G) > 0.93


class Int8Linear(nn.Linear):
    """Weight-only int8 with one scale per row, dequantised in forward. Its weight cannot have a gradient.

    No library of quantised linear layers that trains on the CPU is a dependency of these tests; this is the same
    arithmetic as their weight-only int8. 4-bit weights (bitsandbytes) run in benchmarks/bench_evidence.py on a GPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        W = linear.weight.detach()
        self.register_buffer("scale", W.abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((W / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


def int8(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Int8Linear(module))
    return model


@pytest.mark.parametrize("name", ["lora-ga", "hrp", "hrp-sketch"])
def test_int8_base(name: str) -> None:
    """O6, H18: the gradient is that of the dequantised weight; the stored tensors stay; starts at the base."""
    quantised, plain = int8(llama()), llama()
    for key, module in quantised.named_modules():
        if isinstance(module, Int8Linear):
            plain.get_submodule(key).weight.data = module.dequantised()
    batches = batches_for(plain, 4)
    G = [
        exact_gradient(m, sites(m), batches, model_loss) for m in (put_in(quantised, recipe()), put_in(plain, recipe()))
    ]
    assert all(torch.allclose(g, G[1][key], atol=1e-5 * float(g.abs().max())) for key, g in G[0].items())
    base = int8(llama())
    before = base(**batches[0]).logits
    stored = {k: m.weight.clone() for k, m in base.named_modules() if isinstance(m, Int8Linear)}
    options = {"micro_batches": 2, "sketch": Sketch(6, 2)} if name == "lora-ga" else {"rank": 8}
    options |= {"steps": 3} if name == "hrp" else {"micro_batches": 2}
    model = adapt(base, recipe(name, options), batches)
    assert torch.equal(model(**batches[0]).logits, before)
    for s in sites(model):
        layer: Any = s.layer.get_base_layer()  # type: ignore[operator]
        assert torch.equal(layer.weight, stored[s.name])
        live = live_of(s.layer, "default")
        assert bool(live.A.any()) or bool(live.A0.any())


def torchao_int8() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def bitsandbytes_int8() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.filterwarnings("ignore")  # theirs, of many kinds
@pytest.mark.parametrize("config", [torchao_int8, bitsandbytes_int8])
def test_int8_of_a_library(config: Any, tmp_path: Path) -> None:
    """Where one is installed: gradients, weights read for a fill, the cache; the model computes the same afterwards."""
    quantisation = config()
    llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "m")
    batches = batches_for(llama(), 3)
    ways = {"lora-ga": {"micro_batches": 2}, "hrp": {"rank": 4, "steps": 2}, "hrp-sketch": {"rank": 4}, "cora-init": {}}
    for name, options in ways.items():
        states = []
        for _ in range(2):
            base = AutoModelForCausalLM.from_pretrained(
                tmp_path / "m", quantization_config=quantisation, device_map="cpu"
            ).eval()
            before = base(**batches[0]).logits
            made = recipe(name, options)
            model = adapt(base, made, batches, cache=tmp_path / "cache")
            assert torch.equal(model(**batches[0]).logits, before), name
            states.append([live_of(s.layer, "default").A for s in sites(model)])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)), name


# ---------------------------------------------------------------------------------------------- exact where it pays off


def test_small_sites_are_exact_from_the_start() -> None:
    """Where the sketch would be no smaller than the gradient."""
    model = put_in(llama(), recipe(r=8))
    evidence = collect(TopGradient(2, 1, Sketch(8, 1, **ONLY_SKETCH)), model, sites(model), batches_for(model, 1))
    assert all(d.exact for d in evidence.values())


def test_poor_sketches_are_repeated_exactly(caplog: pytest.LogCaptureFixture) -> None:
    """A flat spectrum is estimated as poor; those sites, and only those, become exact in one more pass."""
    torch.manual_seed(1)
    flat, steep = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    L = torch.randn(64, 3)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.steep = flat, steep

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x).square().mean() + (self.steep(x @ L @ L.T) @ L).square().mean()

    x = torch.randn(200, 64)
    model = put_in(Two(), recipe(targets=("flat", "steep")))
    need = TopGradient(2, 1, Sketch(4, 1, exact_above=0.1, held_out=0))
    with caplog.at_level(logging.INFO, "loralign"):
        evidence, G = both(model, [{"x": x}], need, loss=lambda m, b: m(b["x"]))
    assert (evidence["flat"].exact, evidence["steep"].exact) == (True, False)
    assert worst(evidence, G) > 0.995 and evidence.spent.micro_batches == 2
    assert "2 sketched, 1 of them repeated exactly, 0 exact from the start" in caplog.text
    alone = collect(TopGradient(2, 1, Sketch(4, 1, **ONLY_SKETCH)), model, sites(model), [{"x": x}],
                    loss=lambda m, b: m(b["x"]))  # fmt: skip
    assert (alone["flat"].quality or 0) < 0.9 and not alone["flat"].exact


def test_held_out_share_is_measured_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = put_in(llama(), recipe())
    batches = batches_for(model, 3)
    need = TopGradient(2, 2, Sketch(6, 2, exact_above=1.0, held_out=1))
    assert need.draws == 3
    with caplog.at_level(logging.DEBUG, "loralign"):
        evidence, _ = both(model, batches, need)
    other = exact_gradient(model, sites(model), batches[2:], model_loss)
    for name, d in evidence.items():
        assert d.held_out is not None and abs(d.held_out - oracle.share(d.U, d.V, other[name])) < 0.2
    mean = sum(d.held_out for d in evidence.values()) / 14
    assert abs(mean - sum(oracle.share(d.U, d.V, other[n]) for n, d in evidence.items()) / 14) < 0.04
    assert "of a held-out gradient on average over sites, least" in caplog.text
    assert sum("directions hold" in r.message and r.levelno == logging.DEBUG for r in caplog.records) == 14


def test_lora_ga_from_a_sketch_takes_the_same_first_step() -> None:
    """The start from two passes moves W as the exact start does, up to the sketch's quality."""
    steps = []
    for sketch in (None, Sketch(8, 3, **ONLY_SKETCH)):
        made = recipe("lora-ga", {"micro_batches": 2, "sketch": sketch})
        model = adapt(llama(hidden_size=96, intermediate_size=128), made, batches_for(llama(), 2))
        G = exact_gradient(model, sites(model), batches_for(llama(), 2), model_loss)
        found = {}
        for s in sites(model):
            live = live_of(s.layer, "default")
            A, B = live.A0.double(), live.B0.double()
            found[s.name] = B @ B.T @ G[s.name].double() + G[s.name].double() @ A.T @ A
        steps.append(found)
    for name, exact in steps[0].items():
        assert (steps[1][name] - exact).norm() / exact.norm() < 0.15, name
    assert gradient_svd().needs.sketch == Sketch() and gradient_svd(sketch=None).needs.sketch is None


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = put_in(llama(), recipe())
    with pytest.raises(WorkFailed, match="micro-batch 1 is nan"):
        bad = [batch_for(model), batch_for(model)]
        collect(TopGradient(2, 2, None), model, sites(model), bad, loss=_nan_at_second())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    with pytest.raises(LoralignError, match="it needs data"):
        collect(TopGradient(2, 2, None), model, sites(model), [])


def _nan_at_second() -> Any:
    seen: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(1)
        return model_loss(model, batch) * (float("nan") if len(seen) == 2 else 1.0)

    return loss


def test_weights_are_not_read_for_a_gradient() -> None:
    """The evidence needs δ and x alone."""
    model = put_in(llama(), recipe())
    for s in sites(model):
        assert weight(s).shape == (s.d_out, s.d_in)
        layer: Any = s.layer.get_base_layer()  # type: ignore[operator]
        layer.weight.requires_grad_(False)
    evidence = collect(TopGradient(2, 1, Sketch(4, 1)), model, sites(model), batches_for(model, 2))
    assert all(p.grad is None for p in model.parameters()) and len(evidence) == 14


def test_energy_of_the_gradient_is_estimated_beside_the_sketch() -> None:
    """E[‖G·Ω‖²/16] = ‖G‖²: the mean over 64 draws is near, whatever the number of increments."""
    given = uses(3, 5)
    wanted = float(oracle.gradient(given).square().sum())
    seen = [run(Stream(site(), K, Draws(seed)), given).energy() for seed in range(64)]
    assert abs(sum(seen) / 64 / wanted - 1) < 0.15
    omega = Draws(0)("norm", N, 16, given[0][0])
    assert seen[0] == pytest.approx(float((oracle.gradient(given) @ omega).square().sum()) / 16)


def test_small_gradients_do_not_vanish_in_a_sketch() -> None:
    """Its products of gradients stay in the range of fp32."""
    given = [(d.float(), x.float()) for d, x in uses(2, 5)]
    U, S, V = run(Stream(site(), K, Draws(0)), given).found(3)
    small = run(Stream(site(), K, Draws(0)), [(1e-15 * d, 1e-10 * x) for d, x in given]).found(3)
    assert torch.allclose(small[0], U, atol=1e-3) and torch.allclose(small[2], V, atol=1e-3)
    assert torch.allclose(1e25 * small[1][:3].double(), S[:3].double(), rtol=1e-3)


def test_draws_are_shared_by_sites_of_one_shape_type_and_device_only() -> None:
    draws = Draws(0)
    single, double = draws("norm", 5, 2, torch.zeros(1)), draws("norm", 5, 2, torch.zeros(1, dtype=torch.float64))
    assert draws("norm", 5, 2, torch.ones(3)) is single and double.dtype == torch.float64
    assert torch.equal(single.double(), double) and draws("norm", 5, 2, torch.zeros(1, device="meta")).is_meta


def test_a_gradient_without_leading_directions_is_not_repeated() -> None:
    """A flat spectrum: the sketch is poor, but the exact directions would hold hardly more of G."""
    torch.manual_seed(1)
    model = put_in(nn.Sequential(nn.Linear(300, 300, bias=False)), recipe(targets=("0",), r=2, alpha=4))
    x, target = torch.randn(2, 600, 300)
    need = TopGradient(2, 1, Sketch(4, 1, held_out=0))
    d = collect(need, model, sites(model), [{"x": x}], loss=lambda m, b: (m(b["x"]) - target).square().mean())["0"]
    assert not d.exact and (d.quality or 0.0) < 0.8
    assert d.captured is not None and (1 - (d.quality or 0.0)) * d.captured < 0.1


def test_evidence_rounds_nothing_of_its_own_under_autocast() -> None:
    """Collected inside a bf16 autocast: the model's forward is rounded, the sketch's algebra is not."""
    model = put_in(llama(), recipe())
    batches = batches_for(model, 2)
    need = TopGradient(2, 2, Sketch(6, 2, **ONLY_SKETCH))
    with torch.autocast("cpu", torch.bfloat16):
        found = collect(need, model, sites(model), batches)
    plain = collect(need, model, sites(model), batches)
    for name, d in found.items():
        assert d.U is not None and d.U.dtype == torch.float32
        assert torch.allclose(d.U.T @ d.U, torch.eye(d.U.shape[1]), atol=1e-5), name
        assert (d.S - plain[name].S).norm() / plain[name].S.norm() < 0.05, name
