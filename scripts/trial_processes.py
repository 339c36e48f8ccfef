"""Processes side by side that tell what they find as they find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

LOOK_S = 5.0
"""Seconds of silence after which somebody looks whether all still live."""
Tell = Callable[[Any], None]
"""Takes a figure (a dictionary) or a line of text."""


def side_by_side(context: Any, work: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], tell: Tell) -> None:
    """Processes that tell this one what they find, as they find it."""
    queue = context.Queue()
    made = [context.Process(target=_telling, args=(target, args, queue)) for target, args in work]
    for process in made:
        process.start()
    failed, left = list[str](), len(made)
    while left:
        try:
            said = queue.get(timeout=LOOK_S)
        except Empty:
            _check_alive(made)
            continue
        left -= said is None
        if isinstance(said, BaseException):
            failed.append(f"{type(said).__name__}: {said}")
        elif said is not None:
            tell(said)
    for process in made:
        process.join()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(made)} processes failed: {failed[0]}")


def _check_alive(made: Sequence[Any]) -> None:
    """Raise where one was killed, which tells nothing; the others may be waiting for it."""
    if killed := [process.exitcode for process in made if (process.exitcode or 0) < 0]:
        for process in made:
            process.kill()
        raise SystemExit(f"{len(killed)} of {len(made)} processes were killed (signal {-killed[0]}): out of memory?")


def _telling(target: Callable[..., None], args: tuple[Any, ...], queue: Any) -> None:
    try:
        target(*args, queue.put)
    except BaseException as error:
        queue.put(RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    finally:
        queue.put(None)
