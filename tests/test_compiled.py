"""Compiled blocks in loops and trainers: the steps are the eager ones, what fails is said."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import loralign
import toy
from loralign import LoralignError, Recipe, adapt, attach, build, drive, optimizer, peft_config
from loralign.data.packing import check_packing
from loralign.data.widths import Packed, Padded, widths
from loralign.train import compiled, quick
from loralign.train.recorder import without_compiling
from loralign.train.row_trainer import RowTrainer
from loralign.train.settled import bare
from loralign.train.undisturbed import as_written, same_metrics
from tiny_trl import tokenizer

TRACED = "aot_eager"
"""Everything that inductor does but its kernels."""
SEEN = "eager"
"""Dynamo's part alone, for what is decided before a backend is asked."""
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("lora", {}),
    "twins": ("pissa", {}),
    "gates": ("sora", {}),
    "one-sided": ("sbora-fa", {}),
    "cross-layer": ("reslora", {}),
    "features": ("reslora", {"shortcut": "ms"}),
    "shared": ("prolora", {}),
    "inputs": ("prilora", {"interval": 2}),
    "chain": ("chain-of-lora", {"links": 2}),
}


pytestmark = [  # dynamo's own, of tensors that it looks at
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def recipe_of(form: str, dropout: float = 0.0) -> Recipe:
    name, options = FORMS[form]
    made = build(name, options, r=4, dropout=dropout)
    assert isinstance(made, Recipe)
    return made


def batch(n: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(1, toy.VOCAB, (2, n))
    return {"input_ids": ids, "labels": ids}


class Loop:
    """A bare loop on a tiny model, always the same."""

    def __init__(self, form: str, *, checkpointing: bool = False, dropout: float = 0.0, **config: Any) -> None:
        self.recipe = recipe_of(form, dropout)
        self.model = adapt(toy.llama(num_hidden_layers=2, use_cache=False, **config), self.recipe).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if form == "inputs":  # it sorts numbers, and two that are nearly equal may change places by rounding
            self.model.double()

    def run(self, steps: int = 4, lengths: tuple[int, ...] = (8,)) -> list[float]:
        opt = optimizer(self.model, self.recipe, 1e-2)
        driver, losses = drive(self.model, self.recipe, opt, steps), []
        torch.manual_seed(1)
        for k in range(steps):
            loss = self.model(**batch(lengths[k % len(lengths)])).loss
            loss.backward()
            opt.step()
            driver.after_step()
            opt.zero_grad()
            losses.append(loss.item())
        return losses


QUICK = {"plain", "features"}


@pytest.mark.parametrize("form", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FORMS])
def test_compiled_steps_are_the_steps(form: str) -> None:
    plain = Loop(form).run()
    loop = Loop(form)
    blocks = loralign.compile(loop.model, backend=TRACED)
    assert loop.run() == pytest.approx(plain, rel=1e-6)
    assert blocks.why == "" and counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    blocks.restore()
    assert all(block._compiled_call_impl is None for block in blocks.blocks)


@pytest.mark.parametrize(
    "form", ["twins", *(pytest.param(f, marks=pytest.mark.slow) for f in ("plain", "gates", "one-sided", "shared"))]
)
def test_compiled_blocks_are_checkpointed(form: str) -> None:
    checkpoints: list[int] = []

    def seeing(graph: Any, inputs: Any) -> Any:
        checkpoints.append(sum("checkpoint" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    plain = Loop(form, checkpointing=True).run(3)
    loop = Loop(form, checkpointing=True)
    blocks: Any = compiled.Blocks(loop.model, seeing)  # type: ignore[arg-type]
    blocks.start()
    assert loop.run(3) == pytest.approx(plain, rel=1e-6)
    assert blocks.why == "" and checkpoints and set(checkpoints) == {1}  # one in every graph: a block recomputes


def test_a_call_of_another_kind_while_steps_are_recorded_is_no_fault_of_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers makes a mask there of rows without padding, for which it makes none else."""
    loop = Loop("plain")
    blocks = compiled.Blocks(loop.model, SEEN)
    blocks.start()
    loop.run(1)
    mask = {"attention_mask": torch.ones(2, 1, 8, 8).tril().bool()}
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with without_compiling(), pytest.raises(RuntimeError, match="of another kind than before"):
        loop.model(**batch(), **mask)
    monkeypatch.undo()
    with without_compiling(), pytest.raises(RuntimeError, match="recompile"):
        loop.model(**batch(6))
    loop.model(**batch(), **mask)
    assert blocks.why == ""


def test_layers_of_one_input_share_a_product() -> None:
    def products(loop: Loop) -> list[int]:
        seen: list[int] = []

        def counted(graph: Any, inputs: Any) -> Any:
            inside = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]  # also of a checkpoint
            seen.append(sum(node.target is nn.functional.linear for m in inside for node in m.graph.nodes))
            return graph

        blocks: Any = compiled.Blocks(loop.model, counted)  # type: ignore[arg-type]
        blocks.start()
        loop.run(1)
        assert blocks.why == ""
        return seen

    # of a block: 7 weights, 7 times B, and A once for q, k, v, once for o, for gate and up, for down
    assert products(Loop("plain")) == [18, 18] and products(Loop("twins")) == [18, 18]
    assert products(Loop("plain", checkpointing=True)) == [21]
    assert products(Loop("plain", dropout=0.1)) == [21, 21]


def inputs_of(backend: str, only_trial: bool = False) -> dict[str, list[float]]:
    """Sums of inputs of one token, whose q and k have a gradient of zero; three layers of one rank."""
    recipe = build("prilora", {"first_share": 1.0, "last_share": 1.0}, r=2)
    assert isinstance(recipe, Recipe)
    model = adapt(toy.llama(num_hidden_layers=3, use_cache=False), recipe).train()
    blocks = loralign.compile(model, backend=backend) if backend else None
    driver = drive(model, recipe, optimizer(model, recipe, 1e-2), 100)
    logits = model(input_ids=torch.tensor([[3], [5]])).logits
    if not only_trial:
        logits.square().sum().backward()
    assert blocks is None or blocks.why == ""
    assert driver.inputs is not None
    return {s: row.tolist() for some in driver.inputs.taken() for s, row in zip(some.sites, some.squares, strict=True)}


def test_compiled_sums_of_inputs_are_the_sums() -> None:
    plain = inputs_of("")
    assert all(min(row) > 0 for row in plain.values()) and "self_attn.q_proj" in " ".join(plain)
    found = inputs_of(TRACED)
    assert found.keys() == plain.keys()
    assert all(found[name] == pytest.approx(row, rel=1e-5) for name, row in plain.items())
    assert counters["stats"]["unique_graphs"] == 2  # the first block, whose input trains nothing, and all others
    assert all(set(row) == {0.0} for row in inputs_of(SEEN, only_trial=True).values())


def t5_losses(backend: Any, steps: int = 2) -> tuple[list[float], Any]:
    recipe = recipe_of("plain")
    model: Any = adapt(toy.t5(), recipe).train()
    blocks: Any = compiled.Blocks(model, backend) if backend else None
    if blocks:
        blocks.start()
    opt, found = optimizer(model, recipe, 1e-2), []
    for k in range(steps):
        loss = model(**toy.batch_for(model, seed=k), use_cache=False).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.append(loss.item())
    return found, blocks


def test_encoders_and_decoders_have_trials_of_their_own() -> None:
    def without_cross_attention(graph: Any, inputs: Any) -> Any:
        several = sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes) > 1

        def run(*args: Any) -> Any:
            if several:
                raise ValueError("no cross-attention")
            return graph(*args)

        return run

    plain, _ = t5_losses("")
    found, blocks = t5_losses(SEEN)
    assert found == pytest.approx(plain, rel=1e-5) and blocks.why == ""
    # of each stack the first block, which makes the position bias, and the second
    assert len(blocks.tried) == 4 == counters["stats"]["unique_graphs"]
    found, blocks = t5_losses(without_cross_attention, 1)
    assert found == pytest.approx(plain[:1], rel=1e-5) and blocks.why == "ValueError: no cross-attention"


def test_a_block_that_draws_is_compiled() -> None:
    loop = Loop("plain", attention_dropout=0.1)
    blocks = loralign.compile(loop.model, backend=SEEN)
    assert all(math.isfinite(loss) for loss in loop.run(2))
    assert blocks.why == "" and counters["stats"]["unique_graphs"] >= 1


def seeing() -> Any:
    """Images and text: blocks of two kinds with other arguments; the model collects the hidden states of one."""
    text = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    image = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=image, text_config=text, image_token_id=39))


@pytest.mark.parametrize("exclude", [(), ("vision_tower",)], ids=["both", "text"])
def test_a_model_of_text_and_images_is_compiled(exclude: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    def losses(backend: str) -> list[float]:
        recipe = build("lora", r=2, exclude=exclude)
        assert isinstance(recipe, Recipe)
        model = adapt(seeing(), recipe).train()
        if backend:
            blocks = loralign.compile(model, backend=backend)
            kinds = {type(block).__name__ for block in blocks.blocks}
            assert kinds == {"LlamaDecoderLayer", *(() if exclude else ("CLIPEncoderLayer",))}
        opt, found = optimizer(model, recipe, 1e-2), []
        ids, image = torch.tensor([[1, 39, 39, 39, 39, 2, 3]]), torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
        for _ in range(2):
            loss = model(input_ids=ids, pixel_values=image, labels=ids).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            found.append(loss.item())
        assert not backend or blocks.why == ""
        return found

    assert losses(TRACED) == pytest.approx(losses(""), rel=1e-6)
    assert counters["stats"]["unique_graphs"] >= 1
    assert ("it collects hidden_states" in caplog.text) == (not exclude)


def test_what_transformers_collects_is_whole() -> None:
    plain, model = Loop("plain").model, Loop("plain").model
    loralign.compile(model, backend=TRACED)
    given = batch()
    for one in (plain, model):
        found = one(**given, output_hidden_states=True).hidden_states
        assert len(found) == 3
    assert counters["stats"]["unique_graphs"] == 0


def test_blocks_that_were_split_afterwards_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """As a Trainer under FSDP does it when it begins."""
    model = Loop("plain").model
    blocks = loralign.compile(model, backend=TRACED)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for block in blocks.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        model(**batch()).loss.backward()
        assert blocks.why == "its parameters are split over processes" and len(said(caplog)) == 1
        assert loralign.compile(model, backend=TRACED).why == blocks.why
    finally:
        torch.distributed.destroy_process_group()


def test_evidence_at_a_knot_finds_the_blocks_as_they_are() -> None:
    loop = Loop("plain")
    blocks = loralign.compile(loop.model, backend=SEEN)
    loop.run(1)
    before = counters["stats"]["unique_graphs"]
    with as_written(loop.model):
        assert all(block._compiled_call_impl is None for block in blocks.blocks)
        loop.model(**batch(11))
    assert counters["stats"]["unique_graphs"] == before
    assert all(block._compiled_call_impl is not None for block in blocks.blocks)


# ----------------------------------------------------------------------------------------------------- what goes wrong


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "are not compiled" in r.getMessage()]


def test_a_compiler_that_fails_leaves_the_steps_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand pages of it")

    plain, loop = Loop("plain").run(2), Loop("plain")
    blocks: Any = compiled.Blocks(loop.model, broken)  # type: ignore[arg-type]
    blocks.start()
    assert loop.run(2) == plain
    assert len(said(caplog)) == 1 and "Failed to find C compiler" in blocks.why and "pages" not in blocks.why


def test_a_compiler_that_is_wrong_is_found_by_the_trial(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *args: [t * 1.5 if t.is_floating_point() else t for t in graph(*args)]

    plain, loop = Loop("plain").run(2), Loop("plain")
    compiled.Blocks(loop.model, wrong).start()  # type: ignore[arg-type]
    assert loop.run(2) == plain
    assert len(said(caplog)) == 1 and "differs by" in said(caplog)[0]


def test_a_block_that_breaks_the_graph_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    plain, loop = Loop("plain").run(2), Loop("plain")
    blocks = loralign.compile(loop.model, backend=TRACED)
    mlp: Any = blocks.blocks[0].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, Breaks())
    assert loop.run(2) == pytest.approx(plain, rel=1e-6)
    assert len(said(caplog)) == 1 and "Unsupported" in blocks.why
    assert "(User-inserted graph break" in blocks.why  # dynamo's explanation: its first line names no function


@pytest.mark.parametrize("form", ["gates", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS if f != "gates")])
def test_blocks_are_compiled_under_autocast(form: str) -> None:
    """Forms look whether it is on, and reslora where sizes change: in ways that torch 2.11's dynamo did not know."""
    loop = Loop(form)
    blocks = loralign.compile(loop.model.bfloat16(), backend=SEEN)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loop.model(**batch()).loss
    loss.backward()
    assert blocks.why == "" and counters["stats"]["unique_graphs"] >= 1 and math.isfinite(loss.item())


def test_a_storm_of_shapes_ends(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "STORM", 2)
    lengths = tuple(range(4, 9))
    plain, loop = Loop("plain").run(5, lengths), Loop("plain")
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=2):
        blocks = loralign.compile(loop.model, backend=SEEN)
        assert loop.run(5, lengths) == pytest.approx(plain, rel=1e-6)
    assert len(said(caplog)) == 1 and "were compiled 2 times" in blocks.why
    assert counters["stats"]["unique_graphs"] == 2


def test_evaluation_and_generation_are_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = Loop("plain").model
    loralign.compile(model, backend=TRACED)
    model.eval()
    model(**batch())
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False)
    model.train()
    model(**batch(), use_cache=True)
    assert counters["stats"]["unique_graphs"] == 0
    assert "pass use_cache=False" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_nothing_is_done_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        blocks = loralign.compile(Loop("plain").model)
    assert blocks.why == "there is no GPU" and not said(caplog)
    assert all(block._compiled_call_impl is None for block in blocks.blocks)


def test_a_model_without_blocks_is_named(caplog: pytest.LogCaptureFixture) -> None:
    blocks = loralign.compile(nn.Linear(2, 2), backend=TRACED)
    assert said(caplog) and blocks.why == "Linear does not name its blocks"


def test_a_model_that_trains_nothing_in_its_blocks_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Loop("plain").model.requires_grad_(False)
    blocks = loralign.compile(model, backend=TRACED)
    assert said(caplog) and blocks.why == "LlamaForCausalLM trains nothing in its blocks"


# --------------------------------------------------------------------------------------------------------- few lengths


def test_lengths_are_few_and_cover_the_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.rand(500, generator=draw).pow(2) * 400 + 20).long().tolist()
    found = widths(lengths, 4, 512)
    assert len(found.lengths) == 4 and found.lengths[-1] >= max(lengths) and all(n % 8 == 0 for n in found.lengths)
    assert [found.of(n) for n in (1, found.lengths[0], found.lengths[0] + 1, 10**4)] == [
        *(found.lengths[0], found.lengths[0], found.lengths[1], 10**4),
    ]
    one = widths(lengths, 4, 512).least
    assert one < found.padding < one + 0.15
    assert widths([30] * 50, 4, 30) == (same := widths([30] * 50, 4, 30)) and same.lengths == (30,)


def rows(count: int = 12) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)
    made = [torch.randint(1, toy.VOCAB, (3 + k % 9,), generator=draw).tolist() for k in range(count)]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in made]


def loss(model: Any, batch: dict[str, Any]) -> float:
    out = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).item()


def test_padding_and_packing_change_no_loss() -> None:
    model, given = toy.llama().eval(), rows()
    plain = DataCollatorForLanguageModeling(pad_token_id=0)
    alone = [loss(model, plain([row])) * (len(row["labels"]) - 1) for row in given]
    expected = sum(alone) / sum(len(row["labels"]) - 1 for row in given)
    padded = Padded(plain, widths([len(r["input_ids"]) for r in given], 4, 40))(given)
    assert padded["input_ids"].shape == (12, 16) and loss(model, padded) == pytest.approx(expected, rel=1e-5)
    both = [
        {k: [x for row in given[j::3] for x in row[k]] for k in ("input_ids", "labels")}
        | {"seq_lengths": [len(row["input_ids"]) for row in given[j::3]]}
        for j in range(3)
    ]
    packed = Packed(40)(both)
    assert packed["input_ids"].shape == (3, 40) and loss(model, packed) == pytest.approx(expected, rel=1e-5)
    check_packing(model, collate=Packed(20))


def test_labels_at_the_beginning_of_a_document_do_not_count() -> None:
    made = Packed(8)([{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}])
    assert made["labels"].tolist() == [[-100, 2, -100, 4, 5, -100, -100, -100]]
    assert made["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]


# ------------------------------------------------------------------------------------------------------------ trainers


def trainer_of(folder: Any, packing: bool, model: Any = None, kind: Any = RowTrainer, **fields: Any) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", packing=packing,
        seed=3, **{"logging_steps": 1, "max_steps": 4, "bf16": False, "max_length": 16, **fields},
    )  # fmt: skip
    recipe = recipe_of("plain")
    model, data = model or toy.llama(use_cache=False), Dataset.from_list(rows(40))
    held_out = Dataset.from_list([*data.select(range(3)), {"input_ids": [3] * 15, "labels": [3] * 15}])
    trainer = kind(
        model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer(),
        peft_config=peft_config(recipe, model),
    )  # fmt: skip
    attach(trainer, recipe)
    return trainer


def losses_of(trainer: SFTTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_trainer_of_rows_learns_the_same(packing: bool, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = losses_of(trainer_of(tmp_path / "plain", packing))
    trainer = trainer_of(tmp_path / "quick", packing)
    with caplog.at_level(logging.INFO):
        blocks = quick.quicken(trainer, packing=packing, seed=0, backend=TRACED, short=1)
    assert "padded to" in caplog.text and ("padded rows need no mask" in caplog.text) != packing
    assert losses_of(trainer) == pytest.approx(plain, rel=1e-5)
    entry = next(entry for entry in reversed(trainer.state.log_history) if "num_tokens" in entry)
    assert entry["grad_norm"] > 0 and trainer.state.total_flos > 0
    assert not packing or entry["num_tokens"] == 4 * 2 * 2 * 16
    assert blocks is not None and blocks.why == "" and 1 <= counters["stats"]["unique_graphs"] <= 4
    assert all(block._compiled_call_impl is None for block in blocks.blocks)  # after the run the model is as it was
    assert trainer.model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("changed", [{}, {"loss_type": "dft"}], ids=str)
def test_what_a_trainer_of_rows_logs_is_trls(changed: dict[str, Any], tmp_path: Any) -> None:
    """Between logs, with evaluations and evidence in between; and it reads no number between forward and backward."""
    logs, reads = {}, {}
    fields: dict[str, Any] = {"logging_steps": 3, "max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, **changed}
    for kind in (SFTTrainer, RowTrainer):
        trainer = trainer_of(tmp_path / kind.__name__, False, kind=kind, **fields)
        if kind is RowTrainer:
            batch = next(iter(trainer.get_train_dataloader()))
            with same_metrics(trainer):
                trainer.compute_loss(trainer.model.train(), batch)
        count = reads[kind] = Reads()
        compute = trainer.compute_loss

        def counted(model: Any, *args: Any, count: Any = count, compute: Any = compute, **kwargs: Any) -> Any:
            with count if bare(model).training else nullcontext():
                return compute(model, *args, **kwargs)

        trainer.compute_loss = counted
        trainer.train()
        timed = "runtime", "per_second"
        logs[kind] = [{k: v for k, v in e.items() if not k.endswith(timed)} for e in trainer.state.log_history]
    for ours, theirs in zip(logs[RowTrainer], logs[SFTTrainer], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6), ours
    spared = reads[SFTTrainer].count - reads[RowTrainer].count  # what is left are the masks of transformers
    assert spared == (0 if changed else 7 * 2 * 5)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_trainer_of_rows_has_trls_loss_on_one_of_several_processes(
    averaged: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labelled tokens of all of them are counted, and DDP takes the mean of their gradients."""
    found = []
    for kind in (SFTTrainer, RowTrainer):
        trainer = trainer_of(tmp_path / kind.__name__, False, kind=kind)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.args.average_tokens_across_devices = averaged
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
            loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=torch.tensor(40))
        found.append(float(loss.detach()))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


class Reads(TorchDispatchMode):
    """How often a number is read from a tensor; a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_modes_are_set_where_some_part_is_in_another(tmp_path: Any) -> None:
    """The Trainer sets the mode of all modules at every batch."""
    trainer = trainer_of(tmp_path, False, max_steps=4, eval_strategy="steps", eval_steps=2)
    inner = trainer.model.get_base_model().model
    set_to: list[bool] = []
    at_loss: list[bool] = []

    class Watched(torch.nn.Module):
        def train(self, mode: bool = True) -> Any:
            set_to.append(mode)
            return super().train(mode)

    def look(module: Any, args: Any) -> None:
        if not at_loss:
            set_to.clear()
        at_loss.append(module.watched.training)

    class Rest(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                inner.watched.eval()

    inner.watched = Watched().eval()
    inner.register_forward_pre_hook(look)
    trainer.add_callback(Rest())
    trainer.train()
    trains, rests = [True] * 2 * 2, [False]  # two steps of two batches, an evaluation of one
    assert at_loss == [*trains, *rests, *trains, *rests] and set_to == [False, True, False, True, False]


def test_trackers_see_the_norm_of_our_optimizer_and_flos_are_those_of_the_trainer(tmp_path: Any) -> None:
    """Trackers come before the recipe's callback; the Trainer would go through all modules for both at every step."""
    seen: list[float] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend([logs["grad_norm"]] if "loss" in logs else [])

    trainer, stock = trainer_of(tmp_path / "ours", False), trainer_of(tmp_path / "stock", False)
    trainer.callback_handler.callbacks.insert(0, Tracker())
    stock.floating_point_ops = partial(SFTTrainer.floating_point_ops, stock)  # type: ignore[method-assign]
    assert losses_of(trainer) == losses_of(stock)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == logged == [e["grad_norm"] for e in stock.state.log_history if "loss" in e] and len(seen) == 4
    assert trainer.state.total_flos == stock.state.total_flos > 0


@pytest.mark.parametrize(("window", "most"), [(13, None), (20, 32)], ids=["held out", "rows of a rule"])
def test_rows_are_masked_where_others_than_those_to_train_on_may_be_longer_than_a_window(
    window: int, most: int | None, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of 11 tokens to train on and one of 15 held out; a rule's own rows may be as long as `max_length`."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=toy.VOCAB, **sizes, num_key_value_heads=2, sliding_window=window, use_cache=False)
    trainer = trainer_of(tmp_path, False, MistralForCausalLM(config))
    trainer.args.max_length = most
    with caplog.at_level(logging.INFO):
        quick.quicken(trainer, packing=False, seed=0, backend=SEEN, short=1)
    assert "padded rows are masked in attention, since some of its layers are not causal" in caplog.text


def test_rows_may_be_allowed_to_be_longer_than_the_model_has_positions(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy.gpt2()
    trainer = trainer_of(tmp_path, False, model, max_length=2 * model.config.n_positions)
    with caplog.at_level(logging.INFO):
        quick.quicken(trainer, packing=False, seed=0, backend=SEEN, short=1)
    assert "padded rows need no mask" in caplog.text


def test_a_short_run_is_not_compiled(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert quick.quicken(trainer_of(tmp_path, False), packing=False, seed=0, backend=TRACED) is None
    assert "the run has 8 forwards" in said(caplog)[0]


def test_a_trainer_of_a_model_without_blocks_pads_as_ever(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, False)
    trainer.model.get_base_model()._no_split_modules = None
    collator = trainer.data_collator
    assert quick.quicken(trainer, packing=False, seed=0, backend=TRACED, short=1) is None
    assert said(caplog)[0].endswith("LlamaForCausalLM does not name its blocks") and trainer.data_collator is collator


@pytest.mark.parametrize("other", [True, "on"])
def test_attach_takes_no_other_compile(other: Any, tmp_path: Any) -> None:
    with pytest.raises(LoralignError, match=r"takes one of auto, off as `compile`"):
        attach(trainer_of(tmp_path, False), recipe_of("plain"), compile=other)


def test_the_example_of_the_documentation_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
    exec(compile(text.split("```python\n")[1].split("```")[0], "trainers.md", "exec"), {})
    assert capsys.readouterr().out == "compiled\n" and counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("form", ["plain", "twins", "one-sided"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_gives_the_steps(form: str, checkpointing: bool) -> None:
    plain, loop = Loop(form, checkpointing=checkpointing).run(3), Loop(form, checkpointing=checkpointing)
    blocks = loralign.compile(loop.model, backend="inductor")
    assert loop.run(3) == pytest.approx(plain, rel=1e-4)
    assert blocks.why == "" and counters["stats"]["unique_graphs"] >= 1
