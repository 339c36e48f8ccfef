"""The statistics by examples that were worked out by hand; what they say of noise stands in test_study_honesty.py."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest

from loralign import LoralignError
from loralign.compare.rates import Rate, Sensitivity, check_equal_trials, choose_rate, edge, sensitivity
from loralign.compare.report import as_csv, plain, row, sentences, terminal_tables
from loralign.compare.statistics import (
    RATE_CHOICE,
    Curve,
    Interval,
    Reach,
    compare,
    differences,
    gap_closed,
    holm,
    interval,
    median_reach,
    paired_tests,
    reach,
    to_target,
)
from loralign.compare.verdict import summarise

INF = math.inf


def curve(arm: str, seed: int, *losses: float, **changes: Any) -> Curve:
    """Evaluated at steps 10, 20, …; 0.5 s a step after 2 s."""
    steps = tuple(10 * (i + 1) for i in range(len(losses)))
    seconds = tuple(2 + 0.5 * s for s in steps)
    return Curve(arm, 1e-3, seed, steps, seconds, losses, losses[-1], min(losses), **changes)


# ------------------------------------------------------------------------------------------------- intervals and tests


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])  # sd 1, t of 2 degrees of freedom at 97.5 %: 4.3027
    assert found.mean == 2.0 and found.high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert 2.0 - found.low == pytest.approx(found.high - 2.0) and 0.0 in found and 5.0 not in found
    assert interval([1.5]) == Interval(1.5, -INF, INF, 1)
    assert math.isnan(interval([]).mean) and interval([]).n == 0


def test_paired_test_by_hand() -> None:
    """d = 0.1, 0.2, 0.3: mean 0.2, sd 0.1; Student's t of 2 degrees of freedom has p = 1 − t/√(2 + t²)."""
    ((found, p),) = paired_tests([[0.1, 0.2, 0.3]])
    error = 0.1 * math.sqrt(1 / 3 + RATE_CHOICE)
    t = 0.2 / error
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.high - found.mean == pytest.approx(4.30265 * error, rel=1e-5)


def test_paired_tests_borrow_the_usual_spread_and_freedom() -> None:
    """Three arms of 3 seeds: 6 / (1 + 2/4) = 4 degrees of freedom; the quiet arm is judged by the median sd, 0.1."""
    quiet, usual, loud = [0.2, 0.2, 0.2], [0.1, 0.2, 0.3], [0.0, 0.2, 0.4]
    found = paired_tests([quiet, usual, loud])
    widths = [i.high - i.mean for i, _ in found]
    assert widths[0] == pytest.approx(widths[1]) == pytest.approx(widths[2] / 2)
    assert widths[1] == pytest.approx(2.77645 * 0.1 * math.sqrt(1 / 3 + RATE_CHOICE), rel=1e-5)
    assert paired_tests([[0.0, 0.0]])[0][1] == 1.0 and paired_tests([[0.1, 0.1]])[0][1] == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


# ------------------------------------------------------------------------------------------------------------- targets


def test_reach_is_straight_between_evaluations() -> None:
    assert reach([10, 20, 30], [4.0, 3.0, 2.0], 2.5) == Reach(25.0, True)
    assert reach([10, 20, 30], [4.0, 3.0, 2.0], 3.0) == Reach(20.0, True)
    assert reach([10, 20, 30], [2.0, 3.0, 2.0], 2.5) == Reach(10.0, True)  # there from the start
    assert reach([10, 20, 30], [4.0, 3.0, 2.0], 1.9) == Reach(30.0, False)
    assert reach([10, 20], [INF, 3.0], 3.5) == Reach(20.0, True)
    assert str(Reach(30.0, False)) == "> 30" and str(Reach(25.4, True)) == "25"


def test_median_of_censored_times() -> None:
    def times(*values: float) -> list[Reach]:
        return [Reach(abs(v), v > 0) for v in values]

    assert median_reach(times(30, 10, 20)) == Reach(20.0, True)
    assert median_reach(times(10, 20, -30)) == Reach(20.0, True)  # negative: not reached by then
    assert median_reach(times(10, -30, -30)) == Reach(30.0, False)
    assert median_reach(times(10, 20, 30, 40)) == Reach(25.0, True)
    assert median_reach(times(10, 20, -30, -30)) == Reach(25.0, False)
    assert median_reach(times(-5, 10, 20, 30)) == Reach(20.0, True)  # Kaplan–Meier: 1, ⅔, ⅓ after 20
    assert median_reach([]) == Reach(0.0, False)


def test_times_to_a_target_count_initialisation_and_divergence() -> None:
    paid = [curve("x", s, 4.0, 3.0, 2.0, init_tokens=500, step_tokens=100.0) for s in range(3)]
    steps, seconds = to_target(paid, 2.5)
    assert steps == Reach(25.0 + 5.0, True)  # 500 tokens are 5 steps
    assert seconds == Reach(2 + 0.5 * 25, True)
    free = [curve("x", s, 4.0, 3.0, 2.0) for s in range(3)]
    assert to_target(free, 2.5)[0] == Reach(25.0, True)
    broken = [curve("x", s, 4.0, INF, diverged=True) for s in (3, 4, 5)]
    assert to_target([*free[:2], *broken], 2.5)[0] == Reach(30.0, False)  # never, up to the longest run


# ------------------------------------------------------------------------------------------------- arm against baseline


def test_differences_of_final_loss_and_speed() -> None:
    """The arm gets everywhere in half of the steps; both end level, so that the level is the end plus its sd, 0."""
    base = [curve("lora", s, 4.0, 3.0, 2.0, 1.0) for s in (0, 1)]
    quick = [curve("x", s, 3.0, 1.0, 1.0, 1.0) for s in (0, 1)]
    final, steps, seconds = differences(list(zip(quick, base, strict=True)))
    assert final == [0.0, 0.0]
    assert steps == pytest.approx([math.log(20 / 40)] * 2)
    assert seconds == pytest.approx([math.log(12 / 22)] * 2)
    back = differences(list(zip(base, quick, strict=True)))
    assert back[1] == pytest.approx([math.log(2)] * 2)  # swapped, only the sign changes


def test_only_common_sound_seeds_are_paired() -> None:
    base = [curve("lora", s, 2.0 + s, 1.0 + s) for s in range(4)]
    arm = [curve("x", s, 2.0 + s, 0.9 + s, diverged=s == 2) for s in (0, 1, 2, 7)]
    found = compare({"lora": base, "x": arm}, "lora")
    assert found["x"].final.n == 2 and found["x"].final.mean == pytest.approx(0.1)
    assert compare({"lora": base, "x": arm[:1]}, "lora") == {}


def test_p_values_are_corrected_for_the_number_of_arms() -> None:
    """All tests of a study together: final loss and speed of every arm."""
    base = [curve("lora", s, 3.0, 2.0 + d) for s, d in enumerate((0.0, 0.01, -0.01))]
    ends = {"x": (1.91, 1.9, 1.89), "y": (2.01, 2.0, 2.0), "z": (1.99, 1.97, 2.0)}
    arms = {name: [curve(name, s, 3.0, end) for s, end in enumerate(losses)] for name, losses in ends.items()}
    parts = [differences(list(zip(runs, base, strict=True))) for runs in arms.values()]
    raw = [p for i in (0, 1) for _, p in paired_tests([part[i] for part in parts])]
    found = compare({"lora": base, **arms}, "lora")
    assert [c.p[0] for c in found.values()] + [c.p[1] for c in found.values()] == pytest.approx(holm(raw))
    assert found["x"].p[0] > raw[0]


def test_gap_closed_by_hand() -> None:
    base = [curve("lora", s, 3.0, 2.0 + 0.01 * s) for s in range(5)]
    full = [curve("full", s, 3.0, 1.0 + 0.01 * s) for s in range(5)]
    half = [curve("x", s, 3.0, 1.5 + 0.01 * s + 0.02 * (s % 2)) for s in range(5)]
    found = gap_closed(half, base, full)
    assert found.value == pytest.approx(0.5 - 0.02 * 2 / 5) and found.low is not None and found.high is not None
    assert found.low < found.value < found.high and found.high - found.low < 0.1
    assert gap_closed(base, base, full).value == 0.0 and gap_closed(full, base, full).value == 1.0


def test_fieller_interval_is_the_edge_of_acceptance() -> None:
    """At each limit ρ, the mean of x − ρy is exactly t standard errors away from 0."""
    base = [curve("lora", s, 3.0, 2.0 + d) for s, d in enumerate((0.0, 0.03, -0.02, 0.01))]
    full = [curve("full", s, 3.0, 1.5 + d) for s, d in enumerate((0.01, 0.0, 0.02, -0.01))]
    arm = [curve("x", s, 3.0, 1.8 + d) for s, d in enumerate((-0.02, 0.02, 0.0, 0.01))]
    found = gap_closed(arm, base, full)
    for rho in (found.low, found.high):
        assert rho is not None
        z = [(b.final - a.final) - rho * (b.final - f.final) for a, b, f in zip(arm, base, full, strict=True)]
        mean = sum(z) / 4
        sd = math.sqrt(sum((v - mean) ** 2 for v in z) / 3)
        assert abs(mean) == pytest.approx(3.18245 * sd * math.sqrt(1 / 4 + RATE_CHOICE), rel=1e-4)


def test_gap_is_undefined_where_there_may_be_none() -> None:
    base = [curve("lora", s, 3.0, 2.0 + d) for s, d in enumerate((0.0, 0.1, -0.1))]
    near = [curve("full", s, 3.0, 1.99 - d) for s, d in enumerate((0.0, 0.1, -0.1))]
    above = [curve("full", s, 3.0, 2.5 + d) for s, d in enumerate((0.0, 0.1, -0.1))]
    assert gap_closed(base, base, near).value is None and "holds 0" in gap_closed(base, base, near).reason
    assert "ends below" in gap_closed(base, base, above).reason
    assert "no such pair" in gap_closed(base, base, []).reason
    assert "fewer than two" in gap_closed(base, base, near[:1]).reason


# --------------------------------------------------------------------------------------------------------------- rates


def rates(*losses: float | None, arm: str = "x") -> list[Rate]:
    """Rates 1e-4, 1e-3, …; None: diverged."""
    return [
        Rate(arm, float(f"1e{i - 4}"), INF if loss is None else loss, diverged=loss is None)
        for i, loss in enumerate(losses)
    ]


def test_choice_and_edges() -> None:
    found = choose_rate(rates(2.0, 1.0, 1.0, None))
    assert found and found.lr == 1e-3  # of equals the lower one
    assert choose_rate(rates(None, None)) is None
    assert choose_rate([Rate("x", 1e-3, 0.5, pruned=True), Rate("x", 1e-2, 0.9)]) == Rate("x", 1e-2, 0.9)
    grid = [1e-4, 1e-3, 1e-2]
    assert [edge(lr, grid) for lr in (1e-4, 1e-3, 1e-2, None)] == ["low", None, "high", "low"]


def test_sensitivity_by_hand() -> None:
    """Best 1.0 at 1e-3. To the left 1.1: 0.05 is passed half-way, half a decade. To the right 1.02, then 1.32: a whole
    decade and a tenth. The neighbours are worse by 0.1 and 0.02."""
    found = sensitivity(rates(1.1, 1.0, 1.02, 1.32))
    assert found == Sensitivity(pytest.approx(1.6), False, pytest.approx(0.06), 0.05)
    assert sensitivity(rates(1.01, 1.0, None)) == Sensitivity(pytest.approx(1.0), True, pytest.approx(0.01), 0.05)
    assert sensitivity(rates(None, None)) is None


def test_unequal_searches_are_refused() -> None:
    check_equal_trials({"a": 5, "b": 5})
    check_equal_trials({})
    with pytest.raises(LoralignError, match=r"same number of rate trials: 'b' had 4, the others 5"):
        check_equal_trials({"a": 5, "b": 4, "c": 5})


# ------------------------------------------------------------------------------------------------------ words and files


def three(arm: str, end: float, **changes: Any) -> list[Curve]:
    """Ends at 0.01 above, at and 0.01 below `end`, in an order of its own."""
    noise = (0.01, 0.0, -0.01)
    turn = 0 if arm == "lora" else 1 + len(arm) % 2
    return [curve(arm, s, 4.0, 3.0, end + noise[(s + turn) % 3], **changes) for s in range(3)]


def test_one_plain_sentence_per_arm() -> None:
    runs = [*three("full", 1.0), *three("lora", 2.0), *three("twin", 2.001), *three("worse", 2.5)]
    runs += [curve("wild", s, 4.0, 3.0, INF if s else 2.0, diverged=s > 0) for s in range(3)]
    searches = [r for arm in ("full", "lora", "twin", "worse", "wild") for r in rates(2.5, 2.0, 2.5, arm=arm)]
    result = summarise(runs, searches)
    said = dict(text.split(": ", 1) for text in sentences(result) if not text.startswith("  !"))
    assert said["full"].startswith("better than `lora` by 1.000 (95 % ")
    assert "reaches the final loss of `lora` in" in said["full"]
    assert said["lora"] == "what the other arms are compared with"
    assert said["twin"].startswith("no difference from `lora` within noise (final loss +0.001 ± 0.0")
    assert said["worse"].startswith("worse than `lora` by 0.500")
    assert said["wild"] == "diverged on 2 of 3 seeds at its best rate: nothing is claimed for it"
    assert {a.arm: a.kind for a in result.arms}["wild"] == "unstable"


def test_the_table_as_csv_and_on_a_terminal() -> None:
    result = summarise([*three("full", 1.0, peak_bytes=2**30), *three("lora", 2.0, metrics={"accuracy": 0.9})])
    lines = list(csv.DictReader(io.StringIO(as_csv([row(arm) for arm in result.arms]))))
    full, lora = lines
    assert full["verdict"] == "better" and float(full["final"]) == pytest.approx(1.0)
    assert float(full["final_high"]) - 1.0 == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert float(full["gap_closed"]) == 1.0 and full["peak_gib"] == "1.0" and lora["peak_gib"] == ""
    assert lora["steps_to_full"] == "> 30.0" and lora["metric"] == "accuracy"
    assert 0 < float(full["p_final"]) < 0.025 and lora["p_final"] == ""
    heads = [[str(c.header) for c in table.columns] for table in terminal_tables(result)]
    assert heads[0] == ["arm", "lr", "final loss", "accuracy", "gap closed", "steps to lora's", "to full's"]
    assert "peak memory" in heads[1] and "exported rank" not in heads[1]
    assert json.loads(json.dumps(plain(result), allow_nan=False))["targets"] == {
        "lora": pytest.approx(2.0),
        "full": pytest.approx(1.0),
    }


def test_the_targets_are_final_losses_of_baseline_and_reference() -> None:
    result = summarise([*three("full", 1.0), *three("lora", 2.0), *three("x", 1.5)])
    x = next(a for a in result.arms if a.arm == "x")
    assert result.targets == {"lora": pytest.approx(2.0), "full": pytest.approx(1.0)}
    assert x.steps_to["lora"] == Reach(pytest.approx(20 + 10 / 1.5), True) and not x.steps_to["full"].reached
    assert x.gap.value == pytest.approx(0.5)


def test_a_study_without_references_says_so() -> None:
    result = summarise(three("x", 1.5))
    assert result.notes[:2] == (
        "no finished `lora` arm: nothing is tested",
        "no finished `full` arm: the gap to it is unknown",
    )
    assert result.arms[0].kind == "untested"


def test_an_arm_whose_seeds_have_not_run_is_not_called_diverged() -> None:
    searches = [r for arm in ("full", "lora", "late") for r in rates(2.5, 2.0, 2.5, arm=arm)]
    result = summarise([*three("full", 1.0), *three("lora", 2.0)], searches)
    late = next(a for a in result.arms if a.arm == "late")
    assert (
        late.sentence
        == "its rate is found (validation loss 2.0000), none of its seeds has run: nothing is compared yet"
    )
    assert late.lr is not None and not late.steps_to and row(late)["steps_to_lora"] == ""
