"""ResLoRA: its three shortcuts, exact ragged ranks, lossy merges and what they state, nothing held after a forward."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import toy
from loralign import LoralignError, Recipe, adapt, attach, build, drive, optimizer, peft_config, sites
from loralign.carrier.slot import constants_of, effective, live_of
from loralign.io.export import export
from loralign.methods.form.reslora import WINDOW, kind, shortcuts
from loralign.plan.combinations import Surroundings, check_combination
from oracles import reslora
from toy import batch_for
from trainers import toy_trainer

R, S, LAYERS, WIDTH = 3, 2.0, 4, 6
KINDS = ("bs", "is", "ms")


def recipe(shortcut: str = "bs", span: int = 2, name: str = "reslora", **fields: Any) -> Recipe:
    options = {"shortcut": shortcut, "span": span} if name == "reslora" else {}
    made = build(name, options, **{"r": R, "alpha": R * S, "seed": 3, **fields})
    assert isinstance(made, Recipe)
    return made


class Deep(nn.Module):
    """h = W_n·tanh(h) four times, of what is wider the first numbers; `one` makes every input the same."""

    def __init__(self, *, one: bool = False, widths: Sequence[int] = (WIDTH,) * LAYERS) -> None:
        super().__init__()
        self.layers, self.one = nn.ModuleList(nn.Linear(WIDTH, width, bias=False) for width in widths), one

    def forward(self, x: Tensor) -> Tensor:
        total, h = x, x
        for n, layer in enumerate(self.layers):
            total = layer(x * (n + 1.0) if self.one else h)
            h = between(total)
        return total


def between(h: Tensor) -> Tensor:
    return torch.tanh(h)[..., :WIDTH]


def deep(shortcut: str, span: int = 2, ranks: Mapping[str, int] | None = None, **how: Any) -> Any:
    torch.manual_seed(0)
    made = recipe(shortcut, span, targets=("0", "1", "2", "3"), ranks=ranks or {}, max_grad_norm=0.0)
    model = adapt(Deep(**how).double(), made).double().train()
    for k, site in enumerate(sites(model)):
        B = live_of(site.layer, site.adapter).B
        B.data.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(k)))
    return model


def tensors(model: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    layers = [site.layer for site in sites(model)]
    live = [live_of(layer, "default") for layer in layers]
    return [layer.get_base_layer().weight for layer in layers], [v.A for v in live], [v.B for v in live]  # type: ignore[operator]


def rows() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("span", [0, 2, 9])
@pytest.mark.parametrize("shortcut", KINDS)
def test_values_and_gradients_equal_the_oracle(shortcut: str, span: int) -> None:
    """Of A and B of every block: each gets the sum over the blocks that read it."""
    same_as_the_oracle(deep(shortcut, span), shortcut, span)


def same_as_the_oracle(model: Any, shortcut: str, span: int) -> None:
    found = []
    (W, A, B), s = tensors(model), [site.s for site in sites(model)]
    for run in (lambda: model(rows()), lambda: reslora.outputs(shortcut, span, W, A, B, s, rows(), between)[0]):
        out = run()
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [*A, *B], allow_unused=True)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


ENDS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "a wider block": ({"widths": (6, 8, 6, 6)}, {"bs": [0, 0, 0, 1], "is": [0, 0, 0, 1], "ms": [0, 0, 0, 1]}),
    "a lower rank": ({"ranks": {"1": 2}}, {"bs": [0, 1, 2, 2], "is": [0, 1, 1, 1], "ms": [0, 0, 0, 1]}),
}
"""What ends a chain, and the blocks before each block then: sizes in all shortcuts, ranks where A·x are added."""


@pytest.mark.parametrize("shortcut", KINDS)
@pytest.mark.parametrize("end", ENDS)
def test_chains_end_where_sizes_change(end: str, shortcut: str) -> None:
    """Training and merging alike, and nothing reaches beyond the end."""
    how, want = ENDS[end]
    model = deep(shortcut, **how)
    W, A, B = tensors(model)
    assert reslora.blocks_before(shortcut, 2, W, A) == want[shortcut]
    same_as_the_oracle(model, shortcut, 2)
    _, inputs = reslora.outputs(shortcut, 2, W, A, B, [site.s for site in sites(model)], rows(), between)
    norms = [float((x if shortcut == "is" else x @ A_.T).detach().norm()) for x, A_ in zip(inputs, A, strict=True)]
    form, live = shortcuts(shortcut, 2), {site.name: live_of(site.layer, site.adapter) for site in sites(model)}
    for n, site in enumerate(sites(model)):
        (A_n, B_n), m = effective(site.layer, site.adapter), want[shortcut][n]
        of_names = form.factors(live[site.name], [live[other] for other in form.neighbours(site.name, list(live))])
        assert all(torch.equal(one.dense(), two) for one, two in zip(of_names, (A_n, B_n), strict=True))  # as files do
        if shortcut == "bs":
            assert torch.equal(A_n, torch.cat([A[n - k] for k in range(m + 1)]))
        else:
            torch.testing.assert_close(B_n, reslora.merged_factor(shortcut, m, n, norms) * B[n], rtol=1e-6, atol=0)


def test_blocks_are_exported_exactly_with_ragged_ranks() -> None:
    model = deep("bs").eval()
    W, *_ = tensors(model)
    factors = [effective(site.layer, site.adapter) for site in sites(model)]
    assert [A_.shape[0] for A_, _ in factors] == [R, 2 * R, 3 * R, 3 * R]
    x = h = rows()
    for W_n, (A_n, B_n) in zip(W, factors, strict=True):
        h = x @ (W_n + S * B_n @ A_n).T
        x = torch.tanh(h)
    torch.testing.assert_close(model(rows()), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_a_merge_follows_the_norms_that_training_saw(shortcut: str) -> None:
    model, span = deep(shortcut), 2
    W, A, B = tensors(model)
    batches = [scale * rows() for scale in (0.5, 1.0, 2.0)]
    norms = torch.zeros(LAYERS, dtype=torch.float64)
    for x in batches:
        model(x)
        _, inputs = reslora.outputs(shortcut, span, W, A, B, [S] * LAYERS, x, between)
        norms += torch.stack([(v if shortcut == "is" else v @ A_.T).norm() for v, A_ in zip(inputs, A, strict=True)])
    model.eval()
    model(rows())  # counts for nothing
    assert [int(constants_of(s.layer, s.adapter)["seen"]) for s in sites(model)] == [3] * LAYERS
    for n, site in enumerate(sites(model)):
        A_n, B_n = effective(site.layer, site.adapter)
        m = reslora.blocks_before(shortcut, span, W, A)[n]
        factor = reslora.merged_factor(shortcut, m, n, norms.tolist())
        torch.testing.assert_close(A_n, A[n])
        torch.testing.assert_close(B_n, factor * B[n], rtol=1e-6, atol=0)


def test_the_oldest_norm_makes_room() -> None:
    model = deep("is")
    for k in range(WINDOW + 3):
        model((k + 1.0) * rows())
    kept = constants_of(sites(model)[0].layer, "default")
    want = rows().norm() * torch.tensor([*range(WINDOW + 1, WINDOW + 4), *range(4, WINDOW + 1)], dtype=torch.float64)
    torch.testing.assert_close(kept["norms"].double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_a_merge_is_exact_where_inputs_are_multiples(shortcut: str) -> None:
    """x_{n−k} = α_k·x_n: is at any A, ms where all A are one; then the unmerged and the merged model agree."""
    model = deep(shortcut, one=True)
    W, A, _ = tensors(model)
    if shortcut == "ms":
        for A_ in A[1:]:
            A_.data.copy_(A[0])
    want = model(rows()).detach()
    (A_n, B_n), x = effective(sites(model)[-1].layer, "default"), LAYERS * rows()
    torch.testing.assert_close(x @ (W[-1] + S * B_n @ A_n).T, want, rtol=0, atol=1e-10)


def trained(shortcut: str, steps: int = 3, **fields: Any) -> Any:
    made = recipe(shortcut, **fields)
    model = adapt(toy.llama(num_hidden_layers=3), made)
    opt = optimizer(model, made, 0.02)
    driver = drive(model, made, opt, steps)
    model.train()
    for step in range(steps):
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=batch_for(model)["input_ids"][:2]).logits
    return out[:, -8:]  # the rows and positions of the probes


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_an_export_states_what_the_merge_loses(shortcut: str, tmp_path: Path) -> None:
    model = trained(shortcut)
    report = export(model, tmp_path / "out", base_id="toy", probes=batch_for(model))
    stock = PeftModel.from_pretrained(toy.llama(num_hidden_layers=3), tmp_path / "out").eval()
    assert not report.exact and not report.method_exact and report.difference is not None
    lost = float((logits(stock) - logits(model)).norm() / logits(model).norm())
    assert report.difference.relative == pytest.approx(lost, rel=1e-3) and lost > 1e-6
    assert "no exact plain form" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    base = logits(toy.llama(num_hidden_layers=3))
    assert lost < float((base - logits(model)).norm() / logits(model).norm())  # better than no adapter
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shortcut", KINDS)
def test_activation_checkpointing_is_right_or_refused(shortcut: str, reentrant: bool) -> None:
    made, found = recipe(shortcut), []
    for kept in (True, False):
        model = adapt(toy.llama(), made)
        for k, site in enumerate(sites(model)):
            B = live_of(site.layer, site.adapter).B
            B.data.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(k)))
        model.train()
        if not kept:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if shortcut != "bs":
                with pytest.raises(LoralignError, match=r"gradient_checkpointing off, or use `shortcut: bs`"):
                    model(**batch_for(model))
                return
        model(**batch_for(model)).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_a_checkpoint_of_ones_own_is_refused_in_backward(shortcut: str) -> None:
    """No flag tells of it: the layer runs again after the model's forward, where nobody hands it inputs."""
    model = deep(shortcut)
    inner = model.get_base_model()
    layers = list(inner.layers)

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.tanh(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
        return x

    inner.forward = forward
    with pytest.raises(LoralignError, match="shortcut: bs"):
        model(rows()).sum().backward()


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_nothing_is_held_after_the_forward(shortcut: str) -> None:
    """Beyond what autograd keeps: with its graph the inputs go, also after an error within."""
    model = deep(shortcut)
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.get_base_model().layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    model(rows()).sum().backward()
    gc.collect()
    assert len(seen) == LAYERS and not any(ref() is not None for ref in seen)
    (path,) = {site.layer.lora_variant["default"].path for site in sites(model)}  # type: ignore[index, operator, union-attr]
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, WIDTH + 1, dtype=torch.float64))
    assert not path.begun and path.owner is None and all(handed.value is None for handed in path.handed)


def test_generation_uses_the_shortcuts() -> None:
    """`generate` calls the base model itself, with a cache: tokens equal those of whole forwards."""
    for shortcut in KINDS:
        model = trained(shortcut, steps=6)
        ids = batch_for(model)["input_ids"][:1, :4]
        done = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        for at in range(4, 8):
            with torch.no_grad():
                assert model(input_ids=done[:, :at]).logits[0, -1].argmax() == done[0, at]


def test_chains_are_of_one_kind_and_one_stack() -> None:
    names = [
        *(f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(3)),
        *(f"decoder.block.{i}.layer.{j}.{a}.q" for i in range(3) for j, a in enumerate(["SelfAttention", "Cross"])),
        *(f"h.{i}.mlp.experts.{e}.w1" for i in range(2) for e in range(2)),
    ]
    form = shortcuts(span=9)
    assert list(form.neighbours(names[2], names)) == [names[1], names[0]]
    assert list(form.neighbours("decoder.block.2.layer.1.Cross.q", names)) == [
        "decoder.block.1.layer.1.Cross.q",
        "decoder.block.0.layer.1.Cross.q",
    ]
    assert list(form.neighbours("h.1.mlp.experts.1.w1", names)) == ["h.0.mlp.experts.1.w1"]
    assert kind("3.up") == "#.up" and kind("layers.3") == "layers.#" and kind("q_proj") == "q_proj"


def test_sharding_and_pairwise_optimizers_are_refused() -> None:
    for shortcut in KINDS:
        with pytest.raises(LoralignError, match="FSDP2 has sharded again; use DDP"):
            check_combination(recipe(shortcut), Surroundings(engine="fsdp"))
        for other in ("lora-pro", "lora-rite"):
            with pytest.raises(LoralignError, match="hides the pair"):
                check_combination(replace(recipe(shortcut), transform=recipe(name=other).transform))


@pytest.mark.parametrize("shortcut", ["is", "ms"])
def test_stop_and_resume_keeps_the_norms(shortcut: str, tmp_path: Path) -> None:
    states = []
    for folder, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        made = recipe(shortcut, dropout=0.1)
        trainer = toy_trainer(tmp_path / folder, peft_config(made, toy.llama()), steps=4, save_steps=2)
        attach(trainer, made, resume_from=resume)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        found = sites(trainer.model)
        states.append(
            [t for s in found for t in (*effective(s.layer, s.adapter), constants_of(s.layer, s.adapter)["norms"])]
        )
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))
    assert re.match(r"model\.layers\.0", found[0].name)
