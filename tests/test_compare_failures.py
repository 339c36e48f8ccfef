"""Arms that fail: left out with a sentence, tried again by the next run of the command; the others are untouched."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from loralign import LoralignError, build
from loralign.cli.app import main
from loralign.compare.failures import CONTEXT, standing
from loralign.compare.live import watched
from loralign.compare.report import repeatable, report
from loralign.compare.residents import Residents
from loralign.compare.schedule import wanted
from loralign.compare.spec import Arm, Outcome, Spec, TaskSpec, Trial
from loralign.compare.store import Store
from loralign.compare.study import work
from loralign.types import WorkFailed
from test_compare_run import compare, never, timeless, trial
from tiny_study import SMALL, load, write_study

Run = Callable[[Trial, Callable[[int, float], bool]], Outcome]


def spec(folder: Path, *arms: str, **changes: Any) -> Spec:
    made = tuple(Arm(name, build(name), lr=1e-3) for name in arms or ("lora", "pissa", "olora"))
    fields: dict[str, Any] = {"steps": 4, "rates": 3, "seeds": 2, "baseline_seeds": 2, "choice_seeds": 1, **changes}
    return Spec("toy", TaskSpec("text", "a", "b", "c"), made, folder, **fields)


def outcome(trial: Trial) -> Outcome:
    final = 1.0 + 0.1 * trial.index**2 + 0.001 * (trial.seed % 7) + 0.01 * len(trial.arm)
    return Outcome((2, 4), (0.1, 0.2), (final + 1, final), step_tokens=128.0, total_s=0.2)


class Stopped(BaseException):
    """What is no arm's."""


def failing(errors: dict[str, Exception], begun: list[str] | None = None) -> Run:
    """Trials whose key begins as one of these raise its error."""

    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        if begun is not None:
            begun.append(trial.key)
        if error := next((e for key, e in errors.items() if trial.key.startswith(key)), None):
            raise error
        return outcome(trial)

    return run


def test_the_others_go_on_and_end_as_if_it_had_not_been_there(tmp_path: Path) -> None:
    begun: list[str] = []
    failed, alone = spec(tmp_path / "failed"), spec(tmp_path / "alone", "lora", "olora")
    # at an edge of its grid when it fails: what it asked of the others by then counts no more
    high = failing({"rate/pissa/+1": WorkFailed("arm 'pissa' at 0.002: it broke")}, begun)
    assert work(failed, high) and work(alone, failing({}))
    assert sum(key.startswith("rate/pissa/+1") for key in begun) == 1
    assert report(failed).result.failed == {"pissa": "arm 'pissa' at 0.002: it broke"}
    report(alone)
    ours, theirs = repeatable(failed.output), repeatable(alone.output)
    assert ours["table"] == theirs["table"] and ours["result"]["arms"] == theirs["result"]["arms"]
    assert ours["result"]["notes"][0] == "failed and left out: arm 'pissa' at 0.002: it broke"
    assert "failed and left out" in (failed.output / "results.md").read_text(encoding="utf-8")
    page = (failed.output / "report.html").read_text(encoding="utf-8")
    assert '<span class="flag">failed</span>' in page and "<code>pissa</code> failed and is left out." in page


def board_of(study: Spec, session: str | None = None) -> str:
    """What a terminal shows of one run of the command."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with watched(study, str, console, session=session):
        pass
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_next_run_tries_it_again_once_and_takes_it_in(tmp_path: Path) -> None:
    study, begun = spec(tmp_path), list[str]()
    broken = failing({"seed/pissa/+0/1": ValueError("of another kind")}, begun)
    assert work(study, broken, session="first") and work(study, broken, session="first")
    assert begun.count("seed/pissa/+0/1") == 1
    assert work(study, broken, session="second") and begun.count("seed/pissa/+0/1") == 2
    assert "failed, is left out" in board_of(study) and "failed, is left out" in board_of(study, "second")
    assert "failed" not in board_of(study, "third") and "14 of 15 trials" in board_of(study, "third")
    store = Store(study)
    assert {f.session for f in store.failures()} == {"first", "second"}
    assert work(study, failing({}, begun), session="third") and begun.count("seed/pissa/+0/1") == 3
    assert not Store(study).failures() and len(begun) == len(set(begun)) + 2  # nothing else ran twice
    report(study)
    whole = spec(tmp_path / "whole")
    assert work(whole, failing({}))
    report(whole)
    assert repeatable(tmp_path / "whole") == repeatable(tmp_path)


@pytest.mark.parametrize(
    ("errors", "kind", "said"),
    [
        ({"rate/lora": LoralignError("arm 'lora': wrong")}, LoralignError, "arm 'lora': wrong"),
        ({"rate": RuntimeError("for all")}, WorkFailed, "arm 'lora' at 0.001: unexpected RuntimeError: for all"),
    ],
)
def test_what_fails_the_baseline_ends_the_study_at_once(
    tmp_path: Path, errors: dict[str, Exception], kind: type, said: str
) -> None:
    begun: list[str] = []
    for _ in range(2):  # another worker of the same run tries nothing
        with pytest.raises(kind, match=said) as raised:
            work(spec(tmp_path), failing(errors, begun), session="one")
        assert raised.type is kind and begun == ["rate/lora/+0/1000"]


def test_without_the_baseline_every_arm_must_fail(tmp_path: Path) -> None:
    begun: list[str] = []
    with pytest.raises(WorkFailed, match=r"arm 'pissa' at 0\.001: unexpected RuntimeError"):
        work(spec(tmp_path, "pissa", "olora"), failing({"rate": RuntimeError("for all")}, begun))
    assert begun == ["rate/pissa/+0/1000", "rate/olora/+0/1000"]


@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_what_is_not_the_arms_fault_is_no_failure_of_it(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        work(spec(tmp_path), failing({"rate/pissa": error}))  # type: ignore[dict-item]
    assert not Store(spec(tmp_path)).failures() and not Store(spec(tmp_path)).running()


def test_a_device_that_broke_ends_the_worker_whatever_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS says it in a plain RuntimeError; the next trial would fail for it, too."""

    def broken() -> None:
        raise torch.AcceleratorError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="CUBLAS"):
        work(spec(tmp_path), failing({"rate/pissa": RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")}))
    assert [f.key for f in Store(spec(tmp_path)).failures()] == ["rate/pissa/+0/1000"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert work(spec(tmp_path), failing({"rate/pissa": RuntimeError("its own")}))


def test_memory_that_the_others_hold_is_not_the_arms_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This worker ends, the trial is free again. Without others at work it is the arm's, whoever is on the card."""
    others = 40
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50 * CONTEXT)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((49 - others) * CONTEXT, 100 * CONTEXT))
    study, begun = spec(tmp_path / "crowded"), list[str]()
    short = failing({"rate/pissa": torch.OutOfMemoryError("tried to allocate")}, begun)
    other = Store(study).claim(Trial("rate", "olora", 0, 1e-3, 1000))
    assert other is not None and not work(study, short)
    assert begun.count("rate/pissa/+0/1000") == 1 and not Store(study).failures()
    other.drop()
    assert work(study, short) and begun.count("rate/pissa/+0/1000") == 2
    assert [f.key for f in Store(study).failures()] == ["rate/pissa/+0/1000"]
    assert {t.arm for t in wanted(standing(study, Store(study).outcomes(), Store(study).failures())[0], {})} == {
        "lora", "olora"
    }  # fmt: skip
    others, study = 0, spec(tmp_path / "own")
    other = Store(study).claim(Trial("rate", "olora", 1, 2e-3, 1000))
    assert other is not None
    with pytest.raises(Stopped):  # its own memory did not suffice: the arm is out, the worker goes on
        work(study, failing({"rate/pissa": torch.OutOfMemoryError("tried"), "rate/olora": Stopped()}))  # type: ignore[dict-item]
    assert [f.key for f in Store(study).failures()] == ["rate/pissa/+0/1000"]
    other.drop()


def test_a_sentence_for_each_kind_of_failure(tmp_path: Path) -> None:
    study = spec(tmp_path, "lora", "pissa", "olora", "rslora")
    errors = {"rate/pissa": torch.OutOfMemoryError("tried to allocate"), "rate/olora": ValueError("x" * 999)}
    assert work(study, failing(errors))
    said = {f.key.split("/")[1]: f.said for f in Store(study).failures()}
    assert said["pissa"].startswith("arm 'pissa' at 0.001: out of memory: take fewer `--workers`")
    assert said["olora"].startswith("arm 'olora' at 0.001: unexpected ValueError: xxx") and len(said["olora"]) < 300


def test_a_failure_that_the_study_wants_no_more_leaves_nothing_out(tmp_path: Path) -> None:
    study = spec(tmp_path)
    assert work(study, failing({"rate/pissa/-1": WorkFailed("broke")}))
    done, failures = Store(study).outcomes(), Store(study).failures()
    assert set(standing(study, done, failures)[1]) == {"pissa"}
    fewer = replace(study, rates=2, extensions=0)
    assert "rate/pissa/-1/1000" not in {t.key for t in wanted(fewer, done)}
    assert standing(fewer, done, failures) == (fewer, {})


def test_a_trial_after_one_that_raised_is_as_if_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle of a step leaves an adapter, gradients and moved weights behind."""
    study = load(write_study(tmp_path))
    alone = Residents(study).run(trial("lora"), never)
    running = Residents(study)

    def stop(step: int, loss: float) -> bool:
        raise ValueError("in the middle")

    with monkeypatch.context() as patched:  # what tidies up fails, too
        patched.setattr("loralign.compare.runner.Resident._unload", lambda self: None)
        for arm in ("lora-ga", "full"):
            with pytest.raises(ValueError, match="in the middle"):
                running.run(trial(arm), stop)
    assert timeless(running.run(trial("lora"), never)) == timeless(alone)


def test_what_all_trials_share_is_set_apart_from_collections_and_what_a_trial_leaves_is_not(tmp_path: Path) -> None:
    gone: list[int] = []
    running = Residents(load(write_study(tmp_path)))
    resident, before = running.resident, gc.get_freeze_count()
    assert resident is not None

    def watch(step: int, loss: float) -> bool:
        weakref.finalize(resident.adapted, gone.append, step)
        return True

    running.run(trial("lora"), watch)
    known = gc.get_freeze_count()
    assert known > before and gone == [2]
    running.run(trial("lora"), never)
    assert 0.99 * known < gc.get_freeze_count() <= known  # a known arm's trial adds nothing


def command_line(capsys: pytest.CaptureFixture[str], file: Path) -> tuple[int, str, str]:
    code = main(["compare", str(file)])
    said = capsys.readouterr()
    return code, said.out, said.err


BROKEN = {"method": "hrp", "options": {"lr": 1e30, "steps": 2}}


def test_the_command_with_an_arm_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preheat that runs away. Exit 1 at the end; mended by other options it joins the finished others."""
    small = {"rates": {"count": 2, "extensions": 0, "seeds": 1}, "seeds": 2, "baseline_seeds": 2, "references": False}
    file = write_study(tmp_path, arms=["lora", BROKEN], **small)
    code, out, err = command_line(capsys, file)
    assert code == 1 and "1 arm failed and is left out, the same command tries again: arm 'hrp' at" in err
    assert "failed: arm 'hrp' at" in out and "Loss on test rows" in out and out.count("choosing its rate, ") == 2
    before = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(before["result"]["failed"]) == ["hrp"] and len(before["result"]["arms"]) == 1
    assert main(["compare", str(file), "--report"]) == 0
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    mended = {**content, "arms": ["lora", {**BROKEN, "options": {"lr": 1e-3, "steps": 2}}]}
    file.write_text(yaml.safe_dump(mended), encoding="utf-8")
    capsys.readouterr()
    code, _, err = command_line(capsys, file)
    assert code == 0, err
    after = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert not after["result"]["failed"] and len(after["result"]["arms"]) == 2
    assert {key: after["trials"][key] for key in before["trials"]} == before["trials"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_workers_and_an_arm_that_fails(tmp_path: Path) -> None:
    file = write_study(tmp_path, arms=[BROKEN, "pissa"], train=SMALL)
    done: subprocess.CompletedProcess[str] = compare(file, "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert "1 arm failed and is left out" in done.stderr and "workers failed" not in done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in found["result"]["arms"]] == ["full", "lora", "pissa"]


@pytest.mark.parametrize("complete", [True, False])
def test_a_worker_that_is_killed_costs_nothing_where_the_others_come_to_the_end(
    tmp_path: Path, complete: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(tmp_path)
    study = load(file)
    work(study if complete else replace(study, budget=replace(study.budget, trials=2)), failing({}))
    ends = iter(["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "print('[1/9] lora')"])
    made = partial(subprocess.Popen, stderr=subprocess.STDOUT)

    def worker(command: list[str], *, stdout: Any, **_: Any) -> subprocess.Popen[bytes]:
        return made([command[0], "-c", next(ends)], stdout=stdout)

    monkeypatch.setattr("loralign.cli.compare.subprocess.Popen", worker)
    code = main(["compare", str(file), "--workers", "2"])
    said = capsys.readouterr().err
    told = "1 of 2 workers failed, what they finished is kept; the first was ended by SIGKILL"
    assert told in said and "[1/9]" not in said
    assert (code, "the others came to the end" in said) == ((0, True) if complete else (1, False))
    assert (tmp_path / "out" / "report.html").exists() == complete
