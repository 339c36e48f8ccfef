"""Trials of the resident process on tiny models, and the command as people run it, killed and taken up again."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pyarrow import Table, parquet  # type: ignore[import-untyped]
from torch._dynamo.utils import counters
from transformers import BertForSequenceClassification, BertModel

import warm
from loralign.carrier.sites import put_in, sites, target_weights
from loralign.cli.compare import run_workers
from loralign.compare import runner as running
from loralign.compare.compiled import blocks, compiled
from loralign.compare.journal import outcome_of
from loralign.compare.runner import Resident
from loralign.compare.spec import Outcome, Trial
from loralign.compare.store import Store
from loralign.compare.study import work
from loralign.compare.tasks import Rows, common_width, rows_with
from loralign.types import Full, LoralignError, Recipe, WorkFailed
from tiny_study import SMALL, load, write_study
from tiny_trl import tokenizer
from toy import bert

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the same to the last bit: claimed on a CPU")


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds=(), init_s=0.0, step_s=0.0, total_s=0.0, between_s=0.0)


def never(step: int, loss: float) -> bool:
    return False


def trial(arm: str, lr: float = 1e-3, seed: int = 0, phase: str = "seed") -> Trial:
    return Trial(phase, arm, 0, lr, seed)  # type: ignore[arg-type]


@on_a_cpu
@pytest.mark.parametrize("kind", ["text", "sft", "classify"])
def test_an_outcome_does_not_depend_on_what_ran_before(tmp_path: Path, kind: str) -> None:
    resident = Resident(load(write_study(tmp_path, kind)))
    first = {arm: resident.run(trial(arm), never) for arm in ("full", "lora", "lora-ga")}
    again = {arm: resident.run(trial(arm), never) for arm in ("lora-ga", "lora", "full")}
    alone = Resident(load(tmp_path / "study.yaml")).run(trial("lora-ga"), never)
    assert all(timeless(first[arm]) == timeless(again[arm]) for arm in first)
    assert timeless(alone) == timeless(first["lora-ga"])
    assert len({outcome.losses[-1] for outcome in first.values()}) == 3


@on_a_cpu
def test_what_a_base_lacks_is_drawn_alike_by_every_worker(tmp_path: Path) -> None:
    """An encoder without pooler, and one whose head knew seven labels; another shape elsewhere is refused."""
    study = load(write_study(tmp_path, "classify"))
    config = bert().config
    config.num_labels, found = 7, []
    for k, base in enumerate((BertModel(config, add_pooling_layer=False), BertForSequenceClassification(config))):
        base.save_pretrained(tmp_path / f"base-{k}")
        tokenizer().save_pretrained(tmp_path / f"base-{k}")
        spec = replace(study, model=str(tmp_path / f"base-{k}"))
        for other in (1, 2):
            torch.manual_seed(other)
            found.append(timeless(Resident(spec).run(trial("full"), never)))
    assert found[0] == found[1] != found[2] == found[3]
    written = tmp_path / "base-1" / "config.json"
    written.write_text(written.read_text(encoding="utf-8").replace('"type_vocab_size": 2', '"type_vocab_size": 3'))
    with pytest.raises(LoralignError, match=r"token_type_embeddings\.weight has another shape than config"):
        Resident(spec)


@pytest.mark.parametrize("kind", ["text", "classify"])
def test_full_trains_the_matrices_that_lora_adapts_and_the_same_head(tmp_path: Path, kind: str) -> None:
    spec = load(write_study(tmp_path, kind))
    resident = Resident(spec)
    full, lora = (next(a.recipe for a in spec.arms if a.name == name) for name in ("full", "lora"))
    assert isinstance(full, Full) and isinstance(lora, Recipe)
    head = resident.task.head_parameters()
    weights = target_weights(resident.task.model, full)
    matrices = {n for n, w in weights.items() if all(w is not p for p in head)}
    trained = sum(weights[n].numel() for n in matrices) + sum(p.numel() for p in head)
    assert resident.run(trial("full"), never).trainable == trained
    outcome = resident.run(trial("lora"), never)
    adapted = {s.name: s for s in sites(put_in(resident.task.model, lora))}
    assert set(adapted) == matrices
    factors = sum(s.r * (s.d_in + s.d_out) for s in adapted.values())
    assert outcome.trainable == factors + sum(p.numel() for p in head)


def test_a_head_starts_and_learns_alike_in_every_arm(tmp_path: Path) -> None:
    resident = Resident(load(write_study(tmp_path, "classify")))
    starts = []
    for seed in (0, 0, 1):
        resident._reset(seed)
        starts.append([p.detach().clone() for p in resident.task.head_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not torch.equal(starts[0][0], starts[2][0])
    frozen = {arm: resident.run(trial(arm, lr=1e-12), never).losses for arm in ("full", "lora")}
    assert frozen["full"] == pytest.approx(frozen["lora"], rel=1e-5)  # only the head learns, at its own rate


def test_evidence_is_counted(tmp_path: Path) -> None:
    resident = Resident(load(write_study(tmp_path)))
    plain, informed = (resident.run(trial(arm), never) for arm in ("lora", "lora-ga"))
    assert plain.init_tokens == 0 and informed.init_tokens > 0
    assert plain.step_tokens == informed.step_tokens == 8 * 16
    assert informed.init_tokens % 16 == 0  # whole rows of 16 tokens
    assert 0 < informed.init_s < informed.seconds[0] < informed.seconds[1] < informed.total_s
    assert (plain.rank, informed.rank) == (4, 8)
    assert (plain.device == "cpu") == (not torch.cuda.is_available())


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_a_start_that_reads_trains_fewer_steps(tmp_path: Path, kind: str) -> None:
    """In one unit on packed and on padded rows: tokens without padding, of the start and of a mean step alike."""
    train = {**SMALL, "steps": 12, "eval_every": 4, "charge": "steps"}
    spec = load(write_study(tmp_path, kind, train=train), "task.length=24")
    resident = Resident(spec)
    rows = resident.task.train
    assert (len({len(row["input_ids"]) for row in rows}) > 1) == (kind == "sft")
    step_tokens = 8 * sum(len(row["input_ids"]) for row in rows) / len(rows)
    plain, informed = (resident.run(trial(arm), never) for arm in ("lora", "lora-ga"))
    assert plain.steps == (4, 8, 12) and plain.step_tokens == informed.step_tokens == step_tokens
    paid = math.ceil(informed.init_tokens / step_tokens)
    assert 0 < paid < 12 and informed.steps[-1] == 12 - paid and len(informed.losses) == len(informed.steps)
    clock = (0.0, informed.init_s, *informed.seconds, informed.total_s)
    assert all(a < b for a, b in pairwise(clock)) and informed.step_s > 0  # the last step is no multiple of eval_every
    resident.spec = replace(spec, charge="none")
    assert resident.run(trial("lora-ga"), never).steps == (4, 8, 12)
    resident.spec = replace(spec, steps=paid)
    with pytest.raises(LoralignError, match=r"arm 'lora-ga' at 0.001: its start and rules read as many .* steps"):
        resident.run(trial("lora-ga"), never)


ROWS: dict[str, tuple[str, bytes, str]] = {
    "no column": ("text", b'{"txt": "a"}', "row 1 of train.jsonl has no 'text' (it has txt): add the column"),
    "a number": ("text", b'{"text": 5}', "`text` in row 1 of train.jsonl is no text but int"),
    "no JSON": ("text", b'{"text": ', "train.jsonl, line 1 is not JSON"),
    "no UTF-8": ("text", b'{"text": "caf\xe9"}', "train.jsonl is not UTF-8 text"),
    "too short": ("text", b'{"text": "w1 w2"}', "train.jsonl holds less than one block of 16 tokens: lower `length`"),
    "too few": ("sft", b'{"prompt": "w1", "completion": " w2"}', "`task.train` makes 1 rows, less than one step of 8"),
    "too few blocks": ("text", b'{"text": "%s"}' % (b"w1 " * 40), "makes 2 blocks of 16 tokens, less than one step"),
    "no label": ("classify", b'{"text": "w1"}', "row 1 of train.jsonl has no 'label'"),
    "other labels": ("classify", b'{"text": "w1", "label": "x"}', "label 'label 0' occurs in validation or test rows"),
}


@pytest.mark.parametrize("mistake", ROWS)
def test_rows_that_cannot_be_learnt_are_one_sentence(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, line, said = ROWS[mistake]
    file = write_study(tmp_path, kind)
    (tmp_path / "train.jsonl").write_bytes(line + b"\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoralignError, match=re.escape(said)):
        Resident(load(file, *(f"task.{split}={split}.jsonl" for split in ("train", "valid", "test"))))


def test_columns_of_a_typed_file_are_read_by_the_names_that_the_study_gives(tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    parquet.write_table(Table.from_pydict({"sentence": ["w1"], "label": ["x"], "odd": [1]}), file)
    assert rows_with(file, ["text", "label"], {"text": "sentence"}) == [{"text": "w1", "label": "x"}]
    with pytest.raises(LoralignError, match="no column 'body', which `columns` names for `text`; they are sentence, "):
        rows_with(file, ["text"], {"text": "body"})
    with pytest.raises(LoralignError, match=r"has no 'text' \(it has label\): add the column, or say .*`task.columns`"):
        rows_with(file, ["text", "label"])


def test_a_classifier_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    file = write_study(tmp_path, "classify")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(LoralignError, match=r"it has no tokenizer; copy tokenizer\.json"):
        Resident(load(file))


def test_what_is_chosen_sees_validation_rows_and_what_is_reported_test_rows(tmp_path: Path) -> None:
    resident = Resident(load(write_study(tmp_path)))
    seen = {phase: resident.run(trial("lora", phase=phase), never).losses for phase in ("rate", "seed")}
    assert seen["rate"] != seen["seed"]
    resident.task.valid = resident.task.test
    assert resident.run(trial("lora", phase="rate"), never).losses == seen["seed"]  # else the trial is the same
    resident.task.test = resident.task.test[:1]
    assert resident.run(trial("lora"), never).losses != seen["seed"]


def test_the_order_of_the_data_follows_the_seed_in_every_arm_alike(tmp_path: Path) -> None:
    resident = Resident(load(write_study(tmp_path)))
    kept = resident.task.collate
    orders: dict[tuple[str, int], list[int]] = {}
    for arm, seed in (("lora", 0), ("lora", 1), ("full", 0), ("full", 1)):
        order = orders.setdefault((arm, seed), [])
        train = {id(row): i for i, row in enumerate(resident.task.train)}

        def collate(rows: Rows, order: list[int] = order, train: dict[int, int] = train) -> dict[str, torch.Tensor]:
            order += [train[id(row)] for row in rows if id(row) in train]
            return kept(rows)

        resident.task.collate = collate
        resident.run(trial(arm, seed=seed), never)
    assert orders["lora", 0] == orders["full", 0] and orders["lora", 1] == orders["full", 1]
    assert orders["lora", 0] != orders["lora", 1]


def test_running_away_is_an_outcome(tmp_path: Path) -> None:
    resident = Resident(load(write_study(tmp_path)))
    for arm in ("full", "lora"):
        outcome = resident.run(trial(arm, lr=1e30), never)
        assert outcome.diverged and outcome.note
    assert not resident.run(trial("lora"), never).diverged  # the next trial is sound


def test_what_became_of_the_slots_is_noted(tmp_path: Path) -> None:
    arm = {"method": "adalora", "options": {"first": 0.0}}
    resident = Resident(load(write_study(tmp_path, arms=[arm])))
    plain, ruled = resident.run(trial("lora"), never), resident.run(trial("adalora"), never)
    assert plain.note == "" and plain.begun_slots is None and resident.run(trial("full"), never).ranks is None
    assert re.fullmatch(r"budget 84 → 56 slots: \d+ of 14 modules alive", ruled.note)
    assert plain.ranks and ruled.ranks and list(plain.ranks) == list(ruled.ranks)
    assert set(plain.ranks.values()) == {4} and len(set(ruled.ranks.values())) > 1
    assert (ruled.begun_slots, sum(ruled.ranks.values())) == (84, 56)
    assert outcome_of(json.dumps(asdict(ruled))) == ruled  # as the journal gives it back


def test_any_other_failure_is_an_error_that_names_the_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(*args: object, **kwargs: object) -> None:
        raise WorkFailed("it did not act")

    resident = Resident(load(write_study(tmp_path)))
    monkeypatch.setattr("loralign.optim.pairs.transformed", idle)
    with pytest.raises(WorkFailed, match=r"arm 'lora' at 0.001: it did not act"):
        resident.run(trial("lora"), never)


def test_a_start_that_fails_is_an_error_in_the_search_and_an_outcome_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise WorkFailed("the preheat diverged")

    resident = Resident(load(write_study(tmp_path)))
    monkeypatch.setattr("loralign.compare.runner.attach", broken)
    with pytest.raises(WorkFailed, match=r"arm 'lora' at 0.001: the preheat diverged"):
        resident.run(trial("lora", phase="rate"), never)
    outcome = resident.run(trial("lora"), never)
    assert outcome.diverged and outcome.note == "the preheat diverged"


def test_an_arm_that_does_not_fit_is_refused_before_the_first_trial(tmp_path: Path) -> None:
    """Also the last arm's, and although a study may have run others for hours by then."""
    said = r"arm 'pissa': rank 17 is too large for pissa at model\.layers\.0\.self_attn\.k_proj \(16 × 32\)"
    file = write_study(tmp_path, arms=["lora-ga", {"method": "pissa", "rank": 17}])
    with pytest.raises(LoralignError, match=said):
        Resident(load(file))
    refused = compare(file)
    assert refused.returncode == 2 and re.fullmatch(f"loralign: {said}.*\n", refused.stderr), refused.stderr
    assert not Store(load(file)).outcomes()


def test_a_rule_that_judges_has_rows_of_its_own_which_are_charged(tmp_path: Path) -> None:
    options = {"rows": 4, "rounds": 1, "scored": 2}
    arms = [{"method": "allocating-lora", "options": options}]
    train = {**SMALL, "steps": 8, "eval_every": 4, "charge": "steps"}
    resident = Resident(load(write_study(tmp_path, arms=arms, train=train)))
    outcome = resident.run(trial("allocating-lora"), never)
    assert outcome.init_tokens == 2 * 2 * 4 * 16 // 2 and outcome.steps == (4, 7)  # 4 forwards of 4 rows: one step
    plain = resident.run(trial("lora"), never)
    assert plain.steps == (4, 8) and plain.losses[0] != outcome.losses[0]  # these rows are not trained on


def test_an_arm_whose_cost_leaves_no_step_is_refused_before_the_first_trial(tmp_path: Path) -> None:
    arms = [{"method": "allocating-lora", "options": {"rows": 32, "rounds": 2, "scored": 8}}]
    file = write_study(tmp_path, arms=arms, train={**SMALL, "charge": "steps", "steps": 8})
    with pytest.raises(LoralignError, match=r"arm 'allocating-lora': its start .* as many tokens as 64 steps"):
        Resident(load(file))


def test_an_arm_that_would_not_act_is_told_before_the_first_trial_and_once(tmp_path: Path) -> None:
    said = "delta-lora: its rule acts after step 4 and the run has 4 steps, so it is trained as if without it: "
    file = write_study(tmp_path, arms=[{"method": "delta-lora", "options": {"wait_steps": 3}}], references=False)
    done = compare(file, "--set", "budget.trials=2")
    assert done.returncode == 0 and done.stderr.startswith(said) and done.stderr.count(said) == 1, done.stderr


@pytest.mark.parametrize(
    ("longest", "most", "device", "width"),
    [(1, 10, "cuda", 3), (4, 10, "cuda", 6), (10, 10, "cuda", 10), (9, 8, "cuda", 9), (5, 10, "cpu", 5)],
)
def test_a_batch_is_padded_to_a_quarter_of_the_longest_row_at_most(
    longest: int, most: int, device: str, width: int
) -> None:
    assert common_width(longest, most, device) == width


def test_whether_a_rule_acts_is_told_of_the_steps_that_a_start_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 8 steps hrp-sketch reads 2: a rule that acts after the sixth never does."""
    options = [{"micro_batches": 2, "wait_steps": wait} for wait in (4, 5)]
    arms = [{"name": str(o), "method": "hrp-sketch + delta-lora", "options": o} for o in options]
    Resident(load(write_study(tmp_path, arms=arms, train={**SMALL, "charge": "steps", "steps": 8})))
    told = [record.message for record in caplog.records if "as if without it" in record.message]
    assert len(told) == 1 and "acts after step 6 and the run has 6 steps" in told[0]


def test_the_clock_stands_while_rows_are_evaluated(tmp_path: Path) -> None:
    def slow(step: int, loss: float) -> bool:
        time.sleep(1.0)
        return False

    outcome = Resident(load(write_study(tmp_path))).run(trial("lora"), slow)
    assert outcome.seconds[-1] < 1.0 and outcome.step_s < 0.5 and outcome.total_s > 2.0


def test_given_up_half_way(tmp_path: Path) -> None:
    outcome = Resident(load(write_study(tmp_path))).run(trial("lora"), lambda step, loss: step >= 2)
    assert outcome.pruned and outcome.steps == (2,)


# torch 2.13's dynamo instantiates the autograd functions that it traces, and looks at every tensor's grad
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@on_a_cpu
def test_a_known_kind_of_block_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo, run by the eager backend. A kind is traced for the first block, the others and what is held
    out; then not for another seed, rate or arm of that kind, nor past evaluations and the ends of epochs, whose last
    batches have fewer rows."""
    arms = [{"method": "spectral", "rank": 4, "alpha": 16}]
    train = {**SMALL, "steps": 12, "eval_every": 6}
    resident = Resident(load(write_study(tmp_path, arms=arms, train=train)))
    assert len(resident.task.train) % 8 and len(resident.task.train) < 12 * 8 and len(resident.task.test) % 8
    ran = [trial("lora"), trial("lora", lr=2e-3, seed=1), trial("spectral"), trial("lora")]
    ran += [trial("full"), trial("full", lr=2e-3, seed=1)]
    plain = [resident.run(one, never) for one in ran]
    torch._dynamo.reset()
    monkeypatch.setattr(running, "compiled", partial(compiled, backend="eager"))
    resident.compile, traced, outcomes = True, [], []
    for one in ran:
        before = counters["stats"]["unique_graphs"]
        outcomes.append(resident.run(one, never))
        traced.append(counters["stats"]["unique_graphs"] - before)
    assert traced == [3, 0, 0, 0, 3, 0]
    for outcome, other in zip(outcomes, plain, strict=True):
        assert outcome.losses == pytest.approx(other.losses, rel=1e-6)
        assert outcome.step_s > 0 and outcome.seconds[-1] < outcome.total_s
    assert timeless(outcomes[0]) == timeless(outcomes[3])
    assert all(block._compiled_call_impl is None for block in blocks(resident.task.model))


# ------------------------------------------------------------------------------------------------------- the command


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "loralign", "compare", str(file), *words]


ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def compare(file: Path, *words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return warm.run(command(file, *words), env=ENV, **kwargs)


def test_a_study_from_start_to_table_and_a_later_arm(tmp_path: Path) -> None:
    file = write_study(tmp_path, "classify")
    done = compare(file)
    assert done.returncode == 0 and done.stderr == ""
    assert "[1/" in done.stdout and "lora-ga: " in done.stdout and "accuracy" in done.stdout
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "report.html",
        "results.json",
        "results.csv",
        "results.md",
        "rates.png",
        "steps.png",
        "seconds.png",
        "study.journal",
    } <= made
    before = json.loads((tmp_path / "out" / "results.json").read_text())["trials"]
    again = compare(file, "--set", "arms=[lora-ga, pissa]", "--set", "seeds=3")
    assert again.returncode == 0, again.stderr
    after = json.loads((tmp_path / "out" / "results.json").read_text())["trials"]
    assert {key: after[key] for key in before} == before  # nothing ran twice
    assert sum("/pissa/" in key for key in after) >= 3 + 3
    refused = compare(file, "--set", "rank=2")
    assert refused.returncode == 2 and "arm 'lora' was started with `rank` 4, now it has 2" in refused.stderr


def test_only_a_report_of_what_is_finished(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    part = compare(file, "--set", "budget.trials=2")
    assert part.returncode == 0 and "the budget is spent with 2 of 9 trials done" in part.stderr
    said = compare(file, "--report")
    assert said.returncode == 0
    assert "the search for learning rates is unfinished, 2 of 9 trials are done: nothing is compared yet" in said.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the best so far is ringed" in page and "3 rates per arm" in page and "All arms" not in page


@pytest.mark.distributed
def test_workers_that_fail_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes, which do not get as far as their libraries."""
    file = write_study(tmp_path)
    for planted in ("loralign.py", "typing.py"):  # a worker must not import from the folder that it runs in
        (tmp_path / planted).write_text("raise SystemExit('planted')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    said = "2 of 2 workers failed, what they finished is kept; the first said: study.yaml: `rank` must be a whole"
    with pytest.raises(LoralignError, match=said):
        run_workers(file, ["rank=x"], 2, [load(file)])


def test_a_worker_says_what_it_cannot_do(tmp_path: Path) -> None:
    refused = compare(write_study(tmp_path, arms=[{"method": "lora-ga", "rank": 32}]), "--worker")
    assert refused.returncode == 2 and refused.stderr.startswith("loralign: arm 'lora-ga': rank 32 is too large")


@pytest.mark.parametrize("finished", [0, 1])
def test_minutes_end_a_trial_in_the_middle(tmp_path: Path, finished: int) -> None:
    spec = load(write_study(tmp_path))
    limited = replace(spec, budget=replace(spec.budget, minutes=0.001))
    begun: list[str] = []

    def slow(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        begun.append(trial.key)
        time.sleep(0.1)
        report(2, 1.0)
        return Outcome((2,), (0.1,), (1.0,))

    if finished:
        work(replace(spec, budget=replace(spec.budget, trials=finished)), lambda t, r: Outcome((2,), (0.1,), (1.0,)))
    assert not work(limited, slow)
    assert len(begun) == 1 and len(Store(spec).outcomes()) == finished
    assert Store(spec).running() == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    file = write_study(tmp_path, train={**SMALL, "steps": 4000})
    running = subprocess.Popen(command(file, "--workers", "2"), env=ENV, stderr=subprocess.PIPE, text=True)
    spec, end = load(file), time.monotonic() + 120
    while time.monotonic() < end and len(Store(spec).running()) < 2:
        time.sleep(0.2)
    workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    running.send_signal(number)
    error = running.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive and Store(spec).running() == {}
    said = "loralign: stopped by SIGTERM; the same command goes on where it was\n" if number == signal.SIGTERM else ""
    assert (running.returncode, error) == ((143, said) if said else (-number, said))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_leaves_no_claim_behind(tmp_path: Path, workers: str) -> None:
    file = write_study(tmp_path, train={**SMALL, "steps": 4000})
    running = subprocess.Popen(
        command(file, "--workers", workers), env=ENV, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    spec, end = load(file), time.monotonic() + 120
    while time.monotonic() < end and not Store(spec).running():
        time.sleep(0.2)
    time.sleep(1.0)
    os.killpg(running.pid, signal.SIGINT)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and error == "loralign: stopped; the same command goes on where it was\n"
    assert Store(spec).running() == {} and not Store(spec).outcomes()
