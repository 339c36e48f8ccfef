"""Places that nothing can be written to, and disks that are full: found before the work, said with the mend, no half
file left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from cli_world import assert_one_sentence, bytes_of, run, world_in
from loralign import LoralignError
from loralign.compare.journal import JOURNAL, check_ours
from loralign.config.study_file import parse_study
from loralign.io.folder import check_place, fresh_folder
from loralign.io.heatmap import heat_map
from loralign.io.lock import lock_of, locked
from loralign.io.matrix import accuracy_picture
from loralign.io.provenance import remove_left, write_text
from loralign.train.checkpoint import NOTE, STATE, Note, numbered, read_note, remove, write_checkpoint
from loralign.types import WorkFailed

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("places")) as root:
        (root / "file").write_text("mine", encoding="utf-8")
        (root / "link").symlink_to(root / "nowhere" / "else")
        (root / "loop").symlink_to(root / "loop")
        (root / "linked").symlink_to(root / "base")
        yield root


BAD_PLACES = {
    "file": r"file is a file: name a folder",
    "file/out": r"cannot write file/out: \S*file is no folder; name another folder",
    "link": r"cannot write link: link is a link to nothing; remove it, or name another folder",
    "link/out": r"cannot write link/out: \S*link is a link to nothing; remove it, or name another folder",
    "loop/out": r"cannot write loop/out: \S*loop is a link to nothing; remove it, or name another folder",
}


@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_place_where_no_folder_can_be(place: str) -> None:
    with pytest.raises(LoralignError, match=f"^{BAD_PLACES[place]}$"):
        check_place(Path(place))
    with pytest.raises(LoralignError, match=f"^{BAD_PLACES[place]} in `output`$"):
        check_place(Path(place), " in `output`")


def test_a_place_where_a_folder_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("new", "new/and/deeper", "base", "linked", "linked/new"):
        check_place(Path(place))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    with pytest.raises(LoralignError, match=r"^cannot write new: \S+ is not writable; name another folder$"):
        check_place(Path("new"))


@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_is_there_may_be_a_link_or_a_disk_of_its_own(
    filled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of a container, whose parent is another file system. A killed export has left something in it."""
    real, out, rename = tmp_path / "disk" / "real", tmp_path / "out", os.replace
    (real / ".out.999999999.partial").mkdir(parents=True)
    out.symlink_to(real)
    if filled:
        (real / "log.jsonl").touch()

    def within(source: Path, target: Path) -> None:
        if real not in Path(source).resolve().parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "replace", within)
    with fresh_folder(out, overwrite=filled) as folder:
        (folder / "verify").mkdir()
        (folder / "verify" / "probes.safetensors").touch()
        (folder / "adapter_config.json").touch()
    found = {p.relative_to(real).as_posix() for p in real.rglob("*")}
    assert found == {"verify", "verify/probes.safetensors", "adapter_config.json", *(["log.jsonl"] * filled)}
    assert out.is_symlink() and {p.name for p in tmp_path.iterdir()} == {"out", "disk"}


def test_what_an_export_replaces_and_in_which_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a folder an adapter or a model comes last; of an earlier export nothing stays, of others' all."""
    out, rename = tmp_path / "out", os.replace
    order: list[str] = []
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(Path(b).name) or rename(a, b))

    def write(*names: str) -> None:
        with fresh_folder(out, overwrite=True) as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).touch()

    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"theirs")
    write("config.json", "model.safetensors")
    assert {p.name for p in out.iterdir()} == {"adapter_model.safetensors", "config.json", "model.safetensors"}
    order.clear()
    write(
        "verify/probes.safetensors", "tokenizer.json", "adapter_config.json", "README.md", "adapter_model.safetensors"
    )
    assert order[-2:] == ["adapter_model.safetensors", "adapter_config.json"] and len(order) == 5
    order.clear()
    write("verify/probes.safetensors", "model.safetensors", "config.json", "adapter.gguf")
    assert order[-2:] == ["adapter.gguf", "config.json"]
    left = {"verify", "tokenizer.json", "README.md", "model.safetensors", "config.json", "adapter.gguf"}
    assert {p.name for p in out.iterdir()} == left


def test_what_a_killed_export_left_is_cleared_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    running, killed, other = ".out.1.partial", ".out.999999999.partial", ".outer.999999999.partial"
    for name in (running, killed, other):
        (tmp_path / name).mkdir()
    with fresh_folder(tmp_path / "out", overwrite=False):
        assert {p.name for p in tmp_path.iterdir() if p.name.endswith("partial")} == {
            running,
            other,
            f".out.{os.getpid()}.partial",
        }
    assert {p.name for p in tmp_path.iterdir()} == {running, other, "out"}


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "train": lambda place: ["train", "r.yaml", "--set", f"output={place}", "--set", "model=none"],
    "init": lambda place: ["init", "r.yaml", "--set", f"output={place}", "--set", "model=none"],
    "export": lambda place: ["export", "none", "--out", place],
    "suggest": lambda place: ["suggest", "none", "--out", f"{place}/r.yaml"],
    "subspace": lambda place: ["subspace", "extract", "none", "nor", "--out", f"{place}/basis.safetensors"],
}


@pytest.mark.parametrize("place", ["file/out", "link"])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_said_before_anything_is_read(command: str, place: str, world: Path) -> None:
    before = bytes_of(world)
    done = run(*COMMANDS[command](place))
    assert done.code == 2
    assert "name another folder" in assert_one_sentence(done)
    assert bytes_of(world) == before and (world / "link").is_symlink()


def test_a_study_of_several_tasks_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    for place in ("file", "link"):
        with pytest.raises(LoralignError, match="in `output`"):
            check_ours(Path(place))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LoralignError, match="is not empty and holds no study: name an empty or new folder in `output`"):
        check_ours(tmp_path, "*")
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / JOURNAL).touch()
    check_ours(tmp_path, "*")
    with pytest.raises(LoralignError, match="holds no study"):
        check_ours(tmp_path)


@pytest.mark.parametrize("name", ["..", ".", ".git", "report.html", "overall.csv"])
def test_a_task_is_not_called_as_what_lies_beside_it(name: str) -> None:
    rows = {"kind": "text", "train": "a", "valid": "b", "test": "c"}
    with pytest.raises(LoralignError, match="must not begin with a dot, nor be one of"):
        parse_study({"model": "m", "arms": ["pissa"], "output": "o", "tasks": [{"name": name, **rows}]})


# ---------------------------------------------------------------------------------------------------------- full disks


def test_a_write_that_fails_names_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as found:
        write_text(tmp_path / "taken", "text")
    assert found.value.filename == str(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync, rename = tmp_path / "run.json", os.fsync, os.replace
    path.write_text("old", encoding="utf-8")
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("to disk", os.fstat(fd).st_size)) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", path.read_text())) or rename(a, b))
    write_text(path, "the new text")
    assert calls == [("to disk", 12), ("rename", "old")]
    assert path.read_text(encoding="utf-8") == "the new text" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_complete_once_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its note comes last, and names neither itself nor what was left half-written."""
    parts = {"model.safetensors": b"1", "inner/optimizer.pt": b"22", STATE: b""}
    for name, content in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for left in (".loralign.json.7.tmp", NOTE):
        (tmp_path / left).write_bytes(b"of an earlier attempt")
    sync, rename = os.fsync, os.replace
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino) or sync(fd))

    def renamed(source: Path, target: Path) -> None:
        assert target.name in (STATE, NOTE)
        all_of_it = [tmp_path, *(tmp_path / name for name in parts)]
        assert target.name == STATE or {p.stat().st_ino for p in all_of_it} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    write_checkpoint(tmp_path, Note("lora", 7, {}), {"rule|0|mean": torch.ones(2)})
    note = read_note(tmp_path)
    assert note.step == 7 and set(note.parts) == set(parts)
    assert note.parts["model.safetensors"] == (1, hashlib.sha256(b"1").hexdigest())


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").touch()
    write_checkpoint(folder, Note("lora", 3, {}), {})
    with monkeypatch.context() as patch:  # as a process that is killed before the first file is gone
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove(folder)
    assert numbered(tmp_path) == [] and [p.name for p in remove_left(tmp_path)] == [".checkpoint-3.removed"]


def test_a_lock_holds_on_a_full_disk_and_goes_with_its_owner(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no byte can be written
    try:
        with locked(tmp_path / "out"):
            assert lock_of(tmp_path / "out").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_parent_takes_no_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a volume: the folder may be written into, what is above it not."""
    opened = Path.open

    def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with locked(tmp_path / "new"):
        assert not caplog.messages  # nothing can be written there either, which is said where it is
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        (said,) = caplog.messages
    assert said.startswith("no lock can be had beside out ([Errno 13] Permission denied): see to it that no other run")


def test_a_report_of_a_start_that_cannot_be_written_costs_no_second_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["init", "r.yaml", "--set", "output=start", "--report", "--beside", "pissa"]

    def full(*given: Any, **more: Any) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("loralign.cli.report.heat_map", full)
        failed = run(*words)
    assert failed.code == 1 and "free some space, then try again" in assert_one_sentence(failed)
    assert not Path("start").exists()
    done = run(*words)
    assert done.code == 0, done.err
    assert Path("start/start/shares.png").exists()


def test_a_gguf_file_that_was_cut_off_is_a_full_disk(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from loralign.io.gguf_adapter import _read_back

    path, values = tmp_path / "adapter.gguf", torch.arange(512.0).reshape(16, 32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("a", values.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    _read_back(gguf, path, {"a": values})
    whole = path.read_bytes()
    for share in (0.0, 0.02, 0.05, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(WorkFailed, match=r"adapter.gguf was not written whole: free some space, then try again"):
            _read_back(gguf, path, {"a": values})


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_title_is_as_narrow_as_its_picture(tmp_path: Path) -> None:
    title = "dynamic-rank-lora: 1728 → 864 slots live, settled at step 80 of 100, 12 modules are left without a slot"
    heat_map({"step 0": {"layers.0.q": 1.0}}, tmp_path / "map.png", title=title, scale="rank", most=1.0)
    accuracy_picture({"in sequence": [[0.5]]}, ["x"], tmp_path / "accuracy.png", title=title)
    for path in tmp_path.iterdir():
        edges = imread(path)[:, [0, -1]]
        assert (edges == edges[0, 0]).all(), "a letter is cut off"


def test_pictures_show_names_as_they_are_and_appear_whole(tmp_path: Path) -> None:
    name = "a$^{$b"  # no mathematics
    accuracy_picture({name: [[0.5], [0.5, 0.6]]}, [name, "x"], tmp_path / "accuracy.png", title=name)
    heat_map({name: {f"layers.0.{name}": 1.0}}, tmp_path / "map.png", title=name, scale="rank", most=1.0)
    assert {p.name for p in tmp_path.iterdir()} == {"accuracy.png", "map.png"}
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        heat_map({"a": {"layers.0.q": 1.0}}, tmp_path / "taken", title="t", scale="rank", most=1.0)
    assert {p.name for p in tmp_path.iterdir()} == {"accuracy.png", "map.png", "taken"}
