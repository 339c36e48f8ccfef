"""SBoRA: full fine-tuning of r columns or rows, its supports, what it keeps for backward, several of them at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import toy
from loralign import LoralignError, Recipe, adapt, build, optimizer, sites
from loralign.carrier.layer import applied
from loralign.carrier.slot import constants_of, live_of
from loralign.io.export import export
from loralign.maths.operators import Dense, Gather, Scatter
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import descend
from oracles import sbora
from short_runs import train

S, LR = 3.0, 0.02
NAMES = ("sbora-fa", "sbora-fb")


def recipe(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options or {}, **{"r": 2, "alpha": 2 * S, "max_grad_norm": 0.0, "seed": 3, **fields})
    assert isinstance(made, Recipe)
    return made


def basis(site: Any) -> Tensor:
    return constants_of(site.layer, site.adapter)["basis"]


def one_layer(made: Recipe) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5)).double()
    W0 = base[0].weight.detach().clone()
    model = adapt(base, replace(made, targets=("0",))).double()
    return model, W0, sites(model)[0]


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 7, generator=draw).double(), torch.randn(2, 3, 5, generator=draw).double()


def gradient(bias: Tensor) -> Callable[[Tensor], Tensor]:
    x, y = (t.flatten(0, 1) for t in batch())
    return lambda W: (x @ W.T + bias - y).T @ x


@pytest.mark.parametrize(("kind", "steps"), [("descent", 30), ("adam", 50)])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_full_fine_tuning_of_the_chosen_part(name: str, kind: str, steps: int) -> None:
    """Descent moves the part at lr·s², Adam at lr·s; the gradient of the trained factor is s times the part's."""
    transform = descend() if kind == "descent" else adamw(eps=1e-30)
    made = replace(recipe(name), transform=transform)
    model, W0, site = one_layer(made)
    opt, (x, y) = optimizer(model, made, LR), batch()
    bias = model.base_model.model[0].bias.detach()
    for step in range(steps):
        (0.5 * (model(x) - y).square().sum()).backward()
        if not step:
            live, G = live_of(site.layer, site.adapter), gradient(bias)(W0)
            found, part = (live.B, G[:, basis(site)]) if name == "sbora-fa" else (live.A, G[basis(site)])
            assert torch.allclose(found.grad, S * part, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
        opt.step()
        opt.zero_grad()
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "descent": lambda ps: torch.optim.SGD(ps, lr=LR * S**2),
        "adam": lambda ps: torch.optim.Adam(ps, lr=LR * S, eps=1e-30),
    }
    oracle = sbora.columns if name == "sbora-fa" else sbora.rows
    want = oracle(W0, basis(site), gradient(bias), makers[kind], steps)
    W = W0 + site.layer.get_delta_weight("default").detach()
    assert (want - W0).norm() > 0.1
    assert torch.allclose(W, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)])
def test_picking_equals_multiplying(shape: tuple[int, ...]) -> None:
    """Both operators, value and gradients, as the dense one-hot factors give them; a `base` that is a view stays."""
    torch.manual_seed(0)
    n, m, index = 9, 8, torch.tensor([6, 0, 3])
    M_B, M_A = torch.randn(m, 3, dtype=torch.float64), torch.randn(3, n, dtype=torch.float64)
    whole = torch.nn.Identity()
    for A, B in ((Gather(index, n), M_B), (M_A, Scatter(index, m))):
        found = []
        for dense in (False, True):
            x = torch.randn(*shape[:-1], n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            factor = (B if isinstance(A, Gather) else A).clone().requires_grad_(True)
            x.requires_grad_(True)
            base = nn.functional.linear(x, torch.ones(m, n, dtype=torch.float64))
            one = Dense(factor) if not isinstance(A, Gather) else A
            two = B if isinstance(B, Scatter) else Dense(factor)
            if dense:
                one, two = Dense(one.dense().double()), Dense(two.dense().double())
            y = applied(base, x, one, two, S, whole)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, factor.grad))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        fixed = torch.ones(*shape[:-1], m, dtype=torch.float64).expand(2, *shape[:-1], m)[0]
        applied(fixed, x.detach(), one, two, S, whole)
        assert bool((fixed == 1).all())  # a view is left alone


@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_takes_a_layer_as_one_graph(name: str) -> None:
    model, _, _ = one_layer(recipe(name))
    x, layer = batch()[0], model.base_model.model[0]
    for p in (layer.lora_A["default"].live, layer.lora_B["default"].live):
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


def trained(name: str, options: dict[str, Any] | None = None, steps: int = 3, **fields: Any) -> Any:
    made = recipe(name, options, **fields)
    model = adapt(toy.llama(), made)
    train(model, made, steps, lr=0.01)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_touches_r_columns_or_rows_and_no_other_bit(name: str) -> None:
    before = {n: p.clone() for n, p in toy.llama().named_parameters()}
    model = trained(name)
    chosen = {site.name: basis(site) for site in sites(model)}
    assert len({tuple(c.tolist()) for c in chosen.values()}) > 1  # every module has its own
    merged = dict(model.merge_and_unload(safe_merge=True).named_parameters())
    for site, index in chosen.items():
        old, new = before[f"{site}.weight"], merged[f"{site}.weight"]
        if name == "sbora-fb":
            old, new = old.T, new.T
        same = torch.ones(old.shape[1], dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(old[:, same].view(torch.int32), new[:, same].view(torch.int32))
        assert bool((old[:, index] != new[:, index]).any(dim=0).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_export_changes_r_columns_or_rows_and_no_other_bit(name: str, tmp_path: Path) -> None:
    base, model = toy.llama(), trained(name)
    chosen = {f"{site.name}.weight": basis(site) for site in sites(model)}
    assert export(model, tmp_path / "out", profile="merged", base_id="toy").dtype == "float32"
    merged = dict(type(base).from_pretrained(tmp_path / "out").state_dict())
    assert merged.keys() == base.state_dict().keys()
    for key, old in base.state_dict().items():
        changed = old.view(torch.int32) != merged[key].view(torch.int32)
        moved = changed.any(dim=0 if name == "sbora-fa" else 1).nonzero().flatten() if key in chosen else changed
        assert torch.equal(moved, chosen[key].sort().values) if key in chosen else not moved.any(), key


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_factor_holds_the_places_of_the_form(name: str, place: int) -> None:
    """The start and the form draw them each for themselves; what is saved is the one, what trains the other."""
    for site in sites(adapt(toy.llama(), recipe(name, {"place": place}))):
        live = live_of(site.layer, site.adapter)
        fixed = live.A if name == "sbora-fa" else live.B.T
        assert torch.equal(fixed, nn.functional.one_hot(basis(site), fixed.shape[1]).float())


ORDERS = tuple(permutations(["p0", "p1", "p2"]))


def merged(layer: Any, order: Sequence[str]) -> Tensor:
    """The base weight with the adapters merged one after the other by PEFT; the layer stays as it is."""
    twin = copy.deepcopy(layer)
    twin.merge(adapter_names=list(order))
    return twin.get_base_layer().weight.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_different_places_add_up_exactly(name: str, tmp_path: Path) -> None:
    """Three adapters in one stock model: no two touch the same number, so their sum is each one's own update."""
    for place in range(3):
        trained(name, {"place": place}).save_pretrained(tmp_path / str(place))
    stock: Any = PeftModel.from_pretrained(toy.llama(), tmp_path / "0", "p0")
    for place in (1, 2):
        stock.load_adapter(tmp_path / str(place), f"p{place}")
    stock.add_weighted_adapter(["p0", "p1", "p2"], [1.0] * 3, "all", combination_type="cat")
    layers = [m for m in stock.modules() if hasattr(m, "get_delta_weight") and "p0" in m.lora_A]
    for layer in layers:
        one, two, three, together = (layer.get_delta_weight(n).detach() for n in ("p0", "p1", "p2", "all"))
        assert not (one * two).any() and not (one * three).any() and not (two * three).any()
        assert torch.equal(together, one + two + three)
        assert all(torch.equal(merged(layer, order), merged(layer, ORDERS[0])) for order in ORDERS)
        A = [layer.lora_A[n].weight for n in ("p0", "p1")] if name == "sbora-fa" else \
            [layer.lora_B[n].weight.T for n in ("p0", "p1")]  # fmt: skip
        assert not (A[0] @ A[1].T).any()


def test_places_end_where_the_matrix_ends() -> None:
    with pytest.raises(LoralignError, match=r"it can start 1 slots at most at place 16: lower"):
        adapt(toy.llama(), recipe("sbora-fa", {"place": 16}))
    with pytest.raises(
        LoralignError, match=r"k_proj \(16 × 32\), where it can start 0 slots at most at place 16: name"
    ):
        adapt(toy.llama(), recipe("sbora-fb", {"place": 16}, r=1))
    with pytest.raises(LoralignError, match="place must be"):
        recipe("sbora-fa", {"place": -1})


def kept(name: str, **fields: Any) -> int:
    """Numbers that a layer keeps for backward beside its own weights, under dropout where `fields` say so."""
    made = recipe(name, **fields)
    base = nn.Sequential(nn.Linear(64, 48))
    model = adapt(base, replace(made, targets=("0",))).train()
    x, seen = torch.randn(32, 64).requires_grad_(True), dict[int, int]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own and t.is_floating_point():
            seen[t.untyped_storage().data_ptr()] = t.numel()
        held.append(t)
        return t

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_keeps_no_input_for_backward(dropout: float) -> None:
    """With A fixed: r features, under dropout r more, and never x; with B fixed no more than LoRA."""
    lora, tokens, d_in, r = kept("lora", dropout=dropout), 32, 64, 2
    assert lora >= tokens * (d_in + r)
    assert kept("sbora-fa", dropout=dropout) <= min(lora - tokens * d_in, 3 * tokens * r)
    assert kept("sbora-fb", dropout=dropout) <= lora


def test_trained_numbers_of_the_papers_models() -> None:
    """Targets q, k, v, up and down, as the paper counts; and of a real adapter."""
    wide = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]
    grouped = [(4096, 4096), (1024, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    seven, eight = sbora.trained_numbers(wide, 32, 32), sbora.trained_numbers(grouped, 32, 32)
    assert seven == {"lora": 56_098_816, "sbora-fa": 28_049_408, "sbora-fb": 28_049_408}
    assert (eight["sbora-fa"], eight["sbora-fb"]) == (25_165_824, 31_457_280)
    for name in ("lora", *NAMES):
        model = adapt(toy.llama(), recipe(name))
        shapes = [(site.d_out, site.d_in) for site in sites(model)]
        wanted = sbora.trained_numbers(shapes, 2, 1)[name]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


@pytest.mark.parametrize("other", ["lora-pro", "lora-rite", "riemannian", "lora-plus"])
@pytest.mark.parametrize("name", NAMES)
def test_what_it_is_no_pair_for_is_refused_with_a_reason(name: str, other: str) -> None:
    with pytest.raises(LoralignError, match=r"hides the pair|only one factor trains"):
        adapt(toy.llama(), recipe(f"{name} + {other}"))


@pytest.mark.parametrize("start", ["lora-ga", "pissa", "hrp", "cora"])
def test_other_starts_are_refused(start: str) -> None:
    with pytest.raises(LoralignError, match="both set the init"):
        recipe(f"sbora-fa + {start}")
