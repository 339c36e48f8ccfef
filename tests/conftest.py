"""What every test finds: the threads as they were, no wait for a disk, no garbage looked for among what stays."""

import functools
import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A model leaves thousands of objects behind that are no garbage. The processes of a run share those of warm.py."""
    gc.set_threshold(10_000, 20, 20)
    if not hasattr(config, "workerinput"):
        room = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["LORALIGN_WARM"] = room.name
        config.add_cleanup(room.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Libraries and tests stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """What is killed here are processes; only a power cut loses what the system has. A file that is not open fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: os.fstat(fd) and None)
        yield


@pytest.fixture(autouse=True, scope="session")
def templates_are_compiled_once() -> Iterator[None]:
    """PEFT compiles the template of its model card in every save."""
    from jinja2 import Environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", functools.lru_cache(16)(Environment.compile))
        yield


@pytest.fixture(autouse=True, scope="session")
def guards_are_not_timed() -> Iterator[None]:
    """torch's dynamo empties the processor's caches after every graph, to log how long its guards take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def seeds_keep_no_stacks() -> Iterator[None]:
    """torch keeps where every seed was set, for three kinds of devices that may be asked for later."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.mtia, torch.xpu):
            patch.setattr(device, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture(autouse=True, scope="module")
def same_threads() -> Iterator[None]:
    """A study that runs in this process sets its threads, and sums depend on them."""
    import torch  # here: the process that hands out the tests needs no torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """accelerate collects garbage in every `train()`: 0.4 s for the objects of torch, transformers and TRL, which
    stay."""
    gc.collect()
    gc.freeze()
