"""scripts/trial_seconds.py on a CPU in a tiny world: the figures of a row, the paired test by hand, the command."""

from __future__ import annotations

import json
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from telling import killed, waiting

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
import trial_processes  # noqa: E402
from trial_pairs import compared  # noqa: E402
from trial_processes import side_by_side  # noqa: E402
from trial_seconds import main, row  # noqa: E402

STUDY = ROOT / "scripts/studies/trials.yaml"


def test_the_paired_test_sees_a_shift_that_the_seeds_spread_hides() -> None:
    plain = [3.0, 2.5, 3.5, 2.8]
    found = compared("recorded", "lora", plain, [3.011, 2.509, 3.510, 2.810])
    assert found["mean"] == pytest.approx(0.01) and found["low"] == pytest.approx(
        0.01 - 3.1824 * 8.165e-4 / 2, abs=1e-6
    )
    assert "THEY DIFFER" in found["said"] and "4 seeds" in found["said"]
    assert "no difference found" in compared("recorded", "lora", plain, [3.01, 2.49, 3.51, 2.79])["said"]


def test_a_row_sets_whole_trials_beside_those_of_a_process_alone() -> None:
    def ran(total: float) -> dict[str, object]:
        spent = {"total_s": total, "between_s": 0.5, "step_s": 0.01, "peak_bytes": 2**30}
        return {**spent, "losses": [2.0, 1.0], "note": "", "replays": [0.001, 0.003], "graphs": 1}

    made = row("both", "lora", 2, [ran(12), ran(10), ran(14), ran(11)], 3.0, [ran(5), ran(5)])
    assert (made.trials, made.trial_s, made.times_alone, made.first_s) == (4, 11.5, 2.3, 3.0)
    assert (made.loss, made.peak_gib, made.step_ms, made.replay_ms, made.graphs) == (1.0, 1.0, 10.0, 2.0, 4)


SMALL = ["--shape", "tiny", "--steps", "6", "--set", "train.batch_size=4", "--arms", "lora"]


def test_the_command_alone_and_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU records nothing: paired, the same seed gives the same loss."""
    words = [str(STUDY), "--world", str(tmp_path / "world"), *SMALL]
    assert main([*words, "--modes", "plain", "--json", str(tmp_path / "rows.json")]) == 0
    (made,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert (made["arm"], made["workers"], made["trials"], made["times_alone"]) == ("lora", 1, 1, 1.0)
    assert made["trial_s"] > 0 and made["first_s"] > 0 and made["step_ms"] > 0 and made["loss"] > 3
    assert main([*words, "--modes", "recorded", "--paired", "2", "--json", str(tmp_path / "pairs.json")]) == 0
    (pair,) = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert pair["plain"] == pair["other"] and len(set(pair["plain"])) == 2 and pair["mean"] == 0
    said = capsys.readouterr().out
    assert (
        pair["said"] in said
        and "lora, plain, a whole trial, 1 at once: " in said
        and "lora, plain, seed 1: loss " in said
    )


def test_what_is_known_stays_where_a_later_arm_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure is printed and written as soon as it is known: a command that is cut off leaves what it found."""
    words = [str(STUDY), "--world", str(tmp_path / "world"), *SMALL, "nobody", "--modes", "plain"]
    with pytest.raises(StopIteration):
        main([*words, "--json", str(tmp_path / "rows.json")])
    (made,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out.splitlines()
    assert made["arm"] == "lora" and "lora, plain: loaded in" in said[0] and "trial_s=" in said[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_with_a_process_for_each_arm(tmp_path: Path) -> None:
    small = [word if word != "lora" else "full" for word in SMALL]
    words = [str(STUDY), "--world", str(tmp_path / "world"), *small, "lora", "--modes", "plain"]
    assert main([*words, "--together", "--repeat", "2", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [(r["arm"], r["workers"], r["trials"]) for r in found] == [
        ("full", 1, 2),
        ("lora", 1, 2),
        ("full", 2, 2),
        ("lora", 2, 2),
    ]
    assert [r["loss"] for r in found[:2]] == [r["loss"] for r in found[2:]]
    assert found[3]["times_alone"] == pytest.approx(found[3]["trial_s"] / found[1]["trial_s"])


def test_a_process_that_is_killed_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_processes, "LOOK_S", 0.5)
    said: list[object] = []
    with pytest.raises(SystemExit, match=r"1 of 2 processes were killed \(signal 9\)"):
        side_by_side(get_context("spawn"), [(killed, ()), (waiting, ())], said.append)
    assert said == ["begun"]
