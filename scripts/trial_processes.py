"""Processes side by side that tell what they find as they find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        said = queue.get()
        left -= said is None
        if isinstance(said, BaseException):
            failed.append(f"{type(said).__name__}: {said}")
        elif said is not None:
            tell(said)
    for process in made:
        process.join()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(made)} processes failed: {failed[0]}")


def _telling(target: Callable[..., None], args: tuple[Any, ...], queue: Any) -> None:
    try:
        target(*args, queue.put)
    except BaseException as error:
        queue.put(RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    finally:
        queue.put(None)
