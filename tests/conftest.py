"""What a file of tests finds: the threads as they were, and a garbage collector that passes over what is imported."""

import gc
from collections.abc import Iterator

import pytest


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
