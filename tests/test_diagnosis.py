"""What a start holds of a held-out gradient, against the formula in float64 on autograd's own gradient."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_trl
from loralign import LoralignError, Recipe, build, peft_config, sites
from loralign.io.heatmap import heat_map, kind_of, layer_of, places
from loralign.train.attach import attach
from loralign.train.diagnosis import BEST, diagnose
from loralign.train.journal import Journal
from toy import llama

R = 2


def trainer_of(folder: Path, name: str, *, held_out: bool = True, **fields: Any) -> tuple[Any, Recipe]:
    made = build(name, {"micro_batches": 2} if name == "lora-ga" else {}, r=R, **fields)
    assert isinstance(made, Recipe)
    model = llama()
    trainer = tiny_trl.sft(folder, peft_config(made, model), model, per_device_eval_batch_size=4)
    if held_out:
        trainer.eval_dataset = trainer.train_dataset.select(range(16, 24))
    attach(trainer, made)
    return trainer, made


def gradients(trainer: Any, count: int) -> dict[str, Tensor]:
    """Autograd's mean gradient of every base weight over the first evaluation batches, float64."""
    weights = {s.name: s.layer.get_base_layer().weight for s in sites(trainer.model)}  # type: ignore[operator]
    for w in weights.values():
        w.requires_grad_(True)
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for batch in islice(iter(trainer.get_eval_dataloader()), count):
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += g.double() / count
    for w in weights.values():
        w.requires_grad_(False)
    return total


def share(G: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """1 − ‖(I − P_left)·G·(I − P_right)‖²/‖G‖² by dense projections."""
    rest = G
    if left is not None:
        rest = rest - left @ torch.linalg.pinv(left) @ rest
    if right is not None:
        rest = rest - rest @ torch.linalg.pinv(right) @ right
    return 1 - float(rest.square().sum() / G.square().sum())


def stored(trainer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) that a twin trains around, or the live ones: what the exported file's first r slots hold."""
    found = {}
    for site in sites(trainer.model):
        layer: Any = site.layer
        A, B = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
        twin = A.shape[0] == 2 * R  # [ΔA; A0] and [B0 + ΔB | ΔB], all Δ zero now
        found[site.name] = (B[:, :R], A[R:] if twin else A)
    return found


@pytest.mark.parametrize(("name", "right_only"), [("lora", True), ("lora-ga", False), ("lora-fa", True)])
def test_shares_equal_the_dense_formula(name: str, right_only: bool, tmp_path: Path) -> None:
    trainer, made = trainer_of(tmp_path, name)
    found = diagnose(trainer, made, beside=(), micro_batches=2)
    assert (found.micro_batches, found.held_out) == (2, "the evaluation rows")
    factors = stored(trainer)
    for site, G in gradients(trainer, 2).items():
        B, A = factors[site]
        assert found.of[name][site] == pytest.approx(share(G, None if right_only else B, A), abs=2e-5)
        S = torch.linalg.svdvals(G).square()
        assert found.of[BEST][site] == pytest.approx(float(S[: 2 * R].sum() / S.sum()), abs=2e-5)
        assert found.energy[site] == pytest.approx(float(G.square().sum()), rel=1e-4)


def test_other_starts_are_those_that_their_recipes_write(tmp_path: Path) -> None:
    """`lora` beside lora-ga has the share of a plain LoRA trainer of the same seed, to rounding."""
    chosen, made = trainer_of(tmp_path / "a", "lora-ga", seed=3)
    plain, lora = trainer_of(tmp_path / "b", "lora", seed=3)
    beside = diagnose(chosen, made, beside=("lora",), micro_batches=2)
    alone = diagnose(plain, lora, beside=(), micro_batches=2)
    assert beside.of["lora"] == pytest.approx(alone.of["lora"], abs=2e-5)
    total = {start: beside.mean(start, list(beside.energy)) or 0.0 for start in beside.of}
    assert total["lora"] < total["lora-ga"] <= total[BEST]


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path: Path) -> None:
    ends = []
    for folder, measure in (("a", False), ("b", True)):
        torch.manual_seed(0)
        trainer, made = trainer_of(tmp_path / folder, "lora-ga")
        if measure:
            diagnose(trainer, made, micro_batches=2)
        trainer.train()
        ends.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_evaluation_rows_the_next_training_rows_count(tmp_path: Path) -> None:
    trainer, made = trainer_of(tmp_path, "lora-ga", held_out=False)
    assert diagnose(trainer, made, beside=(), micro_batches=2).held_out == "training rows that no init saw"
    with pytest.raises(LoralignError, match=r"leave none to measure on: set `data\.eval`"):
        diagnose(trainer, made, beside=("hrp-sketch",), micro_batches=2)


def test_the_first_line_of_the_log_says_what_the_start_knows(tmp_path: Path) -> None:
    """What the evidence cost, and every layer's shares; lora needs none and says none."""
    lines = {}
    for name in ("lora-ga", "lora"):
        made = build(name, {"micro_batches": 2} if name == "lora-ga" else {}, r=R)
        assert isinstance(made, Recipe)
        model = llama()
        trainer = tiny_trl.sft(tmp_path, peft_config(made, model), model, max_steps=1)
        journal = Journal(tmp_path / f"{name}.jsonl", None, None)
        journal.note_evidence(attach(trainer, made).evidence)
        trainer.add_callback(journal)
        trainer.train()
        lines[name] = [json.loads(line) for line in journal.path.read_text(encoding="utf-8").splitlines()]
    first, *rest = lines["lora-ga"]
    told = first["evidence"]
    assert first["step"] == 0 and told["micro_batches"] == 3 and told["tokens"] > 0 and len(told["sites"]) == 14
    assert all(0 < site["held_out"] <= 1 and 0 < site["captured"] <= 1 for site in told["sites"].values())
    assert len(rest) == len(lines["lora"]) and not any("evidence" in line for line in (*rest, *lines["lora"]))


def test_losses_are_said_at_the_tenths_of_the_way_and_at_evaluations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, args = Journal(tmp_path / "log.jsonl", None, None), SimpleNamespace()
    with caplog.at_level(logging.INFO, "loralign"):
        for step in range(101):
            state = SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)
            if step:
                journal.on_log(args, state, None, {"loss": 100.0 - step})
            if step % 50 == 0:
                journal.on_log(args, state, None, {"eval_loss": 1.0 + step})
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == ["before training: evaluation loss 1.0000", "step 10 of 100: loss 90.0000"] and len(said) == 13
    assert said[-2:] == ["step 100 of 100: loss 0.0000", "step 100 of 100: evaluation loss 101.0000"]


def test_full_is_no_start(tmp_path: Path) -> None:
    trainer, made = trainer_of(tmp_path, "lora")
    with pytest.raises(LoralignError, match="full has no start to compare with: leave it out"):
        diagnose(trainer, made, beside=("full",))


def test_a_site_that_a_method_cannot_serve_is_left_out(tmp_path: Path) -> None:
    trainer, made = trainer_of(tmp_path, "lora", ranks={"k_proj": 9})  # 2·9 > 16
    found = diagnose(trainer, made, beside=("lora-ga",), micro_batches=2)
    kinds = {name.rsplit(".", 1)[-1] for name in found.of["lora"].keys() - found.of["lora-ga"].keys()}
    assert kinds == {"k_proj"}
    assert found.mean("lora-ga", [n for n in found.energy if "k_proj" in n]) is None


def test_heat_map_places_layers_and_kinds(tmp_path: Path) -> None:
    assert (layer_of("model.layers.12.mlp.up_proj"), kind_of("model.layers.12.mlp.up_proj")) == (12, "mlp.up_proj")
    assert (layer_of("head"), kind_of("head")) == (0, "head")
    bert = [f"encoder.layer.{i}.{k}.dense" for i in (0, 3) for k in ("attention.output", "output")]
    assert places(bert).labels == ("attention.output.dense", "output.dense")
    assert places(bert).at[bert[3]] == (1, 1) and places(bert).layers == (0, 3)
    t5 = [f"{side}.block.0.layer.0.SelfAttention.q" for side in ("encoder", "decoder")]
    assert set(places(t5).at.values()) == {(0, 0), (0, 1)}  # a cell each
    panels = {"one": {"h.0.a": 0.5, "h.1.a": 1.0, "h.1.b": 0.0}, "two": {"h.0.a": 0.25}}
    for more in ({}, {"three": {}, "four": {"h.1.b": 1.0}, "five": {}}):
        heat_map({**panels, **more}, tmp_path / "map.png", title="t", scale="%")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
