"""`loralign suggest`: the rule branch by branch, on the findings that the package has, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loralign.cli.app import main
from loralign.cli.plan import costs, planned
from loralign.config.recipe import load, to_job
from loralign.plan.fitting import ROOM
from loralign.plan.suggest import Choice, Finding, caution, findings, first_that_fits, ranked, rate
from loralign.types import LoralignError
from tiny_trl import tokenizer
from toy import llama

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def peaks(by_rank: dict[int, float], saved: float = 0.5) -> Callable[[Choice], int]:
    return lambda c: int(GIB * by_rank[c.rank] * (saved if c.checkpointing else 1.0))


def test_the_findings_are_those_of_the_records() -> None:
    assert subprocess.run([sys.executable, "scripts/findings.py", "--check"], cwd=ROOT, check=False).returncode == 0


def test_the_findings_hold_what_chose_a_rate() -> None:
    """By hand, from the journals' trials: seed/spectral r64 ran at index +0, whose seeds 1000 and 1001 ended so."""
    both = [f for f in findings() if f.arm == "spectral r64"]
    assert [f.task for f in both] == ["text", "sft"]
    for wide in both:
        trials = json.loads((ROOT / wide.record / "results.json").read_text(encoding="utf-8"))["trials"]
        ends = [trials[f"rate/spectral r64/+0/{seed}"]["losses"][-1] for seed in (1000, 1001)]
        assert wide.validation == pytest.approx(sum(ends) / 2, abs=1e-4)
        assert wide.loss and wide.loss[0] != wide.validation


def test_rows_of_text_take_the_lowest_validation_loss_that_was_better_than_lora() -> None:
    found = findings()
    choices = ranked(found, answers=False, width=4096)
    assert [c.method for c in choices][-1] == "lora" and choices[0].method == "spectral"
    losses = [c.finding.validation or 0.0 for c in choices[:-1]]
    assert losses == sorted(losses) and len(losses) >= 3
    assert all(c.finding.kind == "better" and c.finding.sentence in c.reason for c in choices[:-1])


def test_the_newest_record_comes_first_whatever_its_losses() -> None:
    """Losses of two records are not compared: the last one in the file is the newest."""
    old = [f for f in findings() if f.task == "text" and f.kind == "better" and f.rank and f.validation is not None]
    new = [replace(f, record="records/2031-01-01-newer", validation=(f.validation or 0.0) + 1) for f in old]
    plain = [f for f in findings() if f.method == "lora"]
    choices = ranked([*plain, *old, *new], answers=False, width=4096)[:-1]
    assert [c.record for c in choices[: len(new)]] == ["records/2031-01-01-newer"] * len(new)
    assert [c.finding.arm for c in choices[: len(new)]] == [c.finding.arm for c in choices[len(new) :]]


def test_test_rows_order_nothing() -> None:
    found = findings()
    turned = [replace(f, loss=f.loss and (-f.loss[0], -f.loss[2], -f.loss[1])) for f in found]
    assert arms(turned) == arms(found)
    other = [replace(f, validation=f.validation and -f.validation) for f in found]
    assert arms(other)[:-1] == arms(found)[-2::-1] and arms(other)[-1] == "lora"


def arms(found: list[Finding] | tuple[Finding, ...]) -> list[str]:
    return [c.finding.arm for c in ranked(found, answers=False, width=4096)]


def test_a_verdict_of_no_difference_suggests_nothing() -> None:
    undecided = [replace(f, kind="no difference") for f in findings()]
    (only,) = ranked(undecided, answers=False, width=4096)
    assert only.method == "lora" and "as good here" in only.reason and "did not fit" not in only.reason


def test_a_rank_above_half_of_the_width_is_left_out() -> None:
    choices = ranked(findings(), answers=False, width=128)
    assert max(c.rank for c in choices) == 64 and "did not fit" in choices[-1].reason
    (only,) = ranked(findings(), answers=False, width=48)
    assert only.method == "lora" and "rank 32 or more" in only.reason and "did not fit" not in only.reason


def test_rows_that_repeat_get_a_caution_that_names_adamw_on_the_same_factors() -> None:
    found = findings()
    wide, *_, plain = ranked(found, answers=False, width=4096)
    said = caution(found, wide, 3)
    assert "rslora, rank 64, alpha 64" in said and f"{wide.finding.record} does not cover rows that repeat" in said
    assert caution(found, wide, 1) == caution(found, plain, 1) == ""
    for choice, known in ((plain, found), (wide, [f for f in found if f.method != "rslora"])):
        said = caution(known, choice, 3)
        assert "does not cover rows that repeat" in said and "3 times" in said and "AdamW" not in said


def test_the_rate_is_the_records_and_the_prior_is_told_where_they_are_far_apart() -> None:
    *_, plain = ranked(findings(), answers=False, width=576)
    assert (plain.rank, plain.finding.alpha) == (8, 16.0)
    lr, said = rate(plain, 576, 1.3e-3, "Schulman")
    assert (
        lr == 6e-3 and "records/2026-11-29-h200-prize/german, 300 steps. The prior says 0.0013, 4.6 times lower" in said
    )
    assert rate(plain, 576, 1.3e-2, "x")[1].count("times higher") == 1
    near, said = rate(plain, 2 * 576, 3e-3, "x")
    assert near == pytest.approx(6e-3 * 2**-0.781, rel=0.02) and "prior says" not in said
    assert "0.006 there, moved from width 576 to 1152" in said


def test_the_newest_record_comes_first_and_its_losses_order_its_own_arms() -> None:
    """Two studies' losses are of other rows: a lower one of an older study moves nothing."""
    newest = [f for f in findings() if f.record.endswith("prize/german")]
    losses = [f.validation for f in newest if f.validation is not None]
    older = [replace(f, record="records/older", arm=f"older {f.arm}", validation=min(losses) / 2) for f in newest]
    both = arms([*older, *newest])
    assert both[: len(arms(newest)) - 1] == arms(newest)[:-1] and both[len(arms(newest)) - 1].startswith("older ")
    assert arms([*newest, *older])[0].startswith("older ")


def test_a_caution_quotes_only_the_record_that_says_so() -> None:
    found = [replace(f, repeats=False) for f in findings()]
    said = caution(found, ranked(found, answers=False, width=4096)[0], 3)
    assert "does not cover rows that repeat" in said and "AdamW" not in said
    assert {f.record for f in findings() if f.repeats} == {
        f"records/2026-11-29-h200-prize/{t}" for t in ("german", "answers")
    }


def test_a_classifiers_rate_is_not_a_language_models() -> None:
    (only,) = ranked(labelled(), answers=True, width=576)
    lr, said = rate(only, 576, 1.34e-3, "Schulman")
    assert lr == 1.3e-3 and said.startswith("0.0013: the prior (Schulman); records/2026-11-26-cpu-compare found 0.003")
    assert "minilm" in said and "`classify`" in said


def labelled() -> list[Finding]:
    """What was known before a study trained on answers."""
    return [f for f in findings() if f.task != "sft"]


def test_rows_with_answers_take_what_a_study_of_answers_found_better() -> None:
    choices = ranked(findings(), answers=True, width=576)
    stateless = "spectral r64 stateless"
    assert [c.finding.arm for c in choices] == [
        "spectral r128", "spectral r64", "spectral r32", stateless, "lora r64 (s 8)", "lora",
    ]  # fmt: skip
    assert "3 seeds: better than `lora` by 0.098" in choices[1].reason
    assert rate(choices[1], 576, 1.8e-3, "ours")[0] == 1.8e-3
    assert {c.finding.record for c in choices} == {"records/2026-11-29-h200-prize/answers"}
    assert ranked(findings(), answers=True, width=64)[0].finding.arm == "spectral r32"
    (narrow,) = ranked(findings(), answers=True, width=48)
    assert narrow.method == "lora" and "rank 32 or more" in narrow.reason


def test_without_such_a_study_they_take_plain_lora_and_say_that_it_is_as_good() -> None:
    (only,) = ranked(labelled(), answers=True, width=4096)
    assert only.method == "lora" and "as good here" in only.reason and "lora-ga" in only.reason
    assert "labels" in only.reason and "on such rows" not in only.reason


def test_memory_decides_between_recomputing_a_smaller_rank_and_plain_lora() -> None:
    choices = ranked(findings(), answers=False, width=4096)
    peak = peaks({128: 10.0, 64: 8.0, 32: 6.0, 8: 2.0})
    assert first_that_fits(choices, peak, 12 * GIB)[0].rank == 128
    recomputed, needed = first_that_fits(choices, peak, 6 * GIB)
    assert (recomputed.rank, recomputed.checkpointing, needed) == (128, True, 5 * GIB)
    assert first_that_fits(choices, peak, 4.5 / ROOM * GIB - 1)[0].rank == 64
    assert first_that_fits(choices, peak, 2.3 * GIB)[0].method == "lora"
    with pytest.raises(LoralignError, match=r"nothing fits into 0.5 GiB: the least, .* takes 1.0 GiB"):
        first_that_fits(choices, peak, 0.5 * GIB)


def test_the_command_writes_a_recipe_that_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": f"b {k}"}) + "\n" for k in range(3000)))
    out = tmp_path / "sft.yaml"
    words = ["suggest", str(tmp_path / "model"), "--device", "cpu", "--memory", "4", "--length", "32"]
    assert main([*words, "--rows", str(rows), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    job = to_job(load(out, []), 64)
    assert job.recipe.name == said["recipe"]["method"] == "lora" and job.training.epochs == 2.0
    assert job.training.learning_rate == said["learning_rate"] and "repeat" in said["reasons"]["caution"]
    assert said["peak_bytes"] > 0 and "records/" in said["reasons"]["rests on"]
    assert main([*words, "--rows", str(rows)]) == 0
    told, plan = capsys.readouterr().out, planned(load(out, []), "cpu")
    assert f"`loralign plan`: {said['trainable']:,} trained numbers at 14 sites" in told
    assert said["trainable"] == plan.estimate.trainable
    assert all(line in told.splitlines() for line in costs(plan)) and len(costs(plan)) == 4
    reasons = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert max(map(len, reasons)) <= 118 and any(re.match(r"# memory: [\d.]+ GiB \([\d.]+ GB\) of", r) for r in reasons)
    assert main([*words, "--out", str(out)]) == 2 and "is there already" in capsys.readouterr().err
    assert main([*words, "--tokens", str(32 * 1600), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"]["train"]["epochs"] == 3 and said["reasons"]["length of the run"] == "epochs: 3 of 1,600 rows"
    assert main([*words, "--rows", str(rows), "--tokens", "9"]) == 2 and "leave --tokens out" in capsys.readouterr().err
    assert main([*words[:2], "--device", "tpu"]) == 2 and "choose auto, cpu or cuda" in capsys.readouterr().err
