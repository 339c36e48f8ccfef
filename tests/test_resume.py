"""A run that was killed, anywhere, goes on as if it had not been; with other settings it is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toy
import warm
from cli_world import Done, assert_one_sentence, bytes_of, run, world_in
from loralign.cli.run import job_of
from loralign.io.lock import lock_of, locked
from loralign.train.begun import clear_way, given_settings, read_begun, resume_point
from loralign.train.checkpoint import STATE, Note, last_complete, read_note, read_state, rotate, write_checkpoint
from loralign.train.ending import _adds_something
from loralign.train.journal import entries
from loralign.train.saves import AlreadyTrained, check_resumed, complete, reopen
from loralign.types import LoralignError

KILLED = """
import os, signal, sys
from pathlib import Path

event, ending, torn = sys.argv[1:4]

def watch(name, args):
    if name == event and str(args[1 if name == "os.rename" else 0]).replace(os.sep, "/").endswith(ending):
        for path in Path(torn).rglob("*") if torn else ():
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
from loralign.cli.app import main
main(sys.argv[4:])
"""
"""`loralign` that is killed when it opens or renames a certain file; what the folder `torn` holds by then is cut in
half, as by a power failure."""

MOMENTS = {  # what is just going to happen; the folder whose files get torn
    "state of the trainer": ("open", "checkpoint-4/trainer_state.json", "checkpoint-4"),
    "our note": ("os.rename", "checkpoint-4/loralign.json", "checkpoint-4"),
    "the first checkpoint": ("os.rename", "checkpoint-2/loralign.json", ""),
    "the export": ("os.rename", "killed/adapter_config.json", ""),
}
QUICK = "our note"


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("resume")) as root:
        yield root


@pytest.fixture(scope="module")
def whole(world: Path) -> Done:
    """The uninterrupted run; its result lies in `out`."""
    done = run("train", "r.yaml", "--set", "train.keep=9")
    assert done.code == 0, done.err
    return done


def train_and_kill(moment: str, output: str) -> int:
    event, ending, torn = MOMENTS[moment]
    torn_folder = f"{output}/checkpoints/{torn}" if torn else ""
    command = [sys.executable, "-c", KILLED, event, ending, torn_folder]
    return warm.run([*command, "train", "r.yaml", "--set", f"output={output}"]).returncode


def losses(folder: str) -> list[tuple[int, float]]:
    entries = map(json.loads, Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(e["step"], e["loss"]) for e in entries if "loss" in e]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=() if m == QUICK else pytest.mark.slow) for m in MOMENTS], ids=list(MOMENTS)
)
def test_a_kill_in_the_middle_of_a_save_loses_nothing(moment: str) -> None:
    shutil.rmtree("killed", ignore_errors=True)
    assert train_and_kill(moment, "killed") == -signal.SIGKILL
    resumed = run("train", "r.yaml", "--set", "output=killed", "--resume")
    assert resumed.code == 0, resumed.err
    assert ("is complete: it begins anew" in resumed.err) == (moment == "the first checkpoint")
    for path in ("adapter_model.safetensors", "checkpoints/checkpoint-6/adapter_model.safetensors"):
        ours, theirs = load_file(Path("killed", path)), load_file(Path("out", path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), path
    assert losses("killed") == losses("out")
    metrics = json.loads(Path("killed/run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["eval_loss_before"] > metrics["eval_loss"], "the first evaluation was not lost"
    assert [p.name for p in Path.cwd().glob(".killed.*")] == [], "the half export is gone"


@pytest.mark.usefixtures("whole")
def test_a_long_run_keeps_checkpoints_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 500 steps, here 4; one of fewer steps, of a reference and `init` keep none."""
    monkeypatch.setattr("loralign.train.saves.USUAL_SAVES", 4)
    unasked = ("--set", "train.save_every=null")
    done = run("train", "r.yaml", *unasked, "--set", f"output={tmp_path / 'long'}")
    assert done.code == 0 and "a checkpoint every 4 of 6 steps (`train.save_every` is not given)" in done.err
    found = {p.name for p in (tmp_path / "long/checkpoints").glob("checkpoint-*")}
    assert found == {"checkpoint-4", "checkpoint-6"}
    shutil.rmtree(tmp_path / "long/checkpoints/checkpoint-6")
    again = run("train", "r.yaml", *unasked, "--set", f"output={tmp_path / 'long'}", "--resume")
    assert again.code == 0 and losses(str(tmp_path / "long")) == losses("out")
    for name, words in {
        "short": ("train.steps=4",),
        "full": ("method=full", "rank=null", "alpha=null", "options={}"),
    }.items():
        given = [part for word in words for part in ("--set", word)]
        done = run("train", "r.yaml", *unasked, *given, "--set", f"output={tmp_path / name}")
        assert done.code == 0 and "a checkpoint every" not in done.err, done.err
        assert not list((tmp_path / name).glob("checkpoints/checkpoint-*"))
    done = run("init", "r.yaml", *unasked, "--set", f"output={tmp_path / 'init'}")
    assert done.code == 0 and "a checkpoint every" not in done.err, done.err


@pytest.mark.usefixtures("whole")
def test_a_run_without_a_checkpoint_begins_anew_unless_it_ended(tmp_path: Path) -> None:
    """Half a checkpoint of a step that the new attempt does not save is gone; a folder that holds no run is refused."""
    torn = tmp_path / "out" / "checkpoints" / "checkpoint-1"
    torn.mkdir(parents=True)
    shutil.copy("out/checkpoints/begun.json", torn.parent)
    (torn / "trainer_state.json").write_text("{", encoding="utf-8")
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n', encoding="utf-8")
    done = run("train", "r.yaml", "--set", f"output={tmp_path / 'out'}", "--set", "train.keep=9", "--resume")
    assert done.code == 0 and "no checkpoint of the run in" in done.err, done.err
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", Path("out")))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and losses(str(tmp_path / "out")) == losses("out")
    assert {p.name for p in torn.parent.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    ended = bytes_of(tmp_path / "out")
    for checkpoint in torn.parent.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    refused = run("train", "r.yaml", "--set", f"output={tmp_path / 'out'}", "--set", "seed=7", "--resume")
    assert refused.code == 2 and "has ended, and kept no checkpoint" in assert_one_sentence(refused)
    assert bytes_of(tmp_path / "out").items() <= ended.items(), "the finished adapter is left as it is"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    refused = run("train", "r.yaml", "--set", f"output={tmp_path / 'mine'}", "--resume")
    assert refused.code == 2 and "it holds no run" in assert_one_sentence(refused)


CHANGES = {  # overrides: what is said
    "rate": (["train.learning_rate=5e-3"], r"`train.learning_rate` is 0.005, the run began with 0.01"),
    "method": (["method=pissa", "options={}"], "`method` is 'pissa', the run began with 'lora-ga'"),
    "option": (["options={micro_batches: 3}"], "`options` is {'micro_batches': 3}, the run began with"),
    "rank": (["rank=2"], "`rank` is 2, the run began with 4"),
    "longer": (["train.steps=8"], "`train.steps` is 8, the run began with 6"),
    "rows": (["data.train=other.jsonl"], "the rows of `data.train` are not those that the run began with"),
    "base": (["model=base2"], "`model` holds other weights than the run began with"),
}


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("what", CHANGES)
def test_other_settings_are_refused_and_nothing_is_touched(what: str, world: Path) -> None:
    rows = Path("rows.jsonl").read_text(encoding="utf-8").splitlines()
    Path("other.jsonl").write_text("\n".join(reversed(rows)), encoding="utf-8")
    shutil.copytree("base", "base2", dirs_exist_ok=True)
    toy.llama(seed=7, max_position_embeddings=256).save_pretrained("base2")
    before = bytes_of(world)
    overrides, said = CHANGES[what]
    done = run("train", "r.yaml", "--resume", *(word for o in overrides for word in ("--set", o)))
    assert done.code == 2, done.err
    assert said in assert_one_sentence(done)
    assert bytes_of(world) == before


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


PARTS = {"optimizer.pt": "optimizer", "scheduler.pt": "schedule", "rng_state.pth": "randomness"}
PARTS |= {"adapter_model.safetensors": "adapter", "trainer_state.json": "state", "adapter_config.json": "config"}
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, "is missing"),
    "empty": (_cut(0), "has 0 bytes of"),
    "half": (_cut(0.5), "bytes of"),
    "one bit": (_flip, "is not as it was written"),
}


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(
    part: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("out/checkpoints", tmp_path / "out" / "checkpoints")
    job = job_of(Path("r.yaml"), [f"output={tmp_path / 'out'}"])
    change, said = DAMAGES[damage]
    change(tmp_path / "out" / "checkpoints" / "checkpoint-6" / part)
    assert resume_point(job.output) == job.output / "checkpoints" / "checkpoint-4"
    (warning,) = caplog.messages
    assert re.fullmatch(rf"checkpoint-6 is damaged: {part} .*; going on from checkpoint-4", warning) and said in warning
    for step in (2, 4):
        change(tmp_path / "out" / "checkpoints" / f"checkpoint-{step}" / part)
    out = re.escape(str(job.output))
    with pytest.raises(LoralignError, match=rf"checkpoint-6 is damaged: {part} .*delete {out}, run without --resume"):
        resume_point(job.output)


@pytest.mark.usefixtures("whole")
def test_a_checkpoint_of_another_run_is_put_aside_and_neighbours_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out" / "checkpoints"
    shutil.copytree("out/checkpoints", folder)
    job = job_of(Path("r.yaml"), [f"output={tmp_path / 'out'}"])
    note = json.loads((folder / "checkpoint-6" / "loralign.json").read_text(encoding="utf-8"))
    (folder / "checkpoint-6" / "loralign.json").write_text(json.dumps({**note, "run": "other"}), encoding="utf-8")
    (folder / "checkpoint-4").rename(folder / "checkpoint-5")
    for name in ("checkpoint-4 (copy)", "checkpoint-best"):
        (folder / name).mkdir()
    (folder / "checkpoint-9").write_text("mine")
    (folder / "checkpoint-8").symlink_to(tmp_path)
    assert resume_point(job.output) == job.output / "checkpoints" / "checkpoint-2"
    said = ["checkpoint-6 is of another run", "checkpoint-5 holds step 4: it was renamed"]
    assert caplog.messages == [f"{text}; going on from checkpoint-2" for text in said]
    clear_way(folder / "checkpoint-2", note["run"], keep=1)
    left = {p.name.rsplit("-", 1)[0] if "another" in p.name else p.name for p in folder.iterdir()}
    odd = {"checkpoint-4 (copy)", "checkpoint-best", "checkpoint-9", "checkpoint-8"}
    assert left == {"begun.json", "checkpoint-2", "of-another-run-checkpoint-6", *odd}


@pytest.mark.parametrize(("keep", "left"), [(None, {1, 2, 3, 4, 5, 6, 7}), (1, {2, 6}), (2, {2, 6}), (3, {2, 5, 6})])
def test_the_newest_and_the_best_stay(keep: int | None, left: set[int], tmp_path: Path) -> None:
    """Of complete checkpoints of this run; half a one and those of another run are nobody's to delete."""
    for step, of in enumerate("aaaaaab", 1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_checkpoint(folder, Note("lora", step, {}, run=of), {})
    (tmp_path / "checkpoint-8").mkdir()
    rotate(tmp_path, "a", keep, str(tmp_path / "checkpoint-2"))
    assert {int(p.name.split("-")[1]) for p in tmp_path.iterdir()} == {*left, 7, 8}


def test_a_checkpoint_of_a_run_holds_nothing_private_and_the_best_one_stays(tmp_path: Path) -> None:
    (tmp_path / "begun.json").write_text('{"format": 2, "run": "r", "settings": {}}', encoding="utf-8")
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    for step in range(1, 5):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for path in (
            folder / "training_args.bin",
            folder / "README.md",
            folder / "optimizer.pt",
            tmp_path / "README.md",
        ):
            path.touch()
        state = SimpleNamespace(global_step=step, best_model_checkpoint=str(tmp_path / "checkpoint-2"))
        complete(args, state, Note("lora", step, {}), {}, 2)
        note = read_note(folder)
        assert (note.run, set(note.parts)) == ("r", {"optimizer.pt"})
    assert {p.name for p in tmp_path.iterdir()} == {"begun.json", "checkpoint-2", "checkpoint-4"}


def test_a_run_goes_on_with_as_many_checkpoints_as_it_keeps(tmp_path: Path) -> None:
    """A kill between a save and its rotation leaves one more."""
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"best_model_checkpoint": "checkpoint-1"}')
        write_checkpoint(tmp_path / f"checkpoint-{step}", Note("lora", step, {}, run="a"), {})
    clear_way(tmp_path / "checkpoint-4", "a", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4"}


def test_a_state_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    assert read_state(tmp_path) == {}
    write_checkpoint(tmp_path, Note("adalora", 1, {}), {"taken": torch.tensor(3)})
    assert read_state(tmp_path)["taken"] == 3
    os.truncate(tmp_path / STATE, 20)
    with pytest.raises(LoralignError, match=r"is damaged: its loralign_state.safetensors cannot be read; delete it"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("mine", "saves", "strategy", "stays"),
    [
        (True, True, "steps", False),
        (True, False, "best", False),
        (True, False, "steps", True),
        (False, True, "steps", True),
    ],
)
def test_a_checkpoint_that_is_written_over_is_no_longer_complete(
    mine: bool, saves: bool, strategy: str, stays: bool, tmp_path: Path
) -> None:
    """mine: this process writes it."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_checkpoint(folder, Note("lora", 3, {}), {})
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=mine, save_strategy=strategy)
    reopen(args, SimpleNamespace(global_step=3), SimpleNamespace(should_save=saves))
    assert (last_complete(tmp_path) == folder) is stays


def test_the_best_checkpoint_is_found_where_it_is_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": "checkpoint-2"}', encoding="utf-8")

    def found(best: str | None, step: int = 4) -> tuple[Any, Any]:
        state = SimpleNamespace(best_model_checkpoint=best, best_metric=0.5, global_step=step, max_steps=6)
        check_resumed(folder, state)
        return state.best_model_checkpoint, state.best_metric

    for best in (None, "checkpoint-2"):
        assert found(best) == (None, None)  # a loss that no checkpoint has cannot be beaten
    assert caplog.messages == ["the best checkpoint so far, checkpoint-2, is gone: the best from here on counts"] * 2
    (tmp_path / "checkpoint-2").mkdir()
    assert found(None) == found("checkpoint-2") == (str(tmp_path / "checkpoint-2"), 0.5)
    assert found("elsewhere/checkpoint-3") == ("elsewhere/checkpoint-3", 0.5)
    with pytest.raises(AlreadyTrained, match=r"checkpoint-4 is the end of its run \(6 steps\)"):
        found(None, 6)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 3000, '{"format": 2}', '{"format": 2, "settings": 3}'], ids=lambda text: text[:30]
)
def test_a_broken_beginning_is_one_sentence(text: str, tmp_path: Path) -> None:
    shutil.copytree("out/checkpoints", tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "checkpoints" / "begun.json").write_text(text, encoding="utf-8")
    out = re.escape(str(tmp_path / "out"))
    with pytest.raises(LoralignError, match=rf"cannot resume {out}: its checkpoints/begun\.json is missing or damaged"):
        resume_point(tmp_path / "out")


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("text", ["[" * 3000, "[]", "{"], ids=lambda text: text[:3])
def test_a_broken_note_or_line_is_passed_over(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree("out", tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "checkpoint-6" / "loralign.json").write_text(text, encoding="utf-8")
    assert resume_point(tmp_path / "out").name == "checkpoint-4"
    assert "checkpoint-6 is damaged: its loralign.json cannot be read; going on from checkpoint-4" in caplog.text
    log = tmp_path / "out" / "log.jsonl"
    whole = entries(log)
    log.write_text("\n".join([text, *log.read_text(encoding="utf-8").splitlines()]), encoding="utf-8")
    assert entries(log) == whole


@pytest.mark.usefixtures("whole")
def test_a_run_of_an_older_version_goes_on_with_a_warning(tmp_path: Path) -> None:
    """Format 1 had neither an id nor checksums, and settings as they were given. Beside it lie what a kill leaves and
    lines of a log that are none."""
    folder = tmp_path / "old"
    shutil.copytree("out", folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    for path in (folder / "checkpoints").glob("*/loralign.json"):
        note = json.loads(path.read_text(encoding="utf-8"))
        del note["run"], note["parts"]
        path.write_text(json.dumps({**note, "format": 1}), encoding="utf-8")
    job = job_of(Path("r.yaml"), [f"output={folder}", "train.keep=9"])
    rows = read_begun(job.output).settings
    fingerprints = {key: value.strip("'") for key, value in rows.items() if key in ("data.train", "data.eval")}
    old = {key: repr(value) for key, value in given_settings(job, fingerprints).items()}
    (folder / "checkpoints" / "begun.json").write_text(json.dumps(old), encoding="utf-8")
    left = [
        folder / ".log.jsonl.1.tmp",
        folder / ".run.json.12",
        folder / "checkpoints/checkpoint-4/.loralign.json.3.tmp",
    ]
    for path in left:
        path.write_text("half")
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'3\n\xff\xfe\n{"step": "x"}\n')
    (folder / "run.json").write_text("[]")
    done = run("train", "r.yaml", "--resume", "--set", f"output={folder}", "--set", "train.keep=9")
    assert done.code == 0, done.err
    for said in (
        "without checksums",
        "was begun by an older loralign",
        "3 lines that cannot be read",
        "run.json was dam",
    ):
        assert said in done.err, said
    assert not any(path.exists() for path in left)
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in (folder, "out"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses(str(folder)) == losses("out")


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write('{"pid": 1234, "host": "elsewhere"}')
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("whole")
def test_two_runs_into_one_folder() -> None:
    """Another process holds the lock, then dies without letting it go."""
    held = lock_of(Path.cwd() / "out")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        before = bytes_of(Path("out"))
        second = run("train", "r.yaml", "--resume")
        assert second.code == 2
        said = "another run (process 1234 on elsewhere) is writing into out: wait for its end, or name another output"
        assert said in assert_one_sentence(second)
        assert bytes_of(Path("out")) == before
        holder.kill()
    assert held.exists()
    with locked(Path("out")), locked(Path("out")):  # a run exports into the folder that it holds
        assert json.loads(held.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not held.exists()


def test_a_folder_without_a_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some network file systems have none."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "out"):
        assert (
            "no lock can be had beside out" in caplog.text
            and "see to it that no other run writes into it" in caplog.text
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "options={}", "train.steps=1", "train.save_every=null"],
        ["method=full", "options={}", "rank=null", "train.steps=1", "train.save_every=null"],
    ],
    ids=["lora", "full"],
)
def test_a_run_that_moved_nothing_fails(overrides: list[str]) -> None:
    output = f"still-{overrides[0].split('=')[1]}"
    words = [word for o in (*overrides, f"output={output}") for word in ("--set", o)]
    done = run("train", "r.yaml", *words)
    assert done.code == 1, done.err
    assert "the run moved nothing: every update is zero after 1 step" in assert_one_sentence(done)
    assert not Path(output, "adapter_model.safetensors").exists() and not Path(output, "model.safetensors").exists()


@pytest.mark.parametrize(
    ("A", "B", "moved"),
    [((1, 1), (0, 0), False), ((1, 0), (0, 1), False), ((0, 0), (1, 1), False), ((1, 0), (1, 0), True)],
)
def test_a_slot_adds_something_by_both_of_its_sides(A: tuple[int, int], B: tuple[int, int], moved: bool) -> None:
    rows, columns = torch.tensor(A)[:, None] * torch.ones(2, 3), torch.ones(4, 2) * torch.tensor(B)
    assert _adds_something(rows, columns) is moved


@pytest.mark.usefixtures("whole")
def test_a_finished_run_takes_no_further_step() -> None:
    shutil.copytree("out", "finished")
    done = run("train", "r.yaml", "--resume", "--set", "output=finished", "--set", "train.log_every=1")
    assert done.code == 0, done.err
    assert "checkpoint-6 is the end of its run (6 steps)" in done.err
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in ("finished", "out"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_patience_and_the_best_checkpoint_survive_a_move(world: Path) -> None:
    """Early stopping after one evaluation without a gain: the rate is far too high."""
    patient = ["train.patience=1", "train.eval_every=1", "train.save_every=null", "train.steps=20"]
    patient += ["train.learning_rate=3", "train.schedule=constant"]
    argv = ["train", "r.yaml", *(word for o in patient for word in ("--set", o))]
    done = run(*argv, "--set", "output=early")
    assert done.code == 0, done.err
    steps = int(float(dict(line.split(": ") for line in done.out.splitlines() if line.startswith("steps: "))["steps"]))
    assert steps < 20, "it stopped early"
    shutil.move("early", "moved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        Path("moved", name).rename(Path(f"first-{name}"))
    again = run(*argv, "--set", "output=moved", "--resume")
    assert again.code == 0, again.err
    assert f"the run had ended at step {steps} by `train.patience`" in again.err
    ours, theirs = load_file("moved/adapter_model.safetensors"), load_file("first-adapter_model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs), "the best checkpoint, not the last"


def test_full_fine_tuning_resumes(world: Path) -> None:
    full = ["method=full", "options={}", "rank=null", "train.learning_rate=1e-3"]
    argv = ["train", "r.yaml", *(word for o in full for word in ("--set", o))]
    assert run(*argv, "--set", "output=full").code == 0
    shutil.copytree("full", "full-again")
    shutil.rmtree("full-again/checkpoints/checkpoint-6")
    again = run(*argv, "--set", "output=full-again", "--resume")
    assert again.code == 0, again.err
    ours, theirs = (load_file(Path(f, "model.safetensors")) for f in ("full-again", "full"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_model_and_resume(world: Path) -> None:
    """With an evaluation before the first step: a Trainer that evaluates before `train()` does not wrap the model."""
    few = ["train.batch_size=2", "train.micro_batch_size=2", "train.log_every=1"]

    def train(output: str, *more: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "loralign", "train"]
        words = [word for o in (*few, f"output={output}") for word in ("--set", o)]
        done = subprocess.run([*command, "r.yaml", *words, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Verified: ") == 1, "the first process speaks"

    train("two")
    shutil.copytree("two", "two-again")
    shutil.rmtree("two-again/checkpoints/checkpoint-6")
    train("two-again", "--resume")
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in ("two-again", "two"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses("two-again") == losses("two")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", "{}"),
        ("lora-ga", None),
        ("chain-of-lora", "{links: 2}"),
        ("adalora", "{}"),
        ("spectral", "{momentum: 0.0}"),
    ],
)
def test_a_model_that_fsdp_splits_trains_as_two_copies_and_resumes(
    method: str, options: str | None, world: Path
) -> None:
    """FSDP2 as accelerate prepares it: the first process exports and verifies what was gathered."""
    few = ["train.batch_size=2", "train.micro_batch_size=2", "train.log_every=1", f"method={method}"]
    few += [f"options={options}"] if options else []
    split = str(Path(__file__).with_name("fsdp_on_cpu.py"))

    def train(output: str, *program: str, more: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *program, "train"]
        words = [word for o in (*few, f"output={output}") for word in ("--set", o)]
        done = subprocess.run([*command, "r.yaml", *words, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Verified: ") == 1, "the first process speaks"

    train(f"{method}-split", split)
    train(f"{method}-copies", "-m", "loralign")
    assert Path(f"{method}-split/checkpoints/checkpoint-6/pytorch_model_fsdp_0").is_dir(), "it was split"
    ours, copies = (load_file(Path(f"{method}-{run}", "adapter_model.safetensors")) for run in ("split", "copies"))
    if method != "lora":
        shutil.rmtree(f"{method}-split/checkpoints/checkpoint-6")
        train(f"{method}-split", split, more=("--resume",))
        again = load_file(Path(f"{method}-split", "adapter_model.safetensors"))
        assert all(torch.equal(again[k], value) for k, value in ours.items())
    for k, value in ours.items():
        # a fresh state's first step makes a move of what rounding leaves of a gradient near zero
        atol = 1e-4 if method == "chain-of-lora" else 1e-5
        torch.testing.assert_close(value, copies[k], rtol=1e-4, atol=atol * float(copies[k].abs().max()))
