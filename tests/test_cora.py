"""CoRA's oracles C1–C11 (methods/hrp_cora.md §7), its sources, and the factor that stays frozen."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralign import LoralignError, Recipe, adapt, build, optimizer, peft_config, sites
from loralign.carrier.layer import low_rank
from loralign.carrier.sites import draw_for, put_in
from loralign.config.recipe import parse, to_recipe
from loralign.evidence import collect
from loralign.evidence.shared import choose_side
from loralign.evidence.sources import Checkpoint, Members, Target, leading
from loralign.evidence.subspace import (
    Basis,
    Consensus,
    Shared,
    check_sources,
    consensus_of,
    extract,
    null_level,
    read_basis,
    show_basis,
    write_basis,
)
from loralign.maths import draws
from loralign.maths.draws import keyed_generator, keyed_normal
from loralign.maths.linalg import top_svd
from loralign.methods.init.cora import common_basis, common_start
from loralign.train.attach import attach
from loralign.types import CommonSubspace, Directions, Weight
from oracles import cora as oracle
from oracles.sketch import projector
from toy import batch_for, gpt2, llama
from toy_sources import SHARED, adapters, fine_tunes, planted
from trainers import toy_trainer

MODES = ("cora", "cora-init")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(m, k, seed=seed)).Q


def consensus(bases: list[Tensor], keep: int, cap: int | None = None) -> Shared:
    found = Consensus(keep, cap)
    for U in bases:
        found.add(U)
    return found.shared()


def recipe(name: str, sources: Any = (), options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, {"sources": sources, **(options or {})}, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return adapters(llama, tmp_path_factory.mktemp("adapters"))


def factor(model: Any, index: int, side: str) -> Any:
    return getattr(sites(model)[index].layer, f"lora_{side}")["default"].weight


# ------------------------------------------------------------------------------------------------------- the consensus


def test_planted_common_basis() -> None:
    """C4: three directions in all of five sources, four of each one's own and three times as strong."""
    Q = orthonormal(40, 23)
    common, own = Q[:, :3], [Q[:, 3 + 4 * j : 7 + 4 * j] for j in range(5)]
    bases = [torch.cat([common, N], 1) @ orthonormal(7, 7, seed=j) for j, N in enumerate(own)]
    found = consensus(bases, keep=23)
    wanted = torch.tensor([1.0] * 3 + [0.2] * 20, dtype=torch.float64)
    assert torch.allclose(found.share, wanted, atol=1e-10) and found.significant == 3
    assert (projector(found.basis[:, :3]) - projector(common)).abs().max() < 1e-12
    vectors, values = oracle.consensus(bases, 3)
    assert torch.allclose(values, found.share[:3], atol=1e-12)
    assert torch.allclose(projector(vectors), projector(found.basis[:, :3]), atol=1e-12)
    stack = oracle.normalised_stack([torch.cat([common, 3 * N], 1) for N in own], 3)
    assert torch.linalg.matrix_norm(projector(stack) - projector(common), 2) > 0.999


def test_invariances() -> None:
    """C5: scale, rotation of a source's columns and order do not matter; a rotation of the space carries through."""
    X = [normal(30, 6, seed=j) + 3 * orthonormal(30, 6, seed=99) for j in range(4)]

    def basis(sources: list[Tensor]) -> Tensor:
        return projector(consensus([top_svd(x, 5)[0] for x in sources], keep=4).basis[:, :4])

    reference, turn = basis(X), orthonormal(30, 30, seed=7)
    assert torch.allclose(basis([x * c for x, c in zip(X, (1e3, 1e-3, 1.0, 5.0), strict=True)]), reference, atol=1e-11)
    assert torch.allclose(basis([x @ orthonormal(6, 6, seed=j) for j, x in enumerate(X)]), reference, atol=1e-11)
    assert torch.allclose(basis([X[i] for i in (2, 0, 3, 1)]), reference, atol=1e-11)
    assert torch.allclose(basis([turn @ x for x in X]), turn @ reference @ turn.T, atol=1e-11)


def test_deltas_beat_weights() -> None:
    """C6, C10: weights give SVD(W0), which knows nothing of a new delta; deltas give the space where it lies."""
    m, n, r = 60, 50, 3
    W0 = (orthonormal(m, n) * torch.linspace(10, 1, n, dtype=torch.float64)) @ orthonormal(n, n, seed=1).T
    Q = orthonormal(m, r, seed=2)
    deltas = [Q @ normal(r, n, seed=10 + j) for j in range(6)]
    deltas = [0.04 * torch.linalg.matrix_norm(W0, 2) / torch.linalg.matrix_norm(D, 2) * D for D in deltas]
    *known, new = deltas

    def held(sources: list[Tensor], k: int) -> float:
        B = consensus([top_svd(X, k)[0] for X in sources], keep=k).basis[:, :k]
        return float((B.T @ new).square().sum() / new.square().sum())

    assert math.isclose(held(known, r), 1.0, abs_tol=1e-9)
    assert held([W0 + D for D in known], 8) < 0.3
    noisy = [D + 0.06 * D.norm() / (m * n) ** 0.5 * normal(m, n, seed=50 + j) for j, D in enumerate(known)]
    assert held(noisy, r) > 0.98


@pytest.mark.parametrize(("m", "width", "count"), [(1024, 32, 2), (1024, 32, 8), (1024, 64, 8), (1024, 16, 16)])
def test_null_level(m: int, width: int, count: int) -> None:
    """C7: the formula is the top share of random subspaces within 3 %; none of them counts as shared."""
    keys = [keyed_generator(m, width, count, j) for j in range(count)]
    found = consensus([draws.orthonormal(m, width, key).double() for key in keys], keep=width)
    assert math.isclose(found.null, oracle.null_level(width / m, count), rel_tol=1e-12)
    assert math.isclose(float(found.share[0]), found.null, rel_tol=0.03)
    assert found.significant == 0


def test_null_level_of_few_sources() -> None:
    assert null_level(0.1, 1) == 1.0 and null_level(0.5, 2) == 1.0
    ours, others = (
        [draws.orthonormal(60, 8, keyed_generator(j)) for j in range(first, first + 300)] for first in (0, 1000)
    )
    overlap = [float((a.T @ b).square().sum() / 8) for a, b in zip(ours, others, strict=True)]
    assert math.isclose(sum(overlap) / 300, 8 / 60, rel_tol=0.03)  # mean squared cosine of two random subspaces


def test_a_source_without_directions_agrees_with_nobody() -> None:
    U = orthonormal(20, 3)
    assert torch.allclose(consensus([U, U, U, U[:, :0]], keep=3).share, torch.full((3,), 0.75, dtype=torch.float64))
    assert consensus([U[:, :0], U[:, :0]], keep=3).significant == 0


@pytest.mark.parametrize(("scale", "limit"), [(0.1, 0.05), (0.04, 0.15)])
def test_compressed_stream_is_the_whole(scale: float, limit: float) -> None:
    """C8: merge-and-truncate finds the planted space as the uncapped consensus does, in any order."""
    m, planted_width, q = 256, 8, 16
    Q = orthonormal(m, planted_width)
    bases = []
    for j in range(12):
        X = scale * 2**0.5 * Q @ normal(planted_width, m, seed=j) + 0.02 * normal(m, m, seed=100 + j)
        bases.append(top_svd(X.bfloat16().float(), q)[0].double())
    whole, capped = consensus(bases, 8, cap=10_000), consensus(bases, 8, cap=32)
    shuffled = consensus(bases[::-1], 8, cap=32)

    def distance(found: Shared) -> float:
        return float(torch.linalg.matrix_norm(projector(found.basis[:, :8]) - projector(Q), 2))

    assert distance(whole) < limit and distance(capped) < 1.1 * limit and distance(shuffled) < 1.1 * limit
    assert capped.significant == whole.significant == 8
    assert torch.allclose(capped.share[:8], whole.share[:8], atol=0.02)


@pytest.mark.parametrize(("decay", "least"), [(0.0, 0.94), (0.5, 0.999), (1.0, 0.9999)])
def test_leading_directions_hold_the_energy(decay: float, least: float) -> None:
    """C9: our decomposition of one source against the exact one, σ_i = i^-decay."""
    n, k = 512, 32
    S = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    W = normal(n, n) if decay == 0 else (orthonormal(n, n) * S) @ orthonormal(n, n, seed=1).T
    U, V = leading(W.float(), k)
    best = torch.linalg.svdvals(W)[:k].square().sum()
    assert (U.double().T @ W).square().sum() / best > least and (W @ V.double()).square().sum() / best > least


# ------------------------------------------------------------------------------------------------------------- the init


def start(mode: Any, d: Directions, r: int = 4, **options: Any) -> Any:
    W = Weight("w", (12, 10), lambda: keyed_normal((12, 10), "w"))
    return mode(**options)(W, r, 1.0, d, draw_for(0, "w"))


@pytest.mark.parametrize("mode", [common_basis, common_start])
@pytest.mark.parametrize("known", [0, 2, 4])
@pytest.mark.parametrize("fill", ["own", "random"])
def test_one_sided_pairs(mode: Any, known: int, fill: str) -> None:
    """Orthonormal columns, the shared ones first, the rest from W0 or at random; the other factor is zero."""
    for left, m in ((True, 12), (False, 10)):
        Q = orthonormal(m, known).float() if known else torch.zeros(m, 0)
        d = Directions(Q if left else None, torch.ones(known), None if left else Q)
        made = start(mode, d, fill=fill, kappa=2.0)
        basis, zero = (made.B, made.A) if left else (made.A.T, made.B)
        assert torch.allclose(basis.T @ basis, 4 * torch.eye(4), atol=1e-5) and not zero.any()
        assert torch.allclose(basis[:, :known], 2 * Q)
        assert made.train == ("AB" if mode is common_start else "A" if left else "B")


def test_gap_is_filled_with_the_weights_own_directions() -> None:
    made = start(common_basis, Directions(torch.zeros(12, 0), torch.zeros(0), None))
    U = torch.linalg.svd(keyed_normal((12, 10), "w")).U[:, :4]
    assert torch.allclose(projector(made.B), projector(U), atol=1e-5)
    again = start(common_basis, Directions(U[:, 1:3], torch.ones(2), None))  # W0's own ones are partly known already
    assert torch.allclose(again.B.T @ again.B, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_frozen_factor_confines_the_update(left: bool) -> None:
    """C3: training A beside an orthonormal B ends at P_B·M (and the mirror); the random expectation holds."""
    m, n, r, s = 8, 6, 3, 2.0
    M, Q = normal(m, n), orthonormal(m if left else n, r, seed=1)
    A = (torch.zeros(r, n, dtype=torch.float64) if left else Q.T.clone()).requires_grad_(left)
    B = (Q.clone() if left else torch.zeros(m, r, dtype=torch.float64)).requires_grad_(not left)
    x, live = torch.eye(n, dtype=torch.float64), A if left else B
    for _ in range(400):
        y = low_rank(torch.zeros(n, m, dtype=torch.float64), x, A, B, s)
        (g,) = torch.autograd.grad(0.5 * (y - M.T).square().sum(), live)
        with torch.no_grad():
            live -= 0.2 * g
    wanted = oracle.frozen_B_limit(M, Q) if left else oracle.frozen_B_limit(M.T, Q).T
    assert torch.allclose(s * (B @ A).detach(), wanted, atol=1e-10)
    random = torch.linalg.qr(normal(4000, m, r, seed=5)).Q
    mean = 0.5 * float(M.square().sum() - (random.mT @ M).square().sum((1, 2)).mean())
    assert math.isclose(mean, 0.5 * (1 - r / m) * float(M.square().sum()), rel_tol=0.02)


@pytest.mark.parametrize("name", MODES)
def test_starts_at_the_base_with_the_shared_directions(name: str, sources: tuple[str, ...]) -> None:
    """C1: bit-equal output, BᵀB = I; C4 in a model: the planted directions come first."""
    base = llama()
    before = base(**batch_for(base)).logits
    model = adapt(base, recipe(name, sources))
    assert torch.equal(model(**batch_for(model)).logits, before)
    for site in sites(model):
        B = site.layer.lora_B["default"].weight.detach()  # type: ignore[index]
        assert torch.allclose(B.T @ B, torch.eye(3), atol=1e-6)
        assert torch.allclose(projector(B[:, :SHARED]), projector(planted(site.d_out, site.name)), atol=1e-5)


def test_mode_one_trains_half(sources: tuple[str, ...]) -> None:
    """C2: B never changes, trainable numbers are r·Σ d_in, the optimizer holds no state for B; set_adapter keeps it."""
    made = recipe("cora", sources)
    model = adapt(llama(), made)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * sum(s.d_in for s in sites(model))
    opt = optimizer(model, made, 1e-2)
    before = [factor(model, i, "B").detach().clone() for i in range(14)]

    def steps() -> None:
        for _ in range(3):
            model(**batch_for(model)).loss.backward()
            opt.step()
            opt.zero_grad()

    steps()
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.train()
    steps()
    assert all(torch.equal(factor(model, i, "B"), B) for i, B in enumerate(before))
    assert all(not factor(model, i, "B").requires_grad and factor(model, i, "A").requires_grad for i in range(14))
    assert all(bool(factor(model, i, "A").any()) for i in range(14))
    held = sum(t.numel() for state in opt.state.values() for t in _tensors(state) if t.dim() == 2)
    assert held == 2 * 3 * sum(s.d_in for s in sites(model))  # two moments of A


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [t for v in state.values() for t in _tensors(v)] if isinstance(state, dict) else []


def test_mode_two_trains_both(sources: tuple[str, ...]) -> None:
    """At the first step B's gradient is zero, afterwards it moves."""
    made = recipe("cora-init", sources)
    model = adapt(llama(), made)
    before = factor(model, 0, "B").detach().clone()
    opt = optimizer(model, made, 1e-2)
    for _ in range(3):
        model(**batch_for(model)).loss.backward()
        opt.step()
        opt.zero_grad()
    assert not torch.equal(factor(model, 0, "B"), before) and factor(model, 0, "B").requires_grad


def test_frozen_factor_after_reload_and_resume(sources: tuple[str, ...], tmp_path: Path) -> None:
    """C11: the file is plain; a reload with is_trainable=True forgets the freeze, `attach` on it remembers."""
    made = recipe("cora", sources)
    trainer = toy_trainer(tmp_path / "whole", peft_config(made, llama()), steps=4, save_steps=2)
    attach(trainer, made)
    start_B = factor(trainer.model, 0, "B").detach().clone()
    trainer.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    stock = PeftModel.from_pretrained(llama(), str(folder)).eval()
    assert torch.equal(factor(stock, 0, "B"), start_B)
    trap = PeftModel.from_pretrained(llama(), str(folder), is_trainable=True)
    assert factor(trap, 0, "B").requires_grad  # PEFT's file cannot say "frozen"
    resumed = toy_trainer(tmp_path / "resumed", peft_config(made, llama()), steps=4, save_steps=100)
    attach(resumed, recipe("cora", sources, seed=99), resume_from=folder)
    resumed.train(resume_from_checkpoint=str(folder))
    for i in range(14):
        assert not factor(resumed.model, i, "B").requires_grad
        for side in "AB":
            assert torch.equal(factor(resumed.model, i, side), factor(trainer.model, i, side))
    assert torch.equal(factor(resumed.model, 0, "B"), start_B)


# ---------------------------------------------------------------------------------------------------------- the sources


def _plain() -> Recipe:
    made = build("lora", r=2)
    assert isinstance(made, Recipe)
    return made


def test_adapters_as_sources(sources: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    """Streamed consensus = the dense one of s·B·A; every module, both sides, one subspace per adapter."""
    with caplog.at_level(logging.WARNING, "loralign"):
        basis = extract(sources)
    assert basis.facts["kind"] == "adapters" and len(basis.groups) == 14
    assert "weights alone" not in caplog.text
    name = "model.layers.0.mlp.up_proj"
    left = basis.groups[name]["left"]
    assert left.significant == SHARED and torch.allclose(left.share[:SHARED], torch.ones(SHARED), atol=1e-5)
    dense = []
    for folder in sources:
        state = load_file(Path(folder) / "adapter_model.safetensors")
        A, B = (state[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        dense.append(torch.linalg.svd(B @ A, full_matrices=False).U[:, : SHARED + 1])
    values = oracle.consensus(dense, len(left.share))[1]
    assert torch.allclose(left.share.double(), values, atol=1e-5)


def test_adapters_of_one_seed_share_their_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA's A hardly moves: the right sides agree because of the seed, which is said; auto takes the left."""
    folders = []
    for j in range(3):
        model = adapt(llama(), build("lora", r=3, seed=5))  # type: ignore[arg-type]
        with torch.no_grad():
            for i in range(14):
                B = factor(model, i, "B")
                B.copy_(normal(*B.shape, seed=50 * j + i).float())
        model.save_pretrained(str(tmp_path / str(j)))
        folders.append(str(tmp_path / str(j)))
    with caplog.at_level(logging.WARNING, "loralign"):
        basis = extract(folders)
    assert "started from one seed" in caplog.text
    sides = dict(basis.groups["model.layers.0.mlp.up_proj"])
    assert sides["right"].significant == 3
    assert choose_side(CommonSubspace(), "adapters", sides, 3) == "left"
    assert choose_side(CommonSubspace(side="right"), "adapters", sides, 3) == "right"


def test_deltas_as_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three fine-tunes of a base, in bf16 shards: the planted direction is found, unchanged modules share nothing."""
    moved = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    base, *tuned = fine_tunes(llama(hidden_size=64, intermediate_size=96), tmp_path, moved)
    with caplog.at_level(logging.WARNING, "loralign"):
        basis = extract(tuned, base=base, width=4)
    assert basis.facts["kind"] == "deltas" and not caplog.text
    for name in moved:
        left = basis.groups[name]["left"]
        assert left.significant == SHARED
        assert torch.allclose(projector(left.basis[:, :SHARED]), projector(planted(64, name)), atol=1e-3)
    assert basis.groups["model.layers.0.mlp.up_proj"]["left"].significant == 0


def test_deltas_of_strangers_are_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (0, 1, 2):
        llama(seed).save_pretrained(tmp_path / str(seed))
    with caplog.at_level(logging.WARNING, "loralign"):
        extract([tmp_path / "1", tmp_path / "2"], base=tmp_path / "0")
    assert "are they fine-tuned from it?" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_weights_as_sources_warn(count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers of one checkpoint, or one module of several; both are near random, which is said."""
    folders = []
    for j in range(count):
        llama(j).save_pretrained(tmp_path / str(j), max_shard_size="40KB")
        folders.append(tmp_path / str(j))
    assert len(list(folders[0].glob("model-*.safetensors"))) > 1  # shards
    with caplog.at_level(logging.WARNING, "loralign"):
        basis = extract(folders)
    assert "a basis from weights alone says almost nothing" in caplog.text
    assert ("model.layers.*.mlp.up_proj" in basis.groups) == (count == 1)
    assert all(s.sources == 2 for sides in basis.groups.values() for s in sides.values())


def test_the_models_own_layers_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loralign"):
        model = adapt(llama(), recipe("cora"))
    assert "a basis from weights alone" in caplog.text and "have no direction in common" in caplog.text
    for site in sites(model):  # one side is an orthonormal basis of r all the same, the other zero
        A, B = (getattr(site.layer, f"lora_{side}")["default"].weight.detach() for side in "AB")
        basis = B if bool(B.any()) else A.T
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5) and not (A.any() and B.any())


def test_own_layers_equal_the_checkpoint(tmp_path: Path) -> None:
    """Reading the model in memory and streaming its file give the same basis."""
    model = llama(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "m")
    streamed = extract([tmp_path / "m"], width=4).groups["model.layers.*.self_attn.q_proj"]["right"]
    wrapped = put_in(model, _plain())
    found = sites(wrapped)
    need = CommonSubspace(side="right", width=4)
    evidence = collect(need, wrapped, found, None)
    d = evidence["model.layers.0.self_attn.q_proj"]
    n = min(2, streamed.significant)
    assert d.V is not None and d.U is None and d.V.shape[1] == n
    assert torch.allclose(d.V, streamed.basis[:, :n], atol=1e-4)


def test_sites_without_a_common_basis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Adapters of some modules only: the others are filled up with W0's own directions, and that is said."""
    folders = []
    for j in range(3):
        model = put_in(llama(), build("lora", r=3, targets=("o_proj",)))  # type: ignore[arg-type]
        with torch.no_grad():
            for site in sites(model):
                B: Any = site.layer.lora_B["default"].weight  # type: ignore[index]
                B.copy_(torch.cat([planted(site.d_out, site.name), normal(site.d_out, 1, seed=j).float()], 1))
        model.save_pretrained(str(tmp_path / str(j)))
        folders.append(str(tmp_path / str(j)))
    with caplog.at_level(logging.DEBUG, "loralign"):
        model = adapt(llama(), recipe("cora", folders, r=2))
    assert "12 of 14 sites have no direction in common" in caplog.text
    assert "model.layers.0.mlp.up_proj: not among the sources; left side filled up" in caplog.text
    up = next(s for s in sites(model) if s.name == "model.layers.0.mlp.up_proj")
    U = torch.linalg.svd(up.layer.get_base_layer().weight.detach()).U[:, :2]  # type: ignore[operator]
    assert torch.allclose(projector(up.layer.lora_B["default"].weight.detach()), projector(U), atol=1e-4)  # type: ignore[index]


def test_side_is_chosen_where_sources_agree_more() -> None:
    none, two = (Shared(orthonormal(8, 4), torch.tensor(s), 0.3, 4) for s in ([0.2] * 4, [0.9, 0.8, 0.2, 0.1]))
    assert choose_side(CommonSubspace(), "deltas", {"left": none, "right": two}, 4) == "right"
    assert choose_side(CommonSubspace(), "deltas", {"left": two, "right": none}, 4) == "left"
    sure, near = (Shared(orthonormal(8, 2), torch.tensor([e, 0.0]), null, 4) for e, null in ((0.6, 0.2), (0.8, 0.5)))
    assert choose_side(CommonSubspace(), "deltas", {"left": near, "right": sure}, 4) == "right"  # further above chance


def test_a_direction_counts_from_five_percent_above_chance_and_a_site_gets_no_more_than_its_rank(
    tmp_path: Path,
) -> None:
    shared = Shared(orthonormal(32, 6), torch.tensor([0.9, 0.8, 0.7, 0.316, 0.314, 0.3]), 0.3, 4)
    assert shared.significant == 4
    right = Shared(orthonormal(32, 1), torch.tensor([0.2]), 0.3, 4)
    facts = {"kind": "deltas", "sources": [{"name": "a"}, {"name": "b"}], "base": None, "width": 8}
    model = put_in(llama(), build("lora", r=2))  # type: ignore[arg-type]
    (q, *_) = (s for s in sites(model) if s.name.endswith("q_proj"))
    write_basis(tmp_path / "b.safetensors", Basis({q.name: {"left": shared, "right": right}}, facts))
    found = collect(CommonSubspace((str(tmp_path / "b.safetensors"),)), model, [q], None)[q.name]
    assert found.S.tolist() == pytest.approx([0.9, 0.8]) and found.U is not None and found.U.shape == (32, 2)
    assert found.captured == pytest.approx(0.85) and "2 of 2 directions shared by 4" in found.note


def test_a_name_that_two_tensors_end_with_is_no_module(tmp_path: Path) -> None:
    save_file({"a.layer.q.weight": torch.ones(4, 4), "b.layer.q.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    assert Checkpoint(tmp_path).key("a.layer.q") == "a.layer.q.weight" == Checkpoint(tmp_path).key("model.a.layer.q")
    with pytest.raises(LoralignError, match=r"has 2 tensors for layer\.q: it is another model"):
        Checkpoint(tmp_path).key("layer.q")


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_sources_that_say_nothing_lower_the_share_and_what_chance_gives_alike(silent: int) -> None:
    """ℓ = 0 agrees with nobody: all that the others share is divided by J, and so is their null level."""
    planted = [torch.cat([orthonormal(64, 1, seed=1), normal(64, 3, seed=10 + j)], 1) for j in range(4)]
    loud = [torch.linalg.qr(T).Q for T in planted]
    alone, found = consensus(loud, keep=4), consensus([*loud, *[torch.zeros(64, 0, dtype=torch.float64)] * silent], 4)
    assert found.null == pytest.approx(alone.null * 4 / (4 + silent)) and found.significant == alone.significant == 1
    assert torch.allclose(found.share, alone.share * 4 / (4 + silent))


def test_basis_file(sources: tuple[str, ...], tmp_path: Path) -> None:
    """Written, read back, shown; a recipe that reads the file starts as one that reads the sources, at any rank."""
    basis = extract(sources)
    write_basis(tmp_path / "b.safetensors", basis)
    again = read_basis(tmp_path / "b.safetensors")
    assert again.facts == json.loads(json.dumps(dict(basis.facts)))
    for name, group in basis.groups.items():
        for side, shared in group.items():
            other = again.groups[name][side]
            assert torch.equal(shared.basis, other.basis) and torch.equal(shared.share, other.share)
            assert (shared.null, shared.sources) == (other.null, other.sources)
    assert str(tmp_path) not in str(again.facts) and "adapter-0" in show_basis(again)
    for r in (1, 3):
        models = [adapt(llama(), recipe("cora", s, r=r)) for s in (sources, (str(tmp_path / "b.safetensors"),))]
        assert torch.equal(factor(models[0], 3, "B"), factor(models[1], 3, "B"))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: "a text",
        lambda about: 3,
        lambda about: [],
        lambda about: {**about, "format": 9},
        lambda about: {k: v for k, v in about.items() if k != "groups"},
        lambda about: {k: v for k, v in about.items() if k != "facts"},
        lambda about: {**about, "facts": {"kind": "adapters"}},
        lambda about: {**about, "groups": {"x": [0.1, 2]}},
        lambda about: {**about, "groups": {k: ["much", 2] for k in about["groups"]}},
        lambda about: {**about, "groups": {k: v for k, v in about["groups"].items() if k.endswith("left")}},
    ],
)
def test_a_tampered_basis_file_is_refused(change: Any, tmp_path: Path) -> None:
    eye = torch.eye(6)
    shared = {side: Shared(eye[:, :2], torch.tensor([1.0, 0.5]), 0.2, 2) for side in ("left", "right")}
    facts = {"kind": "adapters", "sources": [{"name": "a"}, {"name": "b"}], "base": None, "width": 2}
    path = tmp_path / "b.safetensors"
    write_basis(path, Basis({"m": shared}, facts))  # type: ignore[dict-item]
    assert "null: what as many random subspaces reach" in show_basis(read_basis(path))
    with safe_open(path, framework="pt") as f:
        about = json.loads(f.metadata()["loralign_basis"])
    save_file(load_file(path), path, metadata={"loralign_basis": json.dumps(change(about))})
    with pytest.raises(LoralignError, match="is no basis file: make one"):
        read_basis(path)


def test_bad_sources(sources: tuple[str, ...], tmp_path: Path) -> None:
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    llama().save_pretrained(tmp_path / "same")
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "no_basis.safetensors")
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([tmp_path / "none"], {}, "does not exist"),
        ([tmp_path / "no_basis.safetensors"], {}, "is a file"),
        ([sources[0]], {}, "alone has nothing to share"),
        ([tmp_path / "same"], {"base": tmp_path / "same"}, "alone has nothing to share"),
        ([sources[0], sources[0] + "/"], {}, "given twice"),
        (list(sources), {"base": tmp_path / "same"}, "leave `base` out"),
        ([*sources, tmp_path / "same"], {}, "mix adapters and checkpoints"),
        ([tmp_path / "wide", tmp_path / "same"], {"base": tmp_path / "same"}, "another model"),
        ([tmp_path / "empty", tmp_path / "wide"], {"base": tmp_path / "same"}, "holds no safetensors"),
        ([], {}, "at least one source"),
    ]
    for given, options, message in cases:
        with pytest.raises(LoralignError, match=message):
            extract(given, **options)
    for given, options, message in (cases[0], *cases[2:7]):  # from headers alone, before a model is loaded
        with pytest.raises(LoralignError, match=message):
            check_sources([str(s) for s in given], **options)
    for name, text, message in (
        ("foreign", '{"peft_type": "IA3"}', "only LORA adapters are read here"),
        ("half", '{"peft_type":', "adapter_config.json is damaged"),
        ("odd", '{"peft_type": "FOO"}', "says peft_type 'FOO'"),
        ("cut", (Path(sources[0]) / "adapter_config.json").read_text(), "adapter_model.safetensors is damaged"),
        ("bare", (Path(sources[0]) / "adapter_config.json").read_text(), "has no adapter_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
        if name != "bare":
            (tmp_path / name / "adapter_model.safetensors").write_bytes(b"12345678")
        with pytest.raises(LoralignError, match=message):
            check_sources((*sources, str(tmp_path / name)))
    check_sources(())
    check_sources(sources)
    with pytest.raises(LoralignError, match="is no basis file"):
        read_basis(tmp_path / "no_basis.safetensors")
    with pytest.raises(LoralignError, match="is no basis file"):
        read_basis(tmp_path / "same" / "config.json")
    with pytest.raises(LoralignError, match="does not exist"):
        read_basis(tmp_path / "none")
    write_basis(tmp_path / "b.safetensors", extract(sources))
    with pytest.raises(LoralignError, match="belongs to another model"):
        adapt(llama(hidden_size=64), recipe("cora", str(tmp_path / "b.safetensors")))
    with pytest.raises(LoralignError, match="knows none of the 8 modules"):
        adapt(gpt2(), recipe("cora", str(tmp_path / "b.safetensors")))
    with pytest.raises(LoralignError, match="a basis file needs no `base`"):
        adapt(llama(), build("cora", {"sources": [str(tmp_path / "b.safetensors")], "base": str(tmp_path)}, r=2))  # type: ignore[arg-type]
    with pytest.raises(LoralignError, match="name them in `sources`"):
        common_basis(base="some/folder")
    with pytest.raises(LoralignError, match="side is auto, left or right"):
        common_basis(side="up")
    with pytest.raises(LoralignError, match=r"rank 20 is too large for cora .* 16 slots"):
        adapt(llama(), recipe("cora", sources, r=20))


def test_each_matrix_is_read_once_and_dropped() -> None:
    """Readers are called one after the other, in order; nothing but directions is kept."""
    live, most, order = 0, 0, []

    def reader(i: int) -> Any:
        def read() -> tuple[Tensor, Tensor]:
            nonlocal live, most
            live += 1
            most = max(most, live)
            order.append(i)
            U, V = leading(keyed_normal((16, 12), i), 2)
            live -= 1
            return U, V

        return read

    groups = {"a": [reader(0), reader(1)], "b": [reader(2), reader(3)]}
    basis = consensus_of(Members(groups, 2, {"kind": "deltas", "sources": [], "base": None}))
    assert order == [0, 1, 2, 3] and most == 1 and basis.groups["a"]["left"].basis.shape[0] == 16


def test_targets_of_a_recipe_limit_what_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "m")
    target = Target("model.layers.0.mlp.up_proj", 48, 32)
    assert list(extract([tmp_path / "m"], targets=[target]).groups) == ["model.layers.*.mlp.up_proj"]


@pytest.mark.parametrize("given", ["shared.safetensors", ["shared.safetensors"]])
def test_a_recipe_file_names_one_source_or_several(given: Any) -> None:
    file = {"model": "m", "data": {"train": "rows.jsonl"}, "output": "o", "method": "cora"}
    made = to_recipe(parse({**file, "options": {"sources": given}}))
    assert isinstance(made, Recipe) and made.init.needs == CommonSubspace(("shared.safetensors",))


def test_sources_that_share_nothing_are_refused(tmp_path: Path) -> None:
    """Otherwise the method would act as another one, the fill; the model's own layers only warn."""
    for seed in (0, 1):
        llama(seed).save_pretrained(tmp_path / str(seed))
    with pytest.raises(LoralignError, match="no direction above chance"):
        adapt(llama(), recipe("cora", [str(tmp_path / "0"), str(tmp_path / "1")]))


def test_sites_of_one_group_are_cached(tmp_path: Path) -> None:
    """Layers of one model share their tensors in memory; the cache file holds each site's own."""
    model: Any = llama()
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    model.save_pretrained(tmp_path / "m")
    states = [adapt(llama(), recipe("cora", str(tmp_path / "m")), cache=tmp_path / "c").state_dict() for _ in range(2)]
    assert len(list((tmp_path / "c").iterdir())) == 1
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items())


def test_conv1d_is_read_transposed(tmp_path: Path) -> None:
    """GPT-2's matrices are stored (d_in, d_out): the left basis has d_out rows."""
    model: Any = gpt2()
    model.transformer.h[1].load_state_dict(model.transformer.h[0].state_dict())
    model.save_pretrained(tmp_path / "m")
    group = extract([tmp_path / "m"]).groups["transformer.h.*.attn.c_attn"]
    assert (group["left"].basis.shape[0], group["right"].basis.shape[0]) == (96, 32)
    model = adapt(gpt2(), recipe("cora-init", str(tmp_path / "m")))
    assert isinstance(model, nn.Module)
