"""Values that no run can use are refused at the border: by factories, by the reader of YAML, by a recipe's keys."""

from __future__ import annotations

import inspect
import math
import time
from pathlib import Path
from typing import Any

import pytest

from loralign import METHODS, LoralignError, build
from loralign.carrier import patterns
from loralign.config.recipe import load
from loralign.methods.transform.adamw import adamw


def test_every_number_of_every_factory_has_bounds_also_for_python() -> None:
    """In the signature: recipe files, the schema and direct calls refuse the same values."""
    bad = (math.nan, math.inf, -math.inf, -1.0)
    checked = 0
    for factory in {f for m in METHODS.values() for f in (m.init, m.form, m.transform, m.outer, *m.rules) if f}:
        for name, parameter in inspect.signature(factory).parameters.items():
            for value in bad if type(parameter.default) in (int, float) else ():
                with pytest.raises(LoralignError, match=f"{name} must be"):
                    factory(**{name: value})
                checked += 1
    assert checked > 60


@pytest.mark.parametrize("betas", [(2.0, 3.0), (math.nan, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), "ab", (0.9, "x")])
def test_betas_are_two_numbers_below_one(betas: Any) -> None:
    with pytest.raises(LoralignError, match="betas must be 2 numbers"):
        adamw(betas)
    with pytest.raises(LoralignError, match="betas"):
        build("lora-rite", {"betas": betas})


BOMB = "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40)) + "exclude: *b39\n"
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}], k{i}: 1}}\n" for i in range(1, 40))


MISTAKES = {
    "? [a, b]\n: c\n": "line 5: a key is a list or a mapping",
    "options: {[a]: 1}\n": "line 5: a key is a list",
    "seed: !!bool x\n": "line 5: this is no bool that can be read",
    "seed: !!int ''\n": "line 5: this is no int",
    "seed: !!float ''\n": "line 5: this is no float",
    "seed: !!timestamp x\n": "line 5: this is no timestamp",
    f"seed: {'9' * 5000}\n": "line 5: this is no int",
    f"seed: {'[' * 3000}\n": "nested too deeply",
    "exclude: &a [*a]\n": "recursive",
    "exclude: !!set {x, y}\n": "`exclude` is a set",
    "alpha: .inf\n": "`alpha` must be a finite number, not inf",
    "options: {gamma: .nan}\n": "`options.gamma` must be a finite number, not nan",
    'cache: "a\\0b"\n': "`cache` holds a character that is no text",
    'cache: "\\ud800"\n': "`cache` holds a character that is no text",
    "1: 2\n": "the key 1 is no text",
    "seed: 1:30\n": "`seed` must be a whole number, not '1:30'",
    "trust_remote_code: yes\n": "`trust_remote_code` must be true or false, not 'yes'",
    "alpha: 1e-320\n": "`alpha` must be greater than or equal to 0.000001",
    "alpha: 1e308\n": "`alpha` must be less than or equal to 1000000",
    "rank: 1000000000000\n": "`rank` must be less than or equal to 1000000",
    "train: {workers: 1000000000}\n": "`train.workers` must be less than or equal to 256",
    "train: {batch_size: 1000000007, micro_batch_size: 2}\n": "`train.batch_size` must be less than",
    "train: {epochs: 1e40}\n": "`train.epochs` must be less than",
    "options: {betas: [2.0, 3.0]}\n": "`options.betas` must be less than 1, not 2.0",
    "options: {eps: -1.0}\n": "`options.eps` must be greater than 0, not -1.0",
    f"cache: {'x' * 300}\n": "`cache` is too long for a file's name: at most 200 bytes",
    "cache: ~nobody-of-this-name/x\n": "`cache` begins with ~ and a user without a home",
    "cache: ''\n": "`cache` is empty",
    f"preset: {'x' * 5000}\n": "`preset` is too long: at most 200 characters, not 5,000",
    "targets: '(['\n": "`targets` '([' is no regular expression",
    BOMB: "holds more than 20,000 values",
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_bad_value_is_one_short_sentence_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata:\n  train: t.jsonl\noutput: o\n" + text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(LoralignError) as found:
        load(path)
    assert said in str(found.value) and len(str(found.value)) < 300
    assert time.process_time() - started < 5


def test_leading_zeros_are_decimal_and_eight_is_said_0o(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {train: t.jsonl}\noutput: o\nseed: 010\nrank: 0o10\n", encoding="utf-8")
    assert (load(path).seed, load(path).rank) == (10, 8)


def test_an_expression_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(LoralignError, match="repeats a repetition"):
        patterns.check_pattern("(([a-z.0-9_]+)+)+X")
    patterns.check_pattern(r"(.*\.)*layers\.(\d+)\.(.*\.)*(q|v)_proj")
