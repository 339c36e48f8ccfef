"""The journal that workers share: what a study is bound to, claims, workers that die, damaged files, budgets."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from html import escape
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileOpenLock
from rich.console import Console

from loralign import LoralignError, build
from loralign.compare import store as storing
from loralign.compare.identity import arm_settings, content_of, shared_rows
from loralign.compare.live import board, headline, watched
from loralign.compare.report import collect, repeatable, report, timing
from loralign.compare.schedule import rate_trials, seed_trials, wanted
from loralign.compare.spec import Arm, Budget, Outcome, Spec, TaskSpec, Trial
from loralign.compare.store import Store
from loralign.compare.study import chosen, no_room, work
from loralign.compare.tables import terminal_tables
from loralign.io.content import file_print, model_print
from loralign.io.described import first_difference
from loralign.types import Recipe

TASK = TaskSpec("text", "a.jsonl", "b.jsonl", "c.jsonl")


def arm(name: str, **fields: Any) -> Arm:
    return Arm(name, build(fields.pop("method", name), **fields), lr=1e-3)


def spec(folder: Path, *arms: Arm, **changes: Any) -> Spec:
    small = {"steps": 4, "eval_every": 2, "rates": 3, "seeds": 2, "baseline_seeds": 2}
    small |= {"extensions": 0, "choice_seeds": 1, **changes}
    return Spec("toy", TASK, arms or (arm("lora"), arm("pissa")), folder, **small)


def ended(loss: float = 1.0, **changes: Any) -> Outcome:
    return Outcome((2, 4), (0.1, 0.2), (loss + 1, loss), **{"total_s": 36.0, **changes})


def bowl(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
    return ended(1 + 0.1 * trial.index**2 + 0.001 * trial.seed)


FIRST = Trial("rate", "lora", 0, 1e-3, 1000)


# -------------------------------------------------------------------------------------------- what a study is bound to


@pytest.mark.parametrize("knows", ["lora", "pissa"])
def test_a_worker_keeps_to_what_it_compiled_within_a_round_of_seeds(tmp_path: Path, knows: str) -> None:
    """Stopped at any moment, no arm is more than one seed ahead of what it is compared with."""
    ran: list[Trial] = []

    def noted(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        ran.append(trial)
        return bowl(trial, report)

    study = spec(tmp_path, arm("lora"), arm("pissa"), arm("olora"), compile=True, seeds=3, baseline_seeds=3)
    assert work(study, noted)
    seeds = [t.seed for t in ran if t.phase == "seed"]
    assert seeds == sorted(seeds) and len(seeds) == 9
    free = [t for t in ran if t.phase == "seed"]
    assert chosen(free, {knows}) == Trial("seed", knows, *asked(free, knows))
    assert chosen([t for t in free if t.arm != knows or t.seed], {knows}).seed == 0
    rates = [t for t in ran if t.phase == "rate"]
    assert chosen(rates, {"olora"}).arm == "olora"


def asked(trials: list[Trial], name: str) -> tuple[int, float, int]:
    """What an arm's first seed runs at."""
    (first,) = (t for t in trials if t.arm == name and t.seed == 0)
    return first.index, first.lr, 0


def test_an_arm_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(spec(tmp_path))
    claimed = store.claim(FIRST)
    assert claimed is not None
    claimed.finish(ended())
    for changed, said in (
        (arm("lora", r=8), "`rank` the default, now it has 8"),
        (arm("lora", method="rslora"), "`scale` the default, now it has over_sqrt_rank"),
        (arm("lora", max_grad_norm=0.5), "`max_grad_norm` the default, now it has 0.5"),
        (arm("lora", exclude=("q_proj",)), "`exclude.0` the default, now it has q_proj"),
        (replace(arm("lora"), lr=2e-3), "`lr` 0.001, now it has 0.002"),
        (replace(arm("lora"), given={"options": {"betas": [0.9, 0.99]}}), "`options` the default"),
    ):
        with pytest.raises(LoralignError, match=f"^arm 'lora' was started with {said}"):
            Store(spec(tmp_path, changed, arm("pissa")))
    Store(spec(tmp_path))


def test_an_arm_without_a_trial_may_still_change(tmp_path: Path) -> None:
    Store(spec(tmp_path))
    mended = arm("pissa", r=8)
    Store(spec(tmp_path, arm("lora"), mended))
    claimed = Store(spec(tmp_path, arm("lora"), mended)).claim(replace(FIRST, arm="pissa"))
    assert claimed is not None
    with pytest.raises(LoralignError, match=r"^arm 'pissa' was started with `rank` 8, now it has the default"):
        Store(spec(tmp_path))
    claimed.drop()  # a trial without an outcome binds nothing
    Store(spec(tmp_path))


def test_an_arm_that_another_worker_changed_meanwhile_is_not_claimed(tmp_path: Path) -> None:
    """Nothing of it had begun, so the other one could: its trials have the same names."""
    first = Store(spec(tmp_path))
    other = Store(spec(tmp_path, arm("lora"), arm("pissa", r=8)))
    with pytest.raises(LoralignError, match=r"^arm 'pissa' was started with `rank` 8, now it has the default"):
        first.claim(replace(FIRST, arm="pissa"))
    assert first.claim(FIRST) is not None  # an arm that stayed as it was
    assert set(other.running()) == {FIRST.key} and other.claim(replace(FIRST, arm="pissa")) is not None


@pytest.mark.parametrize("key", ["settings", "arm pissa"])
def test_what_a_trial_begins_with_at_the_same_moment_stays(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, write, trial = Store(spec(tmp_path)), JournalStorage.set_study_user_attr, replace(FIRST, arm="pissa")

    def later(journal: Any, study: int, name: str, value: Any) -> None:
        if name == key and not first.running():
            assert first.claim(trial) is not None
        write(journal, study, name, value)

    monkeypatch.setattr(JournalStorage, "set_study_user_attr", later)
    other = spec(tmp_path, steps=8) if key == "settings" else spec(tmp_path, arm("lora"), arm("pissa", r=8))
    with pytest.raises(LoralignError, match="was started with"):
        Store(other)
    assert set(Store(spec(tmp_path)).running()) == {trial.key}  # as the one that runs knows it


def test_a_fact_that_one_side_does_not_name_is_no_difference() -> None:
    """The list of facts grows with the code; one that both sides name counts."""
    old = {"form": "Gated", "form.facts.own_lr": 2.0}
    assert first_difference(old, {**old, "form.facts.shares": True}) is None
    assert first_difference(old, {**old, "form.facts.own_lr": 3.0}) == ("form.facts.own_lr", 2.0, 3.0)
    assert first_difference(old, {**old, "form.tau": 2.0}) == ("form.tau", None, 2.0)


def test_a_folder_of_others_is_no_study(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "results.csv").write_text("mine")
    for act in (Store, report):
        with pytest.raises(LoralignError, match=r"mine is not empty and holds no study: name an empty or new folder"):
            act(spec(folder))
    assert [p.name for p in folder.iterdir()] == ["results.csv"] and (folder / "results.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["lora-ga", "hrp", "lora-plus", "lora-rite", "delta-lora", "rm-lora", "cora"])
def test_every_option_tells_arms_apart_and_the_seed_does_not(name: str) -> None:
    here = arm_settings(arm(name))
    assert json.loads(json.dumps(here)) == here
    assert arm_settings(arm(name, seed=7)) == here
    assert not any("0x" in str(value) for value in here.values())  # no address: another process says the same
    recipe = build(name)
    assert isinstance(recipe, Recipe)
    assert arm_settings(Arm(name, replace(recipe, alpha=7.0), 1e-3)) != here


def test_options_of_a_closure_count() -> None:
    gammas = [arm_settings(Arm("x", build("lora-ga", {"gamma": gamma}), 1e-3)) for gamma in (16.0, 64.0)]
    assert gammas[0] != gammas[1]


BOUND: dict[str, Any] = {
    "steps": 8,
    "batch_size": 16,
    "micro_batch_size": 16,
    "eval_every": 4,
    "schedule": "linear",
    "warmup": 0.1,
    "rates": 5,
    "ratio": 3.0,
    "finalists": 3,
    "choice_seeds": 3,
    "rate_seed": 7,
    "charge": "none",
    "prune": False,
    "autocast": False,
    "compile": True,
    "cpu_threads": 2,
    "content": {"task.valid": "1"},
}
FREE = {"seeds", "baseline_seeds", "extensions", "budget"}  # they may grow
FREE |= {"arms", "model", "output", "task"}  # by themselves, by content, nowhere, and by parts of it
FREE |= {"capture", "references", "source", "reading", "task_name", "shared_rows"}  # no outcome hangs on them


def test_every_setting_of_a_study_is_bound_or_free() -> None:
    assert BOUND.keys() | FREE == {field.name for field in fields(Spec)} and not BOUND.keys() & FREE


@pytest.mark.parametrize("name", [*BOUND, "task.kind", "task.length", "task.head_lr"])
def test_other_settings_are_refused_once_a_trial_has_begun(tmp_path: Path, name: str) -> None:
    part = {"task.kind": "sft", "task.length": 64, "task.head_lr": 0.1}
    mine = spec(tmp_path)
    changes = {name: BOUND[name]} if name in BOUND else {"task": replace(TASK, **{name[5:]: part[name]})}
    assert all(getattr(mine, key) != value for key, value in changes.items())
    changed = replace(mine, **changes)
    other, first = Store(changed), Store(mine)
    with pytest.raises(LoralignError, match="was started"):
        other.claim(FIRST)  # its settings are the study's no more
    assert first.claim(FIRST) is not None
    with pytest.raises(LoralignError, match="was started"):
        Store(changed)


def test_seeds_arms_extensions_and_budgets_may_grow_and_paths_differ(tmp_path: Path) -> None:
    small = spec(tmp_path)
    assert work(small, bowl)
    before = Store(small).outcomes()
    moved = tmp_path.rename(tmp_path.parent / "moved")
    grown = spec(moved, *small.arms, arm("rslora"), seeds=3, baseline_seeds=3, extensions=2, budget=Budget(minutes=1))
    grown = replace(grown, model="elsewhere/toy", task=replace(TASK, train="elsewhere/a.jsonl"))
    ran: list[str] = []
    assert work(grown, lambda t, r: (ran.append(t.key), bowl(t, r))[1])
    assert not set(ran) & set(before) and len(ran) == 3 + 3 + 2  # its rates, its seeds, one more seed for the others


def test_a_later_arm_at_its_edge_gives_every_arm_one_more_rate(tmp_path: Path) -> None:
    def falling(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        return ended(1 + 0.1 * (trial.index - 2) ** 2) if trial.arm == "rslora" else bowl(trial, report)

    small = spec(tmp_path, extensions=3)
    assert work(small, bowl)
    joined = spec(tmp_path, *small.arms, arm("rslora"), extensions=3)
    assert work(joined, falling)
    trials, edges = rate_trials(joined, Store(joined).outcomes())
    counts = {a.name: sum(t.arm == a.name for t in trials) for a in joined.arms}
    assert counts == {"lora": 5, "pissa": 5, "rslora": 5} and not edges


def test_an_arm_whose_every_rate_diverged(tmp_path: Path) -> None:
    def wild(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        return ended(diverged=True) if trial.arm == "pissa" else bowl(trial, report)

    study = spec(tmp_path, extensions=2)
    assert work(study, wild)
    done = Store(study).outcomes()
    trials, edges = rate_trials(study, done)
    assert sorted(t.index for t in trials if t.arm == "pissa") == [-3, -2, -1, 0, 1]  # ever lower rates
    assert edges == {"pissa": "low"} and all(t.arm == "lora" for t in seed_trials(study, done, trials))
    pissa = next(a for a in report(study).result.arms if a.arm == "pissa")
    assert pissa.sentence == "no learning rate finished: every trial diverged or was given up"


def test_contents_and_not_paths(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({"hidden_size": 4, "_name_or_path": place}))
        (tmp_path / place / "model.safetensors").write_bytes(b"1" * 300_000)
        (tmp_path / place / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    here, there = tmp_path / "here", tmp_path / "there"
    assert model_print(str(here)) == model_print(str(there))
    assert file_print(str(here / "rows.jsonl")) == file_print(str(there / "rows.jsonl"))
    with (there / "model.safetensors").open("r+b") as f:
        f.seek(299_999)
        f.write(b"2")
    (there / "rows.jsonl").write_text('{"text": "b"}\n')
    assert model_print(str(here)) != model_print(str(there))
    assert file_print(str(here / "rows.jsonl")) != file_print(str(there / "rows.jsonl"))
    task = TaskSpec("text", str(here / "rows.jsonl"), str(here / "config.json"), str(there / "rows.jsonl"))
    study = replace(spec(tmp_path), model=str(here), task=task)
    assert set(content_of(study)) == {"model", "task.train", "task.valid", "task.test"} and shared_rows(study) == 1


def test_shared_rows_are_counted_as_often_as_they_are_tested(tmp_path: Path) -> None:
    texts = {"train": "a\nb\n", "valid": "c\r\n", "test": "c\na\n\na\nd"}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode())
    task = TaskSpec("text", *(str(tmp_path / f"{name}.jsonl") for name in texts))
    assert shared_rows(replace(spec(tmp_path), task=task)) == 3


# -------------------------------------------------------------------------------------------------------------- claims


def test_of_many_claims_one_wins(tmp_path: Path) -> None:
    stores = [Store(spec(tmp_path)) for _ in range(6)]
    barrier, won = threading.Barrier(len(stores)), []

    def take(one: Store) -> None:
        barrier.wait()
        won.append(one.claim(FIRST))

    threads = [threading.Thread(target=take, args=(one,)) for one in stores]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(claim is not None for claim in won) == 1
    assert set(stores[0].running()) == {FIRST.key}


def test_a_process_that_died_here_is_taken_over_at_once(tmp_path: Path) -> None:
    context = get_context("fork")
    claimed = context.Event()

    def hold() -> None:
        importlib.reload(storing).Store(spec(tmp_path)).claim(FIRST)  # who owns a claim is known at the import
        claimed.set()
        time.sleep(60)

    other = context.Process(target=hold)
    other.start()
    assert claimed.wait(30)
    here = Store(spec(tmp_path))
    assert set(here.running()) == {FIRST.key} and here.claim(FIRST) is None
    other.kill()
    other.join()
    assert here.running() == {}
    claim = here.claim(FIRST)
    assert claim and claim.finish(ended()) and set(here.outcomes()) == {FIRST.key}


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path, machine: str) -> Store:
    """A store that sees itself on another machine."""
    monkeypatch.setattr(storing, "MACHINE", machine)
    return Store(spec(folder))


def test_a_worker_elsewhere_lives_as_long_as_its_beat_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BEAT_S", 0.05)
    monkeypatch.setattr(storing, "STALE_S", 0.6)
    claim = Store(spec(tmp_path)).claim(FIRST)
    there = elsewhere(monkeypatch, tmp_path, "another")
    assert claim
    end = time.monotonic() + 1.5  # far longer than STALE_S, without one evaluation
    while time.monotonic() < end:
        assert FIRST.key in there.running()
        time.sleep(0.1)
    claim._ended.set()  # its process stops: no beat any more
    time.sleep(0.1)
    assert FIRST.key in there.running()
    time.sleep(0.7)
    assert there.running() == {}
    again = there.claim(FIRST)
    assert again and not claim.finish(ended(9.0)) and claim.lost  # it woke up, too late
    assert again.finish(ended(1.0)) and there.outcomes()[FIRST.key].losses[-1] == 1.0


def test_a_number_that_another_process_has_now_is_not_the_worker(tmp_path: Path) -> None:
    store = Store(spec(tmp_path))
    claim = store.claim(FIRST)
    assert claim and FIRST.key in store.running()
    claim._end()
    machine, pid, born = storing.OWNER
    store._journal.set_trial_user_attr(claim._trial, "owner", [machine, pid, born - 3600.0])
    assert store.running() == {} and store.claim(FIRST)


def test_no_beat_comes_after_the_end_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is under way is waited for: it would find the trial ended, and take that for a take-over."""
    events: list[str] = []

    def slow(claim: Any, step: int | None = None) -> None:
        events.append("begins")
        time.sleep(0.2)
        events.append("beat")

    monkeypatch.setattr(storing, "BEAT_S", 0.0)
    monkeypatch.setattr(storing.Claim, "beat", slow)
    claim = Store(spec(tmp_path)).claim(FIRST)
    assert claim
    while not events:
        time.sleep(0.01)
    assert claim.finish(ended()) and not claim.lost
    events.append("end")
    time.sleep(0.3)
    assert events[-1] == "end"


def test_a_clock_that_is_wrong_by_minutes_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Store(spec(tmp_path)).claim(FIRST)
    assert claim
    claim._ended.set()
    there = elsewhere(monkeypatch, tmp_path, "another")
    now = time.time()
    monkeypatch.setattr(storing.time, "time", lambda: now + 600)
    assert FIRST.key in there.running()
    monkeypatch.setattr(storing.time, "time", lambda: now + 7200)  # abandoned yesterday
    assert elsewhere(monkeypatch, tmp_path, "a third").running() == {}


# ------------------------------------------------------------------------------------------------------- damaged files


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    assert work(spec(tmp_path), bowl)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"worker')
    assert Store(spec(tmp_path)).outcomes() == Store(spec(tmp_path)).outcomes() != {}
    assert journal.read_bytes() == whole


def test_half_a_line_of_a_stopped_write_harms_no_worker_that_goes_on(tmp_path: Path) -> None:
    """One worker dies in the middle of a line while another one, which opened the journal before, works on."""
    store = Store(spec(tmp_path))
    with (tmp_path / "study.journal").open("ab") as f:
        f.write(b'{"op_code":6,"worker')
    claim = store.claim(FIRST)
    assert claim and claim.finish(ended(1.5))
    assert Store(spec(tmp_path)).outcomes()[FIRST.key].losses == (2.5, 1.5)


def test_a_journal_cut_anywhere_goes_on_to_the_same_outcomes(tmp_path: Path) -> None:
    assert work(spec(tmp_path / "whole"), bowl)
    done, whole = Store(spec(tmp_path / "whole")).outcomes(), (tmp_path / "whole" / "study.journal").read_bytes()
    for part in (0.15, 0.4, 0.6, 0.85):
        folder = tmp_path / str(part)
        folder.mkdir()
        (folder / "study.journal").write_bytes(whole[: int(part * len(whole))])
        study = spec(folder)
        kill_claims(folder)
        assert work(study, bowl)
        assert Store(study).outcomes() == done


def kill_claims(folder: Path) -> None:
    """The claims of this test's own process become those of one that is gone."""
    path = folder / "study.journal"
    path.write_text(path.read_text().replace(f",{os.getpid()},", ",999999999,"))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    assert work(spec(tmp_path), bowl)
    journal = tmp_path / "study.journal"
    lines = journal.read_text().splitlines(True)
    journal.write_text("".join([*lines[:5], "{broken\n", *lines[5:]]))
    with pytest.raises(LoralignError, match=r"study\.journal in .* is damaged at line 6: remove that line"):
        Store(spec(tmp_path))


def replaced(pattern: str, by: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [re.sub(pattern, lambda found: by, line) for line in lines]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1:], "line 1: the study's beginning is missing"),
        (lambda lines: ["rubbish\n", *lines], "line 1"),
        (lambda lines: ["[]\n", *lines], "line 1"),
        (replaced(r'"settings": {.*?}}', '"settings": 3}'), "in its settings"),
        (replaced(r'"key": "rate', r'"key": "'), "in the key of trial 0"),
        (replaced(r'"key": "rate', r'"key": 3, "x": "rate'), "in the key of trial 0"),
        (replaced(r'"key": "rate', r'"x": "rate'), "in the key of trial 0"),
        (replaced(r'"owner": \[', r'"owner": [[], '), "in the owner of trial 0"),
        (replaced(r'"beat": \[0\.0', r'"beat": [null'), "in the beat of trial 0"),
        (replaced(r'\\"losses\\": \[', r'\"losses\": [{}, '), "in the outcome of trial 0"),
        (replaced(r'\\"losses\\": \[', r'\"losses\": [1.0, '), "in the outcome of trial 0"),
        (replaced(r'"outcome": "\{', r'"outcome": "[]{'), "in the outcome of trial 0"),
    ],
)  # fmt: skip
def test_a_journal_of_another_form_is_refused_and_nothing_is_forgotten(
    tmp_path: Path, change: Callable[[list[str]], list[str]], said: str
) -> None:
    assert work(spec(tmp_path), bowl)
    journal = tmp_path / "study.journal"
    lines = [json.dumps(json.loads(line)) + "\n" for line in journal.read_text().splitlines()]
    assert change(lines) != lines
    journal.write_text("".join(change(lines)))
    with pytest.raises(LoralignError, match=f"damaged .*{said}"):
        Store(spec(tmp_path)).outcomes()


def test_arms_may_be_called_what_markup_and_mathematics_mean(tmp_path: Path) -> None:
    study = spec(tmp_path, arm("[/x]", method="lora"), arm("a$^{$b", method="pissa"), references=False)
    assert work(study, bowl)
    result = report(study).result
    console = Console(file=io.StringIO(), width=160)
    for table in (*terminal_tables(result), board(study, Store(study).outcomes(), {})):
        console.print(table)
    assert console.file.getvalue().count("[/x]") == console.file.getvalue().count("a$^{$b") > 1  # type: ignore[attr-defined]
    assert {"rates.png", "steps.png"} <= {p.name for p in tmp_path.iterdir()}


def test_the_page_holds_names_as_text_and_not_as_markup(tmp_path: Path) -> None:
    bad = "</script><i>"
    study = spec(tmp_path, arm("lora"), arm(bad, method="pissa"), references=False)
    assert work(study, bowl)
    report(study)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert bad not in page and escape(bad) in page
    held = re.search(r'<script type="application/json" id="data-0">(.*?)</script>', page, re.S)
    assert held and json.loads(held[1])["result"]["arms"][1]["arm"] == bad


@pytest.mark.slow
def test_a_lock_left_behind_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative folder, as in a study file
    Store(spec(Path("out")))
    JournalFileOpenLock("out/study.journal").acquire()
    began = time.monotonic()
    claim = Store(spec(Path("out"))).claim(FIRST)
    assert claim and 20 < time.monotonic() - began < 60


# ------------------------------------------------------------------------------------------------------------- budgets


def test_a_budget_of_trials_counts_what_others_run(tmp_path: Path) -> None:
    study = spec(tmp_path, budget=Budget(trials=2))
    store = Store(study)
    assert not no_room(study, store, time.monotonic())
    claims = [store.claim(t) for t in wanted(study, {})[:2]]
    assert no_room(study, store, time.monotonic())
    assert claims[0] and claims[1]
    claims[0].drop()
    assert not no_room(study, store, time.monotonic())


def test_hours_count_finished_running_and_dropped_trials(tmp_path: Path) -> None:
    study = spec(tmp_path, budget=Budget(gpu_hours=0.05))  # 180 s, a trial takes 36 s
    store, plan = Store(study), wanted(spec(tmp_path), {})
    for t in plan[:2]:
        claim = store.claim(t)
        assert claim and claim.finish(ended())
    assert store.outcomes() and store.spent_s() == pytest.approx(72)
    assert not no_room(study, store, time.monotonic())
    running = [store.claim(t) for t in plan[2:4]]  # 72 s more to come
    assert not no_room(study, store, time.monotonic())
    running.append(store.claim(plan[4]))
    assert no_room(study, store, time.monotonic())
    stopped = running[0]
    assert stopped
    stopped._started -= 100.0
    stopped.drop()
    assert store.spent_s() == pytest.approx(172, abs=2)


def test_a_trial_that_would_end_too_late_is_not_begun(tmp_path: Path) -> None:
    study, now = spec(tmp_path, budget=Budget(minutes=1)), time.monotonic()
    assert not no_room(study, Store(study), now)
    claim = Store(study).claim(FIRST)
    assert claim and claim.finish(ended())
    store = Store(study)
    assert not no_room(study, store, now - 20) and no_room(study, store, now - 30)


# --------------------------------------------------------------------------------------------------------- what is seen


def test_the_table_shows_what_other_workers_do(tmp_path: Path) -> None:
    study = spec(tmp_path, extensions=1)
    store = Store(study)
    claim = store.claim(wanted(study, {})[0])
    assert claim
    claim.beat(2)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(board(study, store.outcomes(), store.running()))
    text = console.export_text()
    assert "0 of at least 10 trials done, 1 running" in text and "0.001 50 %" in text
    claim.drop()
    assert work(study, bowl)
    assert headline(study, store.outcomes(), store.running()) == "10 of 10 trials done"


def test_the_time_to_go_is_of_what_is_left(tmp_path: Path) -> None:
    """10 trials of 120 s: 4 are done, two workers are half way; 6 × 120 − 2 × 60 s on two of them."""
    study = spec(tmp_path)
    plan = wanted(study, {})
    done = {t.key: ended(total_s=120.0) for t in plan[:4]}
    assert headline(study, done, {}).endswith("4 of at least 10 trials done, about 12 min to go")
    busy = {t.key: (60.0, 2) for t in plan[4:6]}
    assert headline(study, done, busy).endswith("2 running, about 5 min to go")


def test_what_all_trials_took_is_told_in_hours() -> None:
    done = {"a": ended(total_s=1800.0, between_s=2.0), "b": ended(total_s=5400.0, between_s=4.0)}
    found = {"trials": 2.0, "seconds_per_trial": 3600.0, "summed_hours": 2.0, "seconds_between_trials": 3.0}
    assert timing(done) == found and timing({}) == {}


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    said: list[str] = []
    study = spec(tmp_path)
    with watched(study, said.append):
        work(study, bowl)
    assert said[0] == "0 of at least 10 trials done" and len(said) == 11
    assert said[-1] == "[10/10] pissa at 0.001, seed 1: test loss 1.0010 in 36 s"


def test_what_is_reported_of_an_unfinished_search(tmp_path: Path) -> None:
    study = spec(tmp_path, budget=Budget(trials=3), references=False, shared_rows=2)
    assert not work(study, bowl)
    found = collect(study, Store(study).outcomes())
    assert found.missing == 3 and len(found.rates) == 3 and not found.curves
    notes = report(study).result.notes
    assert notes[0].startswith("the search for learning rates is unfinished, 3 of 6 trials are done")
    assert "`references: false`" in notes[1] and notes[2].startswith("2 test rows stand in")
    assert repeatable(tmp_path)["table"] == []


def test_unfinished_seeds_are_told(tmp_path: Path) -> None:
    assert not work(spec(tmp_path, budget=Budget(trials=8)), bowl)
    assert (
        report(spec(tmp_path)).result.notes[0] == "the seeds are unfinished, 2 of 4 trials are done; run again to go on"
    )


def test_different_devices_are_told(tmp_path: Path) -> None:
    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        return replace(bowl(trial, report), device="cpu" if trial.seed % 2 else "NVIDIA H100")

    assert work(spec(tmp_path), run)
    assert report(spec(tmp_path)).result.notes[0] == "trials ran on NVIDIA H100, cpu: their seconds are not comparable"
