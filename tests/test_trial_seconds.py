"""scripts/trial_seconds.py on a CPU in a tiny world: the figures of a row, the paired test by hand, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
from trial_seconds import _row, compared, main  # noqa: E402

STUDY = ROOT / "scripts/studies/trials.yaml"


def test_the_paired_test_sees_a_shift_that_the_seeds_spread_hides() -> None:
    plain = [3.0, 2.5, 3.5, 2.8]
    found = compared("recorded", "lora", plain, [3.011, 2.509, 3.510, 2.810])
    assert found["mean"] == pytest.approx(0.01) and found["low"] == pytest.approx(
        0.01 - 3.1824 * 8.165e-4 / 2, abs=1e-6
    )
    assert "THEY DIFFER" in found["said"] and "4 seeds" in found["said"]
    assert "no difference found" in compared("recorded", "lora", plain, [3.01, 2.49, 3.51, 2.79])["said"]


def test_a_row_counts_what_all_processes_finished() -> None:
    def ran(began: float, ended: float) -> dict[str, object]:
        spent = {"total_s": ended - began, "between_s": 0.5, "step_s": 0.01, "first_s": 1.0, "peak_bytes": 2**30}
        return {**spent, "began": began, "ended": ended, "losses": [2.0, 1.0], "note": "", "replays": []}

    row = _row("both", "lora", 2, [ran(0, 10), ran(10, 22), ran(0, 11), ran(11, 24)])
    assert (row.trials, row.trial_s, row.every_s, row.loss, row.peak_gib) == (4, 11.5, 6.0, 1.0, 1.0)
    assert (row.step_ms, row.replay_ms) == (10.0, None)


SMALL = ["--shape", "tiny", "--steps", "3", "--arms", "lora", "--set", "train.batch_size=4"]


def test_the_command_alone_and_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU records nothing: paired, the same seed gives the same loss."""
    words = [str(STUDY), "--world", str(tmp_path / "world"), *SMALL]
    assert main([*words, "--modes", "plain", "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert (row["arm"], row["workers"], row["trials"], row["times_alone"]) == ("lora", 1, 1, 1.0)
    assert 0 < row["trial_s"] <= row["every_s"] and row["step_ms"] > 0 and row["loss"] > 3
    assert main([*words, "--modes", "recorded", "--paired", "2", "--json", str(tmp_path / "pairs.json")]) == 0
    (pair,) = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert pair["plain"] == pair["other"] and len(set(pair["plain"])) == 2 and pair["mean"] == 0
    assert pair["said"] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_side_by_side(tmp_path: Path) -> None:
    words = [str(STUDY), "--world", str(tmp_path / "world"), *SMALL, "--modes", "plain"]
    assert main([*words, "--workers", "2", "--repeat", "2", "--json", str(tmp_path / "rows.json")]) == 0
    alone, both = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert (alone["workers"], alone["trials"]) == (1, 2) and (both["workers"], both["trials"]) == (2, 4)
    assert both["loss"] == alone["loss"] and both["times_alone"] == pytest.approx(both["trial_s"] / alone["trial_s"])
    assert both["every_s"] < both["trial_s"]
