"""The file behind a study: optuna's journal, opened, begun, and refused where it is not what we wrote."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from loralign.compare.spec import Outcome
from loralign.io.folder import check_place
from loralign.io.json_file import parsed
from loralign.types import LoralignError

JOURNAL = "study.journal"
NAME = "loralign"
_KEY = re.compile(r"(rate|seed)/.+/[-+]?\d+/-?\d+")
_OUTCOME = TypeAdapter(Outcome)


def outcome_of(text: str) -> Outcome:
    """A trial's outcome as it was written. Raises ValueError."""
    found = _OUTCOME.validate_json(text)
    if len({len(found.steps), len(found.seconds), len(found.losses)}) > 1 or not (found.losses or found.diverged):
        raise ValueError("steps, seconds and losses do not belong together")
    return found


def opened(folder: Path) -> JournalStorage:
    """The journal in a folder, which is made; half a line at its end is cut off."""
    check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / JOURNAL).resolve()
    lock = WholeLines(path)
    backend = JournalFileBackend(str(path), lock_obj=lock)
    if not _ends_whole(path):
        lock.acquire()
        lock.release()
    try:
        return JournalStorage(backend)
    except Exception as error:  # whatever optuna makes of a line that it did not write
        if isinstance(error, OSError):
            raise
        number = _broken_line(path)
        mend = ["remove that line"] if number > 1 else []
        raise LoralignError(damaged(folder / JOURNAL, f"at line {number}", *mend)) from error


def check_ours(folder: Path, tasks: str = "") -> None:
    """A study writes results and pictures into its folder: into none that holds something else. tasks: the pattern of
    its tasks' folders, where it has several."""
    check_place(folder, " in `output`")
    ours = (*folder.glob(f"{JOURNAL}*"), *(folder.glob(f"{tasks}/{JOURNAL}*") if tasks else ()))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise LoralignError(f"{folder} is not empty and holds no study: name an empty or new folder in `output`")


def damaged(path: Path, where: str, mend: str = "put back a copy of the file") -> str:
    """The sentence about a journal that nobody of us wrote so."""
    return f"{path.name} in {path.parent} is damaged {where}: {mend}, or choose another `output` folder"


def wrong_in(t: FrozenTrial) -> str:
    """What of a trial's attributes is of another form than `Claim` writes, or ""."""
    attrs = t.user_attrs
    bare = not attrs and t.state != TrialState.COMPLETE  # nothing is known of it
    if not _KEY.fullmatch(str(attrs.get("key", "rate/a/0/0" if bare else ""))):
        return "key"
    if not _are(attrs.get("owner", ["", 1, 1.0]), str, int, float):
        return "owner"
    if not _are(attrs.get("beat", [1.0, 1.0, 1]), float, float, int):
        return "beat"
    if not _are(attrs.get("failed", ["", "", False]), str, str, bool):
        return "failure"
    if "outcome" in attrs and (t.datetime_complete is None and t.state == TrialState.COMPLETE):
        return "end"
    return ""


def _are(values: Any, *kinds: type) -> bool:
    if not isinstance(values, list) or len(values) != len(kinds):
        return False
    return all(isinstance(v, (int, float) if kind is float else kind) for v, kind in zip(values, kinds, strict=True))


class WholeLines:
    """The lock of a journal. Who takes it removes the half line that a stopped write (a kill, a full disk) left behind:
    what any worker appends next would else become a part of it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, JournalFileOpenLock(str(path))

    def acquire(self) -> bool:
        taken = self._lock.acquire()
        try:
            if not _ends_whole(self._path):
                whole = self._path.read_bytes()
                with self._path.open("r+b") as f:
                    f.truncate(whole.rfind(b"\n") + 1)
        except BaseException:
            self._lock.release()
            raise
        return taken

    def release(self) -> None:
        self._lock.release()


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as f:
        if not f.seek(0, os.SEEK_END):
            return True
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def _broken_line(path: Path) -> int:
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            parsed(line)["op_code"]
        except (ValueError, KeyError, TypeError):
            return number
    return len(lines)


def study_id(journal: JournalStorage, path: Path) -> int:
    """The number of the one study in the journal, begun where the journal is empty."""
    written = path.stat().st_size > 0  # before looking: what another worker writes meanwhile is its first line, too
    with suppress(KeyError):
        return int(journal.get_study_id_from_name(NAME))
    if written:
        raise LoralignError(damaged(path, "at line 1: the study's beginning is missing"))
    with suppress(OptunaError):  # another worker was quicker
        return int(journal.create_new_study([optuna.study.StudyDirection.MINIMIZE], NAME))
    return int(journal.get_study_id_from_name(NAME))
