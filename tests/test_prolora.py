"""PRoLoRA: its rotation, the gradient of a shared chunk, the block structure, counts, and LoRA as its limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import toy
from loralign import LoralignError, Recipe, adapt, build, factors, optimizer, sites
from loralign.carrier.slot import effective, trained_of
from loralign.methods.form.prolora import partial_rotation, repeated
from loralign.types import Live
from oracles import prolora
from toy import batch_for

SEVEN = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def recipe(options: dict[str, Any] | None = None, name: str = "prolora", **fields: Any) -> Recipe:
    made = build(name, options or {}, **{"r": 4, "alpha": 8.0, "seed": 3, **fields})
    assert isinstance(made, Recipe)
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(r=st.integers(1, 7), copies=st.integers(1, 9), size=st.integers(1, 23))
def test_copies_and_their_gradient_equal_the_oracle(r: int, copies: int, size: int) -> None:
    """Also where neither the rank nor the size is divided, and where there are more copies than ranks or columns."""
    chunk = normal(r, -(-size // copies)).requires_grad_(True)
    made, outer = repeated(chunk, copies, size), normal(r, size)
    assert torch.equal(made, prolora.shared(chunk.detach(), copies, size))
    (found,) = torch.autograd.grad(made, chunk, outer)
    assert torch.allclose(found, prolora.gradient(outer, copies, chunk.shape[1]), rtol=1e-14, atol=1e-14)


def test_the_direction_is_that_of_the_code() -> None:
    a = torch.arange(4.0)[:, None]
    assert repeated(a, 2, 2).tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]
    assert repeated(a, 4, 4)[0].tolist() == [0, 1, 2, 3]


def test_blocks_are_circulant_and_keep_the_rank() -> None:
    """m = n, r' = m·s: block (i, j) is block (i + 1, j + 1); without the rotation the rank is a chunk's."""
    m, r, c_out, c_in = 4, 8, 2, 3
    chunk_A, chunk_B = normal(r, c_in), normal(c_out, r)
    form = partial_rotation(0, m, m)
    none = torch.zeros(0, m * c_in), torch.zeros(m * c_out, 0)
    own = {"chunk_A": chunk_A, "chunk_B": chunk_B}
    live = Live(torch.zeros(r, m * c_in), torch.zeros(m * c_out, r), *none, own)
    A, B = (f.dense() for f in form.factors(live, ()))
    blocks = (B @ A).unflatten(0, (m, c_out)).unflatten(-1, (m, c_in))
    for i in range(m):
        for j in range(m):
            assert torch.allclose(blocks[i, :, j], blocks[(i + 1) % m, :, (j + 1) % m], atol=1e-14)
    assert torch.linalg.matrix_rank(B @ A) == 8
    assert torch.linalg.matrix_rank(chunk_B.repeat(m, 1) @ chunk_A.repeat(1, m)) == 2


def run(made: Recipe, steps: int = 3) -> Any:
    model = adapt(toy.llama(), made)
    opt = optimizer(model, made, 0.01)
    model.train()
    for _ in range(steps):
        model(**batch_for(model)).loss.backward()
        opt.step()
        opt.zero_grad()
    return model.eval(), opt


@pytest.mark.parametrize("options", [{"unshared": 4}, {"unshared": 0, "share_A": 1, "share_B": 1}])
def test_without_sharing_it_is_lora_to_the_bit(options: dict[str, Any]) -> None:
    mine, lora = run(recipe(options))[0], run(recipe(name="lora"))[0]
    for one, two in zip(sites(mine), sites(lora), strict=True):
        for a, b in zip(effective(one.layer, "default"), effective(two.layer, "default"), strict=True):
            assert torch.equal(a, b)


def test_the_start_has_loras_bound_not_a_chunks() -> None:
    model = adapt(toy.llama(), recipe({"unshared": 1, "share_A": 4}, r=16))
    for site in sites(model):
        own, bound = trained_of(site.layer, site.adapter), site.d_in**-0.5
        for name in ("chunk_A", "own_A"):
            assert bool(own[name].abs().max() <= bound)
        assert float(own["chunk_A"].detach().abs().max()) > 0.9 * bound
        assert not own["chunk_B"].any() and not own["own_B"].any()


def test_trained_numbers_are_the_papers_and_a_models() -> None:
    """LLaMA2-7B, all linear layers; and what a real adapter trains, its optimizer holds and `plan` counts."""
    counts = {(8, 1, 7, 7): 4_999_520, (32, 4, 7, 7): 19_998_080}
    for sizes, wanted in counts.items():
        assert prolora.trained_numbers(SEVEN, *sizes, layers=32) == wanted
    for sizes in ((32, 7, 25, 25), (16, 4, 3, 3), (16, 7, 9, 9)):
        assert abs(prolora.trained_numbers(SEVEN, *sizes, layers=32) - 19.99e6) < 0.03e6
    model, opt = run(recipe({"unshared": 1, "share_A": 3, "share_B": 5}))
    shapes = [(site.d_out, site.d_in) for site in sites(model)]
    wanted = prolora.trained_numbers(shapes, 4, 1, 3, 5, layers=1)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == wanted
    held = {id(p) for p, state in opt.state.items() if state}
    assert held == {id(p) for p in trains}
    for site in sites(model):
        assert factors(site)[0].shape == (4, site.d_in)
        assert not site.layer.lora_A["default"].live.any()  # type: ignore[index]


def test_plan_counts_it() -> None:
    from loralign.plan.memory import estimate
    from loralign.plan.trace import Step

    with torch.device("meta"):
        base = toy.llama()
    made = recipe({"unshared": 1, "share_A": 3, "share_B": 5})
    shapes = [(site.d_out, site.d_in) for site in sites(adapt(toy.llama(), made))]
    found, wanted = estimate(base, made, Step(rows=1, length=8)), prolora.trained_numbers(shapes, 4, 1, 3, 5, layers=1)
    assert found.trainable == wanted
    assert found.optimizer_bytes == 8 * wanted
    assert found.export_rank == 4


def test_weight_decay_acts_on_a_chunk_once() -> None:
    made = recipe({"share_A": 4}, weight_decay=0.5, max_grad_norm=0.0)
    model = adapt(toy.llama(), made)
    opt = optimizer(model, made, 0.1)
    own = [p for site in sites(model) for p in trained_of(site.layer, site.adapter).values()]
    before = [p.detach().clone() for p in own]
    for p in own:
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, q in zip(own, before, strict=True):
        assert torch.allclose(p, q * (1 - 0.1 * 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "options", "why"),
    [
        ("lora-pro", {}, "hides the pair"),
        ("muon-factors", {}, "share numbers"),
        ("lora-plus", {}, "neither A nor B"),
        ("lora-ga", {}, "twin cancels"),
        ("pissa", {}, "twin cancels"),
        ("hrp", {}, "share numbers, so directions"),
        ("cora", {"sources": ["a", "b"]}, "neither A nor B, so what the init"),
        ("rm-lora", {}, "the rule is about their slots"),
        ("lora", {"betas": (0.5, 0.9)}, "neither A nor B, which are all"),
    ],
)
def test_what_it_cannot_meet_is_refused_with_a_reason(other: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(LoralignError, match=why):
        adapt(toy.llama(), recipe(options, f"prolora + {other}"))


def test_more_own_ranks_than_ranks_are_refused() -> None:
    with pytest.raises(LoralignError, match=r"rank 2 is too small for prolora at .*lower its `unshared`"):
        adapt(toy.llama(), replace(recipe({"unshared": 3}), ranks={"v_proj": 2}))


def gradients(model: Any) -> dict[str, Tensor]:
    """Of two micro-batches, the second one of other rows."""
    model.zero_grad()
    model.train()
    for length in (6, 4):
        batch = batch_for(model)
        model(**{key: value[:, :length] for key, value in batch.items()}).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moved(layers: int = 3) -> Any:
    """After a step, so that B is not zero."""
    made = recipe({"unshared": 1, "share_A": 3, "share_B": 5})
    model = adapt(toy.llama(num_hidden_layers=layers), made)
    opt = optimizer(model, made, 0.01)
    model(**batch_for(model)).loss.backward()
    opt.step()
    return model


def alone(model: Any) -> dict[str, Tensor]:
    """The gradients where every layer makes its own factors."""
    kept = {}
    for site in sites(model):
        variant: Any = site.layer.lora_variant["default"]  # type: ignore[index]
        kept[site.name], variant.together = variant.together, None
    found = gradients(model)
    for site in sites(model):
        site.layer.lora_variant["default"].together = kept[site.name]  # type: ignore[index,union-attr]
    return found


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_factors_made_together_have_the_gradients_of_factors_made_alone(reentrant: bool | None) -> None:
    model = moved()
    wanted = alone(model)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert set(found) == set(wanted) and any(".lora_chunk_A." in name for name in found)
    for name, g in found.items():
        assert torch.allclose(g, wanted[name], rtol=1e-5, atol=1e-8), name


def test_layers_that_train_learn_beside_layers_that_run_without_gradients() -> None:
    """As a frozen or checkpointed block comes before one that is neither."""
    model = moved()
    first = model.get_base_model().model.layers[0]

    def switch(on: bool) -> Any:
        def hook(*_: Any) -> None:
            torch.set_grad_enabled(on)

        return hook

    first.register_forward_pre_hook(switch(False))
    first.register_forward_hook(switch(True))
    found = gradients(model)
    assert {name.split(".layers.")[1][0] for name, g in found.items() if g.any()} == {"1", "2"}


def test_what_was_made_together_is_dropped_and_never_stale() -> None:
    """After the forward, also one that raised; within it, where a tensor is changed in place."""
    model = moved()
    together: Any = next(iter(sites(model))).layer.lora_variant["default"].together  # type: ignore[index]
    model(**batch_for(model))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6))
    assert together.made is None and together.owner is None

    def shrink(module: Any, args: Any) -> None:
        with torch.no_grad():
            for site in sites(model):
                for p in trained_of(site.layer, "default").values():
                    p.mul_(0.5)

    wanted = moved()
    last = model.get_base_model().model.layers[-1]
    hook = last.register_forward_pre_hook(shrink)
    found = model(**batch_for(model)).logits
    hook.remove()
    half = {site.name for site in sites(model) if ".layers.2." in site.name}
    for site in sites(wanted):
        if site.name in half:
            for p in trained_of(site.layer, "default").values():
                p.data.mul_(0.5)
    assert torch.allclose(found, wanted(**batch_for(wanted)).logits, atol=1e-6)


def calls(name: str, layers: int) -> int:
    """Operations of a forward and a backward."""

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            view = any(word in str(func) for word in ("view", "detach", "t.default", "unbind", "strided", "unsqueeze"))
            self.n += not view
            return func(*args, **(kwargs or {}))

    model = adapt(toy.llama(num_hidden_layers=layers), recipe(name=name)).train()
    with Count() as count:
        model(**batch_for(model)).loss.backward()
    return count.n


def test_another_layer_costs_no_more_calls_than_loras() -> None:
    more = [calls(name, 4) - calls(name, 2) for name in ("prolora", "lora")]
    assert more[0] <= 1.1 * more[1]
