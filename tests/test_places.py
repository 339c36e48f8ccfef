"""Places that nothing can be written to, and disks that are full: found before the work, said with the mend, no half
file left behind."""

from __future__ import annotations

import errno
import os
import resource
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
from loralign.io.folder import check_place
from loralign.io.heatmap import heat_map
from loralign.io.lock import lock_of, locked
from loralign.io.matrix import accuracy_picture
from loralign.io.provenance import write_text
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


def test_a_lock_holds_on_a_full_disk_and_goes_with_its_owner(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no byte can be written
    try:
        with locked(tmp_path / "out"):
            assert lock_of(tmp_path / "out").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


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
