"""`subprocess.run` for Python commands whose libraries are imported already: a process that forks for every call.

Each call is a process of its own (exit code, signals, files, environment) that starts in 0.1 s instead of 6: the one it
is forked from has imported torch, transformers, peft and what they load late, and nothing of loralign. For tests of
what a command does; those of how a process starts start one themselves.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Lock
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import pytest

ROOM = "LORALIGN_WARM"
"""In the environment: a folder that the processes of one test run share."""
CLEAN = ("torch", "transformers", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama")
WHOLE = (*CLEAN, "transformers.models.bert.modeling_bert", "transformers.trainer", "accelerate", "datasets", "trl")
LATE = ("trl.trainer.sft_trainer", "optuna", "scipy.special", "matplotlib.figure", "matplotlib.backends.backend_agg")


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float = 300,
    check: bool = False,
    capture_output: bool = True,
    text: bool = True,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `[sys.executable, "-I" | "-P", script | "-m", module | "-c", code, …]`; output is text."""
    assert capture_output and text
    (done,) = _run([command], env, cwd, timeout)
    if check:
        done.check_returncode()
    return done


CALL = "import pickle, sys; sys.path[:0] = sys.argv[2:]; f, args = pickle.loads(bytes.fromhex(sys.argv[1])); f(*args)"


def together(function: Callable[..., None], *args: Any, count: int) -> None:
    """function(k, *args) in `count` processes at once, k = 0, 1, …; fails with what the first broken one said."""
    calls = [pickle.dumps((function, (k, *args))).hex() for k in range(count)]
    places = [str(folder) for folder in Path(__file__).parents[:2]]  # pytest names a module `test_x` or `tests.test_x`
    done = _run([[sys.executable, "-P", "-c", CALL, call, *places] for call in calls], None, None, 240)
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]


def _run(
    commands: Sequence[Sequence[str]], env: Mapping[str, str] | None, cwd: Path | str | None, timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """All at once."""
    assert all(command[0] == sys.executable for command in commands)
    isolated = commands[0][1] == "-I"  # has a server of its own
    asked: dict[str, Any] = {"cwd": os.fspath(cwd or Path.cwd()), "timeout": int(timeout)}
    asked["env"] = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as room:
        rooms = [Path(room, str(k)) for k in range(len(commands))]
        for each in rooms:
            each.mkdir()
        asked["calls"] = [[list(c[1 + isolated :]), str(each)] for c, each in zip(commands, rooms, strict=True)]
        line, turn = server(isolated)
        with turn:
            line.write(json.dumps(asked) + "\n")
            line.flush()
            codes = json.loads(line.readline())
        said = [[(each / name).read_text(encoding="utf-8") for name in ("out", "err")] for each in rooms]
    return [subprocess.CompletedProcess(list(c), n, *s) for c, n, s in zip(commands, codes, said, strict=True)]


def verification(patch: pytest.MonkeyPatch) -> None:
    """Exports are verified by clean processes of this kind."""
    patch.setattr("loralign.io.verify.subprocess", SimpleNamespace(run=run))


@functools.cache
def server(isolated: bool) -> tuple[TextIO, Lock]:
    """A line to the process, and whose turn it is: those that are forked after this call use the same line.

    The first of a test run's processes that asks starts it, the others find it; it ends when all lines are closed.
    """
    room = Path(os.environ.get(ROOM) or tempfile.mkdtemp())
    place, line = room / ("clean" if isolated else "whole"), socket.socket(socket.AF_UNIX)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _start(place, isolated)
        line.connect(str(place))
    talk = line.makefile("rw", encoding="utf-8")
    atexit.register(talk.close)
    return talk, get_context("fork").Lock()


def _start(place: Path, isolated: bool) -> None:
    modules = CLEAN if isolated else (*WHOLE, *LATE)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.set_inheritable(True)
        command = [sys.executable, *(["-I"] if isolated else []), __file__, str(listener.fileno()), *modules]
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
        os.posix_spawn(sys.executable, command, os.environ, file_actions=nowhere)


def _serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """A process for every line."""
    sys.path.pop(0) if sys.path[0] == os.path.dirname(__file__) else None
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is shared stays shared
    gc.enable()
    listener.settimeout(1.0)
    while True:
        try:
            line, _ = listener.accept()
        except TimeoutError:
            if not _some_are_left():
                return
            continue
        if not os.fork():
            listener.close()
            _answer(line)
            os._exit(0)
        line.close()


def _some_are_left() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _answer(line: socket.socket) -> None:
    """A line of JSON for each request, answered by the exit codes."""
    with line.makefile("rw", encoding="utf-8") as talk:
        for said in talk:
            asked = json.loads(said)
            started = [_fork(argv, room, asked) for argv, room in asked["calls"]]
            talk.write(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]) + "\n")
            talk.flush()


def _fork(argv: list[str], room: str, asked: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = _become(argv, room, asked)
    atexit._run_exitfuncs()  # and no more: an interpreter that takes itself apart copies all it shares, 2 s
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(argv: list[str], room: str, asked: Mapping[str, Any]) -> int:
    """In the fork: the command that was asked for, to its end."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(room, name), os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(asked["timeout"])
    try:
        _execute(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _execute(argv: list[str]) -> None:
    safe = argv[0] == "-P"  # nothing is imported from the working folder
    argv = argv[safe:]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[:0] = [] if safe else [os.getcwd()]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path[:0] = [] if safe else [""]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
