"""Where a GPU rests in the steps of a real trainer: torch's profiler over five steps of bench_train.py's.

    python benchmarks/profile_train.py 1b > profile_1b.txt           a kind of bench_train.py may follow: 1b peft

span: of a step on the device; busy: some kernel ran; gaps: none did. Then the longest gaps by the kernels around them,
the kernels by their time, and what the host spent its own time on, each a step. The profiler makes the host slower.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import bench_train
import torch
from bench_models import SHAPES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

FIRST, STEPS = 12, 5
SHORT = 50.0
"""Gaps below so many microseconds are only summed."""


class Watch(TrainerCallback):
    """A profiler over some steps."""

    def __init__(self, cuda: bool) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self.cuda = cuda

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in (FIRST, FIRST + STEPS):
            return
        if self.cuda:
            torch.cuda.synchronize()
        if state.global_step == FIRST:
            self.profiler.start()
        else:
            self.profiler.stop()


def gaps(kernels: Sequence[Any]) -> Iterator[tuple[float, str, str]]:
    """(microseconds, kernel before, kernel after) of the times when none ran."""
    end, before = kernels[0].time_range.start, ""
    for kernel in kernels:
        if kernel.time_range.start > end:
            yield kernel.time_range.start - end, before, kernel.name
        if kernel.time_range.end > end:
            end, before = kernel.time_range.end, kernel.name


def device_table(kernels: Sequence[Any]) -> Iterator[str]:
    rests = list(gaps(kernels))
    span = max(k.time_range.end for k in kernels) - kernels[0].time_range.start
    idle = sum(length for length, _, _ in rests)
    per_step = 1e3 * STEPS
    yield f"span {span / per_step:.2f} ms a step, busy {(span - idle) / per_step:.2f}, gaps {idle / per_step:.2f}"
    long, count = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for length, *names in rests:
        if length > SHORT:
            key = names[0][:60], names[1][:60]
            long[key] += length
            count[key] += 1
    for key, length in long.most_common(14):
        yield f"gap {length / per_step:7.3f} ms  x{count[key] / STEPS:5.1f}  {key[0]} -> {key[1]}"
    took, calls = Counter[str](), Counter(k.name[:90] for k in kernels)
    for kernel in kernels:
        took[kernel.name[:90]] += kernel.time_range.elapsed_us()
    for name, length in took.most_common(28):
        yield f"gpu {length / per_step:7.3f} ms  x{calls[name] / STEPS:6.1f}  {name}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("kind", choices=(*bench_train.KINDS, *bench_train.MORE), nargs="?", default="loralign")
    asked = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    args = argparse.Namespace(warm=FIRST, steps=STEPS + 1, device="cuda" if cuda else "cpu", rows="equal")
    args.checkpointing, watch = "off", Watch(cuda)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench_train.trainer_of(asked.kind, asked.shape, args, folder)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    kernels = [e for e in watch.profiler.events() or () if e.device_type == DeviceType.CUDA]
    for line in device_table(sorted(kernels, key=lambda e: e.time_range.start)) if kernels else ("no GPU was used",):
        print(line)
    for spent in sorted(watch.profiler.key_averages(), key=lambda a: -a.self_cpu_time_total)[:22]:
        print(
            f"host {spent.self_cpu_time_total / (1e3 * STEPS):7.3f} ms  x{spent.count / STEPS:6.1f}  {spent.key[:70]}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
