"""Studies: values that a file must not have, and journals that are damaged."""

from __future__ import annotations

import random

from fuzz_artefacts import copied
from fuzz_world import CASE, STUDY, Input, Kind, write

STUDY_VALUES: dict[str, list[str]] = {
    "arms": ["[]", "3", "[lorra]", "[3]", "[[lora]]", "[pissa, pissa]", "[{method: pissa, lr: .inf}]",
    "[{method: pissa, name: lora}]",
             "[{method: pissa, alpha: .inf}]", "[{method: pissa, rank: 0}]", "[{method: pissa, options: {x: 1}}]",
             "[{name: a}]",
             f"[{{method: pissa, name: {'x' * 5000}}}]", '[{method: pissa, name: "a\\nb"}]',
             "[{method: pissa, name: ''}]"],
    "task": ["3", "null", "{}", "{kind: text}"],
    "task.kind": ["texts", "3", "null"],
    "task.train": ["nowhere.jsonl", "test.jsonl", "valid.jsonl", "''", "x" * 300, "/dev/zero", "3",
    "~nobody-of-this-name/x"],
    "task.test": ["train.jsonl", "valid.jsonl", "nowhere.jsonl"],
    "task.length": ["0", ".inf", "x", "-1"],
    "task.head_lr": ["0", ".inf", "x"],
    "rates.count": ["0", "16", ".inf", "x"],
    "rates.ratio": ["1", "11", ".inf", ".nan"],
    "seeds": ["1", "51", ".inf", "x"],
    "train.steps": ["0", "3000000000", ".inf", "3"],
    "train.eval_every": ["0", "3", "7"],
    "train.batch_size": ["0", "1000000007"],
    "train.micro_batch_size": ["0", "3"],
    "train.cpu_threads": ["0", "1000000"],
    "budget.minutes": ["0", ".inf", "-1"],
    "budget.trials": ["0", ".inf", "1.5"],
    "alpha": [".inf", "0", "1e308"],
    "rank": ["0", "1000000000000", ".inf"],
    "model": ["nowhere/at/all", "rows.jsonl", "''", "x" * 300],
    "output": ["''", "rows.jsonl", "x" * 250, "3"],
    "references": ["3", "yes"],
    "nonsense": ["3"],
}  # fmt: skip


def study(draw: random.Random, number: int) -> Input:
    """A study file with a value that it must not have."""
    keys = [(key, value) for key, values in STUDY_VALUES.items() for value in values]
    key, value = keys[number % len(keys)]
    also = ["--set", "references=false"] if (key, value) == ("arms", "[]") else []
    return Input(["compare", "s.yaml", *also, "--set", f"{key}={value}"])


def journal(draw: random.Random, number: int) -> Input:
    """The journal of a finished study with a line lost, doubled or changed."""
    folder = copied("study")
    file = folder / "study.journal"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    at = draw.randrange(len(lines))
    way, bad = number % 6, None
    if way == 0:
        lines, bad = lines[1:], True
    elif way == 1:
        lines.insert(at, draw.choice(["rubbish\n", "[]\n", "3\n", "{}\n", '{"op_code": "x"}\n']))
        bad = True
    elif way == 2:
        lines = [line.replace('"outcome":"{', '"outcome":"[]{') for line in lines]
        bad = True
    elif way == 3:
        lines = [line.replace('"key":"rate', '"key":"') for line in lines]
        bad = True
    elif way == 4:
        lines[at] = lines[at][: len(lines[at]) // 2] + "\n"
    else:
        whole = bytearray("".join(lines).encode())
        whole[draw.randrange(len(whole))] = draw.randrange(32, 127)
        lines = [whole.decode()]
    write(file, "".join(lines))
    write(CASE / "s.yaml", STUDY)
    return Input(["compare", "case/s.yaml", "--report"], bad)


STUDIES = (
    Kind("study", sum(map(len, STUDY_VALUES.values())), study),
    Kind("journal", 60, journal),
)
