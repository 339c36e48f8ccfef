"""The statistics by examples that were worked out by hand; what they say of noise stands in test_study_honesty.py."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from loralign import LoralignError
from loralign.compare.curves import Curve, Interval, Reach, interval, loss_at, median_reach, reach, to_target
from loralign.compare.inference import Sample, paired, sample
from loralign.compare.page.tables import arms_table
from loralign.compare.rates import Rate, Sensitivity, check_equal_trials, choose_rate, edge, sensitivity, standard_error
from loralign.compare.report import as_csv, plain, row
from loralign.compare.statistics import (
    CONTROL,
    FINAL,
    SPEED,
    Comparison,
    Gap,
    compare,
    families,
    gap_closed,
    log_ratios,
    on_common_seeds,
    samples,
)
from loralign.compare.tables import as_markdown, sentences, terminal_tables
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
    assert median_reach(times(10, -10)) == Reach(10.0, False)  # at one time, what arrived was there before it was lost
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


def ends(arm: str, *finals: float) -> list[Curve]:
    return [curve(arm, seed, 3.0, end) for seed, end in enumerate(finals)]


def test_differences_of_speed() -> None:
    """The arm gets everywhere in half of the steps; both end level, so that the level is the end plus its sd, 0."""
    base = [curve("lora", s, 4.0, 3.0, 2.0, 1.0) for s in (0, 1)]
    quick = [curve("x", s, 3.0, 1.0, 1.0, 1.0) for s in (0, 1)]
    steps, seconds = log_ratios(list(zip(quick, base, strict=True)))
    assert steps == pytest.approx([math.log(20 / 40)] * 2)
    assert seconds == pytest.approx([math.log(12 / 22)] * 2)
    back = log_ratios(list(zip(base, quick, strict=True)))
    assert back[0] == pytest.approx([math.log(2)] * 2)  # swapped, only the sign changes


def test_what_was_there_at_the_first_evaluation_is_no_later_than_it_must_be() -> None:
    """Both below the level at once; the arm's start is charged 9 steps: in (9, 19] and (0, 10], either may be sooner.
    Charged 30, it is in (30, 40], later than 10; a base that takes 28 steps is in no doubt."""
    level = [curve("lora", s, 1.0, 1.0) for s in (0, 1)]
    late, later = ([curve("x", s, 1.0, 1.0, init_tokens=n, step_tokens=1.0) for s in (0, 1)] for n in (9, 30))
    slow = [curve("lora", s, 4.0, 2.0, 0.75) for s in (0, 1)]
    for arm, base, ratio in ((late, level, 1.0), (later, level, 3.0), (late, slow, 19 / 28), (later, slow, 30 / 28)):
        steps, _ = log_ratios(list(zip(arm, base, strict=True)))
        back, _ = log_ratios(list(zip(base, arm, strict=True)))
        assert steps == pytest.approx([math.log(ratio)] * 2) and back == pytest.approx([-math.log(ratio)] * 2)
    assert log_ratios(list(zip(late, level, strict=True)))[1] == [0.0, 0.0]


def test_the_loss_is_straight_between_evaluations() -> None:
    assert loss_at([10, 20, 30], [4.0, 3.0, 2.0], 25.0) == 2.5
    assert loss_at([10, 20, 30], [4.0, 3.0, 2.0], 99.0) == 2.0


def test_a_sample_holds_what_the_finalists_tell_of_its_spread() -> None:
    """Two finalists on 3 seeds: variances 1 and 4, 2 degrees of freedom each, beside the reported runs' 0.25 of 2."""
    found = [
        Rate("x", 1e-3, 1.0, further=(2.0, 3.0)),
        Rate("x", 2e-3, 1.0, further=(3.0, 5.0)),
        Rate("x", 4e-3, 9.0),
    ]
    s = samples({"x": ends("x", 1.5, 2.0, 2.5), "alone": ends("alone", 1.0)}, found)
    assert s == {"x": Sample(2.0, pytest.approx((2 * 0.25 + 2 * 1 + 2 * 4) / 6), 6, 3, 3)}
    assert samples({"x": ends("x", 1.5, 2.0, 2.5)})["x"] == sample([1.5, 2.0, 2.5])


def test_only_sound_seeds_count() -> None:
    base = [curve("lora", s, 2.0 + s, 1.0 + s) for s in range(4)]
    arm = [curve("x", s, 2.0 + s, 0.9 + s, diverged=s == 2) for s in (0, 1, 2, 7)]
    found = compare({"lora": base, "x": arm}, "lora")
    assert found["x"].final.n == 3 and found["x"].final.mean == pytest.approx(2.5 - (0.9 + 1.9 + 7.9) / 3)
    assert compare({"lora": base, "x": arm[:1]}, "lora") == {} == compare({"lora": base[:1], "x": arm}, "lora")


def test_who_is_tested_with_whom() -> None:
    found = families(["full", "lora", "a", "b", "c"], {"c": "later"}, "lora", "full")
    assert found == {CONTROL: ["full"], "primary": ["a", "b"], "later": ["c"]}


def test_what_joins_one_family_changes_no_other() -> None:
    """To the last bit; joining the same family costs."""
    arms = {"full": ends("full", 1.5, 1.51, 1.49), "lora": ends("lora", 2.0, 2.02, 1.98, 2.01)}
    arms |= {"a": ends("a", 1.96, 1.98, 1.97), "b": ends("b", 2.0, 2.01, 1.97)}
    more = {f"more {i}": ends(f"more {i}", 2.0 + 0.01 * i, 2.02, 1.98) for i in range(6)}
    before = compare(arms, "lora")
    apart = compare({**arms, **more}, "lora", family=dict.fromkeys(more, "later"))
    assert {a: apart[a] for a in before} == before
    shared = compare({**arms, **more}, "lora")
    assert shared["a"].p[0] > before["a"].p[0]  # further arms of its own family


def test_speed_is_tested_where_finals_tie() -> None:
    rows = [(4.0, 3.5, 3.0, 2.5, 2.0), (3.0, 2.02, 2.0, 2.0, 2.0), (3.0, 2.0, 1.5, 1.2, 1.0)]
    noise = (0.0, 0.01, -0.01, 0.005)
    arms = {
        name: [curve(name, s, *(x + d for x in row)) for s, d in enumerate(noise)]
        for name, row in zip(("lora", "soon", "low"), rows, strict=True)
    }
    found = compare(arms, "lora")
    assert found["low"].final_sign == 1 and found["low"].p[1] is None and found["low"].speed_sign == 0
    assert found["soon"].p[0] > FINAL and found["soon"].speed_sign == 1
    assert found["soon"].steps.mean < 0.55
    curves = [c for own in arms.values() for c in own]
    assert {a.arm: a.kind for a in summarise(curves).arms} == {"lora": "baseline", "soon": "sooner", "low": "better"}
    kinds = {a.arm: a.kind for a in summarise(curves, baseline="soon").arms}
    assert kinds == {"soon": "baseline", "lora": "later", "low": "better"}


def test_speeds_of_a_family_are_corrected_by_holm_and_know_of_the_choice_of_the_rate() -> None:
    noise, falls = (0.0, 0.01, -0.01, 0.005), {"lora": (4, 4, 3, 4), "soon": (1, 2, 1, 3), "too": (2, 3, 2, 2)}
    arms = {
        n: [curve(n, s, *(2.0 + d + (i < k) for i in range(5))) for s, (k, d) in enumerate(zip(ks, noise, strict=True))]
        for n, ks in falls.items()
    }
    together = compare(arms, "lora")
    times = {n: log_ratios(on_common_seeds(arms[n], arms["lora"]))[0] for n in ("soon", "too")}
    raw = dict(zip(times, (p for _, p in paired([sample(t) for t in times.values()])), strict=True))
    small, large = sorted(raw, key=raw.__getitem__)
    assert 1e-6 < raw[small] < raw[large] < 0.5
    assert together[small].p[1] == pytest.approx(2 * raw[small]) and together[large].p[1] == pytest.approx(
        max(raw[large], 2 * raw[small])
    )
    searched = [Rate(n, 1e-3, end, further=(end, end)) for n in arms for end in (2.0,)]
    assert (compare(arms, "lora", rates=searched)["soon"].p[1] or 1.0) < (together["soon"].p[1] or 0.0)


@pytest.mark.parametrize(("p", "sign"), [(None, 0), (SPEED, 0), (0.9 * SPEED, 1), (FINAL, 0)])
def test_speed_has_a_level_of_its_own(p: float | None, sign: int) -> None:
    times = Interval(0.5, 0.4, 0.6, 3)
    found = Comparison(Interval(0.0, -1.0, 1.0, 3), times, times, (0.5, p))
    assert found.speed_sign == sign
    assert replace(found, steps=Interval(2.0, 1.5, 2.5, 3)).speed_sign == -sign


def test_an_arm_that_ends_as_the_baseline_does_is_not_the_baseline() -> None:
    """Equal to the last bit, and yet another arm: what it closes of the gap is 0 with an interval."""
    base, full = Sample(3.0, 0.01, 20, 3, 3), Sample(2.0, 0.01, 20, 3, 3)
    twin = gap_closed(replace(base), base, full)
    assert twin.value == 0.0 and twin.low is not None and twin.high is not None and twin.low < 0.0 < twin.high
    assert gap_closed(base, base, full) == Gap(0.0, 0.0, 0.0) and gap_closed(full, base, full) == Gap(1.0, 1.0, 1.0)


def fieller(rho: float, a: Sample, b: Sample, r: Sample) -> float:
    """|x̄ − ρȳ| in its standard errors, the baseline shared by both."""
    error2 = (1 - rho) ** 2 * b.error2 + a.error2 + rho**2 * r.error2
    return abs((b.mean - a.mean) - rho * (b.mean - r.mean)) / math.sqrt(error2)


def test_fieller_interval_is_the_edge_of_acceptance() -> None:
    """At each limit ρ, the mean of x − ρy is exactly t standard errors away from 0; all of 1e9 degrees of freedom."""
    base, full, arm = Sample(2.0, 0.01, 1e9, 12, 3), Sample(1.5, 0.004, 1e9, 3, 3), Sample(1.8, 0.02, 1e9, 3, 3)
    found = gap_closed(arm, base, full)
    assert found.value == pytest.approx(0.4) and found.low is not None and found.high is not None
    assert found.low < 0.4 < found.high
    assert [fieller(rho, arm, base, full) for rho in (found.low, found.high)] == pytest.approx([1.95996] * 2, rel=1e-3)
    few = gap_closed(Sample(1.8, 0.02, 4, 3, 3), base, full)
    assert few.high is not None and few.high > found.high
    assert gap_closed(base, base, full).value == 0.0 and gap_closed(full, base, full).value == 1.0


def test_gap_is_undefined_where_there_may_be_none() -> None:
    base, near, above = sample([2.0, 2.1, 1.9]), sample([1.99, 1.89, 2.09]), sample([2.9, 2.91, 2.92])
    assert gap_closed(base, base, near).value is None and "holds 0" in gap_closed(base, base, near).reason
    still = Sample(2.0, 1e-4, 10, 3, 3)
    assert "ends below" in gap_closed(still, still, above).reason
    assert "fewer than two" in gap_closed(base, base, None).reason


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
    grid = rates(2.0, 1.0, 2.0)
    assert [edge(lr, grid) for lr in (1e-4, 1e-3, 1e-2, None)] == ["low", None, "high", "low"]


def test_of_rates_within_one_standard_error_the_lowest() -> None:
    """Variances 0.01 and 0.03 on 3 seeds: the standard error of a mean is √(0.02/3) = 0.0816."""

    def two(apart: float) -> list[Rate]:
        low = Rate("x", 1e-3, 1.0 + apart, further=(1.1 + apart, 0.9 + apart))
        wide = math.sqrt(0.03)
        return [low, Rate("x", 2e-3, 1.0, further=(1.0 + wide, 1.0 - wide)), Rate("x", 4e-3, 0.5)]

    assert standard_error(two(0.0)[:2]) == pytest.approx(math.sqrt(0.02 / 3))
    found = [choose_rate(two(apart)) for apart in (0.0, 0.08, 0.083)]
    assert [f.lr for f in found if f] == [1e-3, 1e-3, 2e-3]  # never the third, which ran on one seed
    lost = Rate("x", 2e-3, 0.1, further=(0.1, INF))
    assert choose_rate([two(0.0)[0], lost]) == two(0.0)[0] and choose_rate([lost]) is None


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
    with pytest.raises(LoralignError, match=r"same number of rate trials: 'b' had 7, the others 5"):
        check_equal_trials({"a": 5, "b": 7, "c": 5})


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
    assert said["full"].startswith("better than `lora` by 1.000 (98 % ")
    assert said["lora"] == "what the other arms are compared with"
    assert said["twin"].startswith("no difference from `lora` within noise (final loss +0.001 ± 0.0")
    assert said["worse"].startswith("worse than `lora` by 0.500")
    assert said["wild"] == "diverged on 2 of 3 seeds at its best rate: nothing is claimed for it"
    assert {a.arm: a.kind for a in result.arms}["wild"] == "unstable"


def test_of_an_arm_that_diverged_on_a_seed_no_figure_claims_anything_and_the_others_are_as_without_it() -> None:
    runs = [*three("full", 1.0), *three("lora", 2.0), *three("good", 1.5)]
    wild = [curve("wild", s, 4.0, 3.0, INF if s == 3 else 1.2 + 0.1 * s, diverged=s == 3) for s in range(4)]
    alone, beside = ({a.arm: a for a in summarise(curves).arms} for curves in (runs, [*runs, *wild]))
    lost = beside["wild"]
    assert (lost.kind, lost.effect, lost.gap.value, lost.diverged) == ("unstable", None, None, 1)
    assert "diverged" in lost.gap.reason and lost.final.n == 3
    assert all(beside[n].effect == a.effect and beside[n].gap == a.gap for n, a in alone.items())


def test_the_table_as_csv_and_on_a_terminal() -> None:
    result = summarise([*three("full", 1.0, peak_bytes=2**30), *three("lora", 2.0, metrics={"accuracy": 0.9})])
    lines = list(csv.DictReader(io.StringIO(as_csv([row(arm) for arm in result.arms]))))
    full, lora = lines
    assert full["verdict"] == "better" and float(full["final"]) == pytest.approx(1.0)
    assert float(full["final_high"]) - 1.0 == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert float(full["gap_closed"]) == 1.0 and full["peak_gib"] == "1.0" and lora["peak_gib"] == ""
    assert lora["steps_to_full"] == "> 30.0" and lora["metric"] == "accuracy"
    assert 0 < float(full["p_final"]) < FINAL and lora["p_final"] == "" and full["family"] == CONTROL
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


def test_the_table_as_markdown() -> None:
    runs = [*three("full", 1.0), *three("lora", 2.0), *three("x", 1.5, init_tokens=500, step_tokens=100.0)]
    lines = as_markdown(summarise(runs)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| full", "| x", "| lora"]
    assert " | primary | 0.001 | 30 + 5 | 1.5000 ± " in lines[3] and lines[3].count("|") == lines[0].count("|")


def test_every_interval_is_told_from_its_lower_end_to_its_higher_one() -> None:
    runs = [c for arm, end in (("full", 1.0), ("lora", 2.0), ("good", 1.5), ("bad", 2.6)) for c in three(arm, end)]
    result = summarise(runs)
    console = Console(width=300, record=True, file=io.StringIO())
    for table in terminal_tables(result):
        console.print(table)
    number = r"([+−-]?\d[\d.]*)\s?%?"
    texts = {
        "markdown": as_markdown(result),
        "terminal": console.export_text(),
        "page": arms_table(result, [a.arm for a in result.arms].index),
    }
    for where, text in texts.items():
        pairs = re.findall(rf"{number} … {number}", text)
        assert len(pairs) >= 2, where
        assert all(float(a.replace("−", "-")) <= float(b.replace("−", "-")) for a, b in pairs), (where, pairs)


@pytest.mark.parametrize(("seeds", "told"), [(1, False), (2, True)])
def test_an_interval_over_seeds_has_limits_from_two_seeds_on(seeds: int, told: bool) -> None:
    (arm,) = summarise([curve("lora", s, 4.0, 2.0 + 0.1 * s) for s in range(seeds)]).arms
    line = row(arm)
    assert [line["final_low"] is not None, line["final_high"] is not None] == [told, told]


def test_a_control_that_fails_is_told() -> None:
    result = summarise([*three("full", 2.001), *three("lora", 2.0), *three("x", 1.5)])
    assert "the control fails: `full` is not found better than `lora`, so ties say little" in result.notes
