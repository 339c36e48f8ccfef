"""Tasks in sequence: rows, masks and scores, what a moment leaves, stops anywhere, the command and its files."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, ViTConfig, ViTForImageClassification, get_scheduler

import warm
from loralign import LoralignError, Recipe, build, factors, sites
from loralign.carrier.sites import draw_for
from loralign.config.tasks_file import load_tasks, parse_tasks, schema_text, to_tasks
from loralign.io.matrix import accuracy_picture
from loralign.train import tasks as driver
from loralign.train.accuracy import scores
from loralign.train.heads import draw_head
from loralign.train.task_rows import Ordered, Task, check_choices, check_tasks, drawn, joined, masked_loss, visible
from loralign.train.task_trainer import TasksTrainer, TaskTraining, by_task
from loralign.train.tasks import _Moments, _Run, run_tasks
from tiny_trl import tokenizer
from toy import bert, vit

ROOT = Path(__file__).parents[1]
TASKS, CLASSES, STEPS = 3, 6, 4
TRAINING = TaskTraining(5e-3, head_lr=1e-2, steps=STEPS, batch_size=8, save_every=2, eval_batch_size=16)


def images(classes: tuple[int, ...], count: int, seed: int) -> list[dict[str, Any]]:
    """Noise with one bright colour channel and corner per class."""
    draw, found = torch.Generator().manual_seed(seed), []
    for i in range(count):
        c = classes[i % len(classes)]
        pixels = torch.randn(3, 16, 16, generator=draw)
        pixels[c % 3, 8 * (c // 3) : 8 * (c // 3) + 8] += 2.0
        found.append({"pixel_values": pixels, "labels": c})
    return found


def of_images(count: int = 16) -> list[Task]:
    made = []
    for k in range(TASKS):
        own = (2 * k, 2 * k + 1)
        made.append(Task(f"task {k + 1}", images(own, count, k), images(own, 12, 100 + k)))
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("vit"), vit().config
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig.from_dict({**config.to_dict(), "num_labels": CLASSES})).save_pretrained(folder)
    return folder


def model_of(base: Path) -> ViTForImageClassification:
    made: ViTForImageClassification = ViTForImageClassification.from_pretrained(base)
    return made.eval()


def recipe(name: str = "sd-lora", options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    given = {"tasks": TASKS} if name == "sd-lora" else {}
    made = build(name, {**given, **(options or {})}, **{"r": 3, "seed": 5, **fields})
    assert isinstance(made, Recipe)
    return made


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        warm.verification(patch)
        result = run_tasks(model_of(base), recipe(), of_images(), TRAINING, out, base=str(base))
    assert result.verified and [f.name for f in result.moments] == ["after-1", "after-2", "after-3"]
    return out


# ------------------------------------------------------------------------------------------------------ rows and masks


def test_every_pass_has_all_rows_of_a_task_in_an_order_of_its_own() -> None:
    parts: list[list[dict[str, Any]]] = [[{"labels": k, "row": i} for i in range(5)] for k in range(2)]
    order = Ordered(parts, (12, 5), seed=3)
    rows = [order[i] for i in range(len(order))]
    assert [row["labels"] for row in rows] == [0] * 12 + [1] * 5
    first, second = [r["row"] for r in rows[:5]], [r["row"] for r in rows[5:10]]
    assert sorted(first) == sorted(second) == list(range(5)) and first != second
    assert drawn(5, 12, 3, 0) == first + second + [r["row"] for r in rows[10:12]]
    assert drawn(5, 5, 4, 0) != first


def test_a_row_sees_the_classes_of_its_task_or_of_those_so_far() -> None:
    tasks = [Task("a", images((0, 3), 2, 0), images((0,), 1, 0)), Task("b", images((1,), 1, 0), images((1,), 1, 0))]
    own, seen = visible(tasks, 5, "task"), visible(tasks, 5, "seen")
    assert own[3].tolist() == seen[0].tolist() == [True, False, False, True, False]
    assert own[1].tolist() == [False, True, False, False, False]
    assert seen[1].tolist() == [True, True, False, True, False]
    logits, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 3, 1])
    loss = masked_loss(own)(type("Out", (), {"logits": logits}), labels)
    two = torch.nn.functional.cross_entropy(logits[:3][:, [0, 3]], torch.tensor([0, 1, 1]), reduction="sum")
    assert float(loss) == pytest.approx(float(two) / 4)  # the class that is alone in its task costs nothing
    again = masked_loss(own)(type("Out", (), {"logits": logits}), labels, num_items_in_batch=8)
    assert float(again) == pytest.approx(float(two) / 8)


def test_scores_of_a_matrix_by_hand() -> None:
    found = scores([[0.5], [0.9, 0.8], [0.7, 0.6, 0.5]])  # the first task was known best after the second
    assert found.average == pytest.approx(0.6) and found.anytime == pytest.approx((0.5 + 0.85 + 0.6) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)
    assert scores([[0.5, 0.7]]).forgetting == 0.0 and scores([[0.2], [0.6, 0.4]]).forgetting == pytest.approx(-0.4)


def test_a_loss_of_one_class_is_refused() -> None:
    tasks = [Task(str(c), images((c,), 2, c), images((c,), 1, c)) for c in range(2)]
    with pytest.raises(LoralignError, match="the loss of task 1 sees one class alone"):
        check_choices(tasks[1:], visible(tasks, 2, "task"))
    check_choices(tasks[1:], visible(tasks, 2, "seen"))
    with pytest.raises(LoralignError, match="the loss of task 0 sees"):
        check_choices(tasks, visible(tasks, 2, "seen"))
    check_choices([joined(tasks)], visible([joined(tasks)], 2, "task"))


@pytest.mark.parametrize(
    ("change", "said"),
    {
        "shared": (lambda t: [t[0], replace(t[1], train=t[0].train)], "class 0 is in task task 1 and in task task 2"),
        "empty": (lambda t: [replace(t[0], test=[])], "task task 1 has no test rows"),
        "strange": (lambda t: [replace(t[0], test=t[1].test)], "test rows of task task 1 have class 2"),
        "head": (lambda t: [Task("x", images((9,), 2, 0), images((9,), 2, 0))], "does not fit a head of 6"),
        "none": (lambda t: [], "there are no tasks"),
    }.values(),
    ids=("shared", "empty", "strange", "head", "none"),
)
def test_tasks_that_do_not_fit_are_one_sentence(change: Callable[[list[Task]], list[Task]], said: str) -> None:
    with pytest.raises(LoralignError, match=said):
        check_tasks(change(of_images(4)), CLASSES)


# ------------------------------------------------------------------------------------------------------------- moments


def loaded(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(model_of(base), folder).eval()


def test_a_moment_is_a_plain_adapter_with_its_head(base: Path, whole: Path) -> None:
    """Stock PEFT reproduces the accuracies that were measured then; ranks grow by one link per task."""
    kept = json.loads((whole / "results.json").read_text())
    for moment, row in enumerate(kept["matrix"]):
        stock, seen = loaded(base, whole / f"after-{moment + 1}"), torch.arange(2 * moment + 2)
        assert stock.peft_config["default"].r == 3 * (moment + 1)
        for task, accuracy in zip(of_images(), row, strict=False):
            with torch.no_grad():
                logits = stock(pixel_values=torch.stack([r["pixel_values"] for r in task.test])).logits
            chosen = logits[:, seen].argmax(dim=1)
            right = (chosen == torch.tensor([r["labels"] for r in task.test])).float().mean()
            assert float(right) == pytest.approx(accuracy, abs=1e-6)
    assert kept["tasks"] == {f"task {k + 1}": [2 * k, 2 * k + 1] for k in range(TASKS)}
    assert kept["average"] == pytest.approx(sum(kept["matrix"][-1]) / 3) and kept["matrix"][0][0] > 0.8
    assert (whole / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def head(folder: Path) -> Tensor:
    stored = load_file(folder / "adapter_model.safetensors")
    (found,) = [value for key, value in stored.items() if key.endswith("classifier.weight")]
    return found


def test_a_task_ends_with_a_fresh_optimizer_and_a_checkpoint() -> None:
    noted: list[tuple[int, list[float]]] = []
    run: Any = SimpleNamespace(
        ends=[2, 4], matrix=[], measure=lambda *_: [0.5], note=lambda moment, row: noted.append((moment, row))
    )
    recipe: Any = SimpleNamespace(model=None, optimizer=SimpleNamespace(state={"weight": {"step": 2}}))
    moments, control = _Moments(run, None, recipe, None), SimpleNamespace(should_save=False)
    args = SimpleNamespace(should_save=False, save_strategy="no")
    moments.on_step_end(args, SimpleNamespace(global_step=1, is_world_process_zero=True), control)
    assert recipe.optimizer.state and not control.should_save and not noted
    moments.on_step_end(args, SimpleNamespace(global_step=2, is_world_process_zero=True), control)
    assert not recipe.optimizer.state and control.should_save
    assert noted == [(0, [0.5])] and run.matrix == [[0.5]]


def test_moments_are_measured_without_dropout_and_training_goes_on_with_it() -> None:
    modes: list[bool] = []

    class Watched(torch.nn.Module):
        def forward(self, rows: int) -> Any:
            modes.append(self.training)
            return SimpleNamespace(logits=torch.zeros(rows, 8))

    model, tasks = Watched().train(), of_images()
    run: Any = SimpleNamespace(
        seen=lambda moment: tasks[: moment + 1], training=TRAINING, _inputs=lambda rows, trainer: {"rows": len(rows)}
    )
    trainer = SimpleNamespace(
        compute_loss_context_manager=nullcontext, accelerator=SimpleNamespace(autocast=nullcontext)
    )
    assert len(_Run.measure(run, trainer, model, 1)) == 2
    assert modes and not any(modes) and model.training


def test_only_the_rows_of_a_tasks_own_classes_move_in_the_head(whole: Path) -> None:
    one, two, three = (head(whole / f"after-{k}") for k in (1, 2, 3))
    assert torch.equal(one[2:], torch.cat([one[2:4], two[4:]])) and not torch.equal(one[2:4], two[2:4])
    assert torch.equal(one[:2], three[:2]) and torch.equal(two[2:4], three[2:4])


def test_one_adapter_in_sequence_and_all_tasks_at_once(base: Path, tmp_path: Path) -> None:
    """The baseline keeps its rank and forgets nothing by rule; joint training has one moment, of all tasks."""
    training = replace(TRAINING, steps=2, mask="seen")
    model = model_of(base)
    alone = run_tasks(model, recipe("lora"), of_images(), training, tmp_path / "a", export_moments=False)
    assert [len(row) for row in alone.matrix] == [1, 2, 3] and not alone.moments
    assert {factors(site)[0].shape[0] for site in sites(model)} == {3}
    joint = run_tasks(model_of(base), recipe(), of_images(), training, tmp_path / "b", joint=True, base=None)
    assert [len(row) for row in joint.matrix] == [3] and joint.scores.forgetting == 0.0 and not joint.verified
    note = json.loads(next((tmp_path / "b" / "checkpoints").glob("*/loralign.json")).read_text())
    assert note["step"] == 3 * 2 and joined(of_images()).classes == tuple(range(6))
    picture = tmp_path / "p.png"
    accuracy_picture({"a": alone.matrix, "b": joint.matrix}, [t.name for t in of_images()], picture, title="t")
    assert picture.stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------- stopped


def killed(base: str, out: str, moment: str) -> None:
    """A run that kills itself: at a step, or at the end of task 2 while its adapter is written, or after that."""
    import os

    from loralign.train import journal

    real = {"export": driver.export, "write": driver.write_json, "step": journal.Journal.on_step_end}

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def export(model: Any, out: Path, **kwargs: Any) -> Any:
        return die() if moment == "export" and out.name == "after-2" else real["export"](model, out, **kwargs)

    def step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if moment == str(state.global_step):
            die()

    driver.export, journal.Journal.on_step_end = export, step  # type: ignore[assignment, method-assign]
    run_tasks(model_of(Path(base)), recipe(), of_images(), TRAINING, out)


CHILD = "import sys; sys.path[:0] = sys.argv[4:]; import test_tasks as t; t.killed(*sys.argv[1:4])"


SLOW = pytest.mark.slow


@pytest.mark.parametrize("moment", [pytest.param("3", marks=SLOW), "export", "8", pytest.param("9", marks=SLOW)])
def test_killed_before_at_and_after_a_switch_is_as_if_not(moment: str, base: Path, whole: Path, tmp_path: Path) -> None:
    """3: before the first switch; export: at the second; 8: before its checkpoint; 9: after it."""
    out = tmp_path / "out"
    argv = [str(base), str(out), moment, *map(str, (ROOT / "tests", ROOT / "src"))]
    done = warm.run([__import__("sys").executable, "-P", "-c", CHILD, *argv])
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = run_tasks(model_of(base), recipe(), of_images(), TRAINING, out, resume=True)
    want = json.loads((whole / "results.json").read_text())
    assert found.matrix == want["matrix"]
    for k in (1, 2, 3):
        name = f"after-{k}/adapter_model.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes(), k


def fewer_tests(tasks: list[Task]) -> list[Task]:
    return [tasks[0], replace(tasks[1], test=tasks[1].test[:-1]), *tasks[2:]]


def test_another_run_is_not_gone_on_with(base: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for change, said in (
        ({"training": replace(TRAINING, learning_rate=1e-3)}, "`learning_rate` is 0.001, the run began with 0.005"),
        ({"tasks": of_images(24)}, "the rows of `task task 1` are not those"),
        ({"tasks": fewer_tests(of_images())}, "the rows of `task task 2` are not those"),
        ({"recipe": recipe(r=2)}, "`r` is 2, the run began with 3"),
        ({"recipe": recipe(options={"absorb": 0.1})}, "`outer.outer.absorb` is 0.1, the run began with None"),
    ):
        given: dict[str, Any] = {"recipe": recipe(), "tasks": of_images(), "training": TRAINING, **change}
        with pytest.raises(LoralignError, match=said):
            run_tasks(model_of(base), output=out, resume=True, **given)
    with pytest.raises(LoralignError, match="not empty"):
        run_tasks(model_of(base), recipe(), of_images(), TRAINING, out)
    again = run_tasks(model_of(base), recipe(), of_images(), TRAINING, out, resume=True, export_moments=False)
    assert again.matrix == json.loads((whole / "results.json").read_text())["matrix"]  # it had ended


# -------------------------------------------------------------------------------------------------------- compositions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain-of-lora + lora-rite", {}),
        pytest.param("chain-of-lora + lora-pro", {}, marks=SLOW),
        ("chain-of-lora + rm-lora", {}),
        ("sd-lora", {"later_ranks": (2, 1), "tasks_per_rank": 1, "absorb": 9e-4}),
        pytest.param("xgblora", {}, marks=SLOW),
    ],
)
def test_other_links_learn_tasks_too(name: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model, training = model_of(base), replace(TRAINING, steps=2, save_every=None)
    run_tasks(model, recipe(name, options), of_images(), training, tmp_path / "out", export_moments=False)
    widths = {factors(site)[0].shape[0] for site in sites(model)}
    assert widths == ({3 + 3 + 2} if options else {9}) if name != "xgblora" else max(widths) <= 9


def test_evidence_at_a_switch_is_drawn_from_the_task_that_begins(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA-GA's gradients, estimated again at each link, before the first of its steps."""
    seen: list[set[int]] = []
    attach = driver.attach

    def spy(trainer: Any, made: Recipe, *, rows: Any, **kwargs: Any) -> Any:
        def drawn(episode: Any) -> Any:
            for batch in rows(episode):
                seen.append(set(batch["labels"].tolist()))
                yield batch

        return attach(trainer, made, rows=drawn, **kwargs)

    monkeypatch.setattr(driver, "attach", spy)
    model, training = model_of(base), replace(TRAINING, steps=2, save_every=None)
    made = recipe("lora-ga + chain-of-lora", {"micro_batches": 2})
    run_tasks(model, made, of_images(), training, tmp_path / "out", export_moments=False)
    assert seen == [{0, 1}] * 2 + [{2, 3}] * 2 + [{4, 5}] * 2  # three are wanted, two are there
    assert {factors(site)[0].shape[0] for site in sites(model)} == {18}


def test_decisions_are_among_the_classes_seen_whatever_their_order(base: Path, tmp_path: Path) -> None:
    """Classes 4, 5, then 2, 3, of a head of six; the accuracies of the last moment counted by hand."""
    model, tasks = model_of(base), of_images()[:0:-1]
    found = run_tasks(model, recipe("lora"), tasks, replace(TRAINING, save_every=None), tmp_path, export_moments=False)
    for task, accuracy in zip(tasks, found.matrix[-1], strict=True):
        with torch.no_grad():
            logits = model(pixel_values=torch.stack([r["pixel_values"] for r in task.test])).logits
        chosen = 2 + logits[:, 2:].argmax(dim=1)
        right = (chosen == torch.tensor([r["labels"] for r in task.test])).float().mean()
        assert float(right) == pytest.approx(accuracy, abs=1e-6)
    assert sum(found.matrix[-1]) > 0.5 and task.classes == (2, 3)


def test_every_task_has_the_whole_course_of_the_schedule_and_a_link_without_a_warm_up_of_its_own() -> None:
    trainer: Any = TasksTrainer.__new__(TasksTrainer)
    trainer.lr_scheduler, trainer.lengths, trainer.ends, trainer.course = None, [3, 5], [3, 8], ("cosine", 0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    course, found = trainer.create_scheduler(8, optimizer), []
    for _ in range(8):
        found.append(course.get_last_lr()[0])
        optimizer.step()
        course.step()
    want = []
    for steps in (3, 5):
        one = get_scheduler("cosine", optimizer, math.ceil(0.3 * steps), steps).lr_lambdas[0]
        want += [one(step) for step in range(steps)]
    assert found == pytest.approx(want) and found[0] == found[3] == 0.0
    links = by_task(recipe("chain-of-lora", {"links": 2, "restart": True}), (300, 500)).outer
    second = links.episode(1, 800, ["layers.0.q"], draw_for(0))
    assert second is not None and (second.steps, second.warm_up_steps, second.restart) == (500, 0, False)


def test_the_head_starts_from_the_seed_at_its_own_rate(base: Path, tmp_path: Path) -> None:
    model, training = model_of(base), replace(TRAINING, steps=2, save_every=None, head_lr=1e-12)
    before = model.classifier.weight.detach().clone()
    run_tasks(model, recipe("lora"), of_images()[:1], training, tmp_path / "out", export_moments=False)
    drawn_head = torch.nn.Linear(before.shape[1], before.shape[0])
    draw_head([drawn_head], recipe().seed)
    (after,) = [p.detach() for n, p in model.named_parameters() if "modules_to_save" in n and n.endswith("weight")]
    torch.testing.assert_close(after, drawn_head.weight.detach(), atol=1e-9, rtol=0)
    assert (after - before).norm() > 0.1


def test_micro_batches_add_up(base: Path, tmp_path: Path) -> None:
    found = []
    for micro in (8, 4):
        model, training = model_of(base), replace(TRAINING, steps=3, save_every=None, micro_batch_size=micro)
        run_tasks(model, recipe(), of_images()[:1], training, tmp_path / str(micro), export_moments=False)
        found.append([B @ A for A, B in map(factors, sites(model))])
    for one, other in zip(*found, strict=True):
        assert one.any() and float((one - other).norm()) < 1e-3 * float(one.norm())


def test_too_few_links_are_refused_before_anything_is_spent(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoralignError, match="has 2 links and there are 3 tasks: raise `links` or `tasks`"):
        run_tasks(model_of(base), recipe("chain-of-lora", {"links": 2}), of_images(), TRAINING, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the command

FILE = {
    "model": "base",
    "method": "sd-lora",
    "rank": 2,
    "targets": ["query", "value"],
    "data": {"train": "rows.jsonl", "test": 0.25},
    "split": [2, 1],
    "train": {"learning_rate": 5e-3, "steps": 2, "batch_size": 4, "mask": "seen"},
    "output": "out",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    bert().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    words = {"b": "red green", "a": "one two", "c": "up down"}
    rows = [{"text": f"{words[c]} {i}", "label": c} for i in range(8) for c in words]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "tasks.yaml").write_text(json.dumps(FILE), encoding="utf-8")
    return root


def test_the_command_trains_says_and_verifies(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli_world import run

    monkeypatch.chdir(world)
    warm.verification(monkeypatch)
    done = run("tasks", "tasks.yaml")
    assert done.code == 0, done.err
    for said in ("after task 1: ", "forgetting: ", "Verified: after-1, after-2 in out"):
        assert said in done.out
    kept = json.loads((world / "out" / "results.json").read_text())
    assert done.err.count("rows of at most 64 tokens") == 1 and kept["data"] == {"tokens per row at most": 64}
    assert kept["tasks"] == {"a, b": [0, 1], "c": [2]} and kept["labels"] == ["a", "b", "c"]
    assert "c = " not in (world / "out" / "after-1" / "README.md").read_text()
    card = (world / "out" / "after-1" / "README.md").read_text()
    assert "| rank | 2 |" in card and "| learning rate chosen by | given |" in card
    assert "tokens per row at most" in card and "1 = b" in card and "Verified" in card and "Not verified" not in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(world / "out" / "after-1"))
    used: dict[str, Any] = {}
    exec(code, used)  # the base has a head of another number of labels, this one says three
    assert used["model"].get_base_model().classifier.modules_to_save["default"].out_features == 3
    again = run("tasks", "tasks.yaml", "--resume")
    assert again.code == 0 and again.out.splitlines()[1:4] == done.out.splitlines()[1:4]
    other = run("tasks", "tasks.yaml", "--resume", "--set", "seed=1")
    assert other.code == 2 and "cannot resume out" in other.err
    for setting, said in (
        ("split=[2, 2]", "the rows 3: a, b, c"),
        ("split=[[a], [d]]", "names 'd', a label of no row"),
        ("data.label=topic", "has no 'topic'"),
        ("train.mask=task", "the loss of task c sees one class alone"),
        ("data.max_length=65", "more than the 64 positions of 'base': lower `data.max_length`"),
    ):
        assert said in run("tasks", "tasks.yaml", "--set", setting, "--set", "output=x").err
    cut = run("tasks", "tasks.yaml", *("--set", "data.max_length=2", "--set", "train.mask=task", "--set", "output=x"))
    assert "12 of 12 rows are longer than `data.max_length` 2 and were cut" in cut.err
    assert not (world / "x").exists()


def test_a_base_with_another_head_is_taken_and_one_without_its_pooler_is_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli_world import run

    monkeypatch.chdir(world)
    warm.verification(monkeypatch)
    config = bert().config
    config.num_labels = 7
    for name, model in (
        ("seven", BertForSequenceClassification(config)),
        ("headless", BertModel(config, add_pooling_layer=False)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    asked = ["tasks", "tasks.yaml", "--set", f"output={tmp_path / 'out'}", "--set"]
    done = run(*asked, f"model={tmp_path / 'seven'}")
    assert done.code == 0 and "Verified: after-1, after-2" in done.out, done.err
    shutil.rmtree(tmp_path / "out")
    done = run(*asked, f"model={tmp_path / 'headless'}")
    assert done.code == 2 and "its files lack bert.pooler.dense.bias" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": None}, "say either `split`"),
        ({"tasks": [{"name": "a", "train": "x"}]}, "say either `split`"),
        ({"data": {"test": 0.2}}, "name them"),
        ({"split": None, "tasks": [{"name": "a", "train": "x"}] * 2, "data": {}}, "two tasks are called 'a'"),
        ({"split": [2, ["a"]]}, "labels or numbers of labels"),
        ({"train": {"steps": 2, "epochs": 1}}, "keep one"),
        ({"train": {"batch_size": 4, "micro_batch_size": 3}}, "no multiple"),
        ({"method": "full", "rank": None, "targets": ["query"]}, "no adapter to keep"),
        ({"methud": "lora"}, "did you mean `method`"),
        ({"options": {"tasks": 0}}, "options.tasks"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(change: dict[str, Any], said: str) -> None:
    content = {k: v for k, v in {**FILE, **change}.items() if v is not None}
    with pytest.raises(LoralignError, match=said) as caught:
        parse_tasks(content)
    assert len(str(caught.value)) < 300


def test_files_become_runs() -> None:
    job = to_tasks(parse_tasks(FILE), 32)
    assert job.split == (2, 1) and job.recipe.form.shared()["alpha"].numel() == 2 and job.training.steps == 2
    files = [{"name": "a", "train": "x", "test": "y"}, {"name": "b", "train": "z"}]
    content = {**FILE, "data": {"test": 0.1}, "tasks": files, "method": "chain-of-lora", "preset": "paper"}
    job = to_tasks(parse_tasks({k: v for k, v in content.items() if k != "split"}), 32)
    assert [f.test for f in job.files] == ["y", 0.1] and job.recipe.outer.links == 2  # type: ignore[attr-defined]
    prior = to_tasks(parse_tasks({**FILE, "train": {"steps": 1}}), 2000)
    assert prior.training.lr_source.startswith("prior of sd-lora") and prior.training.learning_rate == pytest.approx(
        1e-3
    )


def test_the_published_schema_and_the_example_are_the_present_ones() -> None:
    assert (ROOT / "docs" / "schema-tasks.json").read_text(encoding="utf-8") == schema_text()
    file = load_tasks(ROOT / "examples" / "tasks.yaml")
    assert file.count == 3 and file.method == "sd-lora"
