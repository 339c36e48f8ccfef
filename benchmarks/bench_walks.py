"""What goes through all modules of an adapted model at every step of a Trainer: the host's time, on the CPU.

    python benchmarks/bench_walks.py            30 layers, 210 adapted matrices, tiny tensors

mode, gradients: `model.train()` and `model.zero_grad()`, as the Trainer calls them, beside those of a settled model
(train/settled.py). optimizer: a step of plain `lora`'s, arithmetic included. Medians of CPU time, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from bench_models import fresh_model

from loralign import Recipe, adapt, build, optimizer
from loralign.train.settled import Settled

REPEATS = 40


def milliseconds(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    spent = []
    for _ in range(REPEATS):
        before()
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return 1e3 * median(spent)


def main() -> None:
    torch.set_num_threads(1)
    recipe = build("lora", r=4)
    assert isinstance(recipe, Recipe)
    model = adapt(fresh_model("host", "cpu").float(), recipe).train()
    opt, settled = optimizer(model, recipe, 1e-4), Settled(model)
    ids = torch.arange(8)[None]

    def backward() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    print(f"{len(settled.parts)} modules   mode, ms   gradients, ms")
    for name, walked in (("model", model), ("settled", settled)):
        print(f"{name:14}{milliseconds(walked.train):9.2f}{milliseconds(walked.zero_grad, backward):16.2f}", flush=True)
    backward()
    print(f"optimizer, a step: {milliseconds(opt.step):.2f} ms")


if __name__ == "__main__":
    main()
