"""The verdict in plain words, and what figures show, by examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from loralign.compare.curves import Curve, Interval
from loralign.compare.figures import COLOURS, bands, best_rates, fitted, loss_limits, rate_limits, styles, width
from loralign.compare.hierarchy import Effect, Overall
from loralign.compare.numbers import between, decimals, loss, spread
from loralign.compare.page.charts import Arms, rate_charts
from loralign.compare.page.svg import Scale, apart, minus, powers, short, tag, ticks
from loralign.compare.rates import Rate
from loralign.compare.summary import in_plain_words, over_tasks_in_plain_words
from loralign.compare.verdict import StudyResult, summarise


def curve(arm: str, seed: int, *losses: float, **more: Any) -> Curve:
    """Evaluated at steps 100, 200, …; half a second a step."""
    steps = tuple(100 * (i + 1) for i in range(len(losses)))
    return Curve(arm, 1e-3, seed, steps, tuple(s / 2 for s in steps), losses, losses[-1], min(losses), **more)


def seeds(arm: str, mean: float, n: int = 3, spread: float = 0.01) -> list[Curve]:
    return [curve(arm, s, mean + 1, mean + spread * (s % 3 - 1)) for s in range(n)]


def told(**means: float) -> str:
    runs = [c for arm, mean in means.items() for c in seeds(arm, mean, 12 if arm == "lora" else 3)]
    return in_plain_words(summarise(runs))


def test_better_and_worse_arms_are_named_with_their_intervals() -> None:
    said = told(lora=3.0, full=2.5, spectral=2.6, pissa=2.7, hrp=3.4)
    assert said.startswith("Full fine-tuning ends 0.500 (98 % interval 0.4") and "can see a gap of that size." in said
    assert "`spectral` ends lowest of the arms that beat `lora`: 2.600, better by 0.400 (98 % interval 0.3" in said
    assert "which is 80 % of the gap to full fine-tuning; `pissa` does better than `lora`, too." in said
    assert said.endswith("`hrp` ends higher than `lora`.")


def test_where_nothing_differs_plain_lora_is_as_good() -> None:
    said = told(lora=3.0, full=2.5, pissa=3.0)
    assert "No difference from plain `lora` is found for `pissa`, differences below about 0.0" in said
    assert said.endswith("would not have been seen: plain `lora` is as good here.")
    said = told(lora=3.0, full=2.5, spectral=2.6, pissa=3.0)
    assert "No difference from plain `lora` is found for `pissa`" in said
    assert said.endswith("would not have been seen: plain `lora` is as good as they are.")


def test_a_control_that_shows_nothing_is_said_and_so_is_a_missing_one() -> None:
    assert told(lora=3.0, full=3.0, pissa=3.0).startswith("Full fine-tuning, the control, is not found better than")
    for blind in (told(lora=3.0, full=3.0, pissa=3.0), told(lora=3.0, pissa=3.0), told(lora=3.0, full=3.5, pissa=3.0)):
        assert "would not have been seen." in blind and "as good" not in blind
    assert told(lora=3.0, pissa=3.0).startswith("Without a finished `full` arm nothing shows")
    assert in_plain_words(summarise([])) == "No finished `lora` arm: nothing is tested."


def test_a_baseline_without_a_result_is_the_first_thing_said() -> None:
    lost = [Rate("lora", lr, math.inf, diverged=True) for lr in (1e-3, 2e-3)]
    result = summarise(seeds("pissa", 3.0), [*lost, Rate("pissa", 1e-3, 3.0), Rate("pissa", 2e-3, 3.1)])
    assert {a.arm: a.sentence for a in result.arms}["lora"].startswith("no learning rate finished")
    result = replace(result, notes=("trials ran on A100, H200", *result.notes), failed={"hrp": "it broke"})
    assert in_plain_words(result) == (
        "No finished `lora` arm: nothing is tested. `lora`: no learning rate finished: every trial diverged or was "
        "given up. `hrp` failed and is left out."
    )
    diverged = summarise([curve("lora", s, 3.0, math.inf, diverged=True) for s in range(3)])
    assert diverged.arms[0].sentence.startswith("diverged on 3 of 3 seeds")
    unfinished = replace(result, arms=(), notes=("failed and left out: it broke", "the search is unfinished, 1 of 2"))
    assert in_plain_words(unfinished) == "The search is unfinished, 1 of 2. `hrp` failed and is left out."


def test_over_tasks_arms_are_better_worse_or_nobody_can_tell() -> None:
    def line(arm: str, mean: float, better: float) -> Overall:
        return Overall(arm, {"a": -mean, "b": -mean}, Effect(mean, mean - 0.1, mean + 0.1, better))

    control = Overall("full", {"a": -0.3, "b": 0.1}, None)
    found = [control, line("pissa", 0.2, 1.0), line("olora", 0.3, 0.976), line("hrp", -0.2, 0.01), line("sora", 0, 0.5)]
    assert over_tasks_in_plain_words(found, 2) == (
        "Full fine-tuning ends below plain `lora` on 1 of 2 tasks. Over all tasks `olora` and `pissa` are probably "
        "better than `lora` (P ≥ 0.97), `olora` the most: by 0.300 (95 % 0.200 … 0.400), shrunken towards the other "
        "arms. `hrp` is probably worse. Of `sora` nobody can tell."
    )
    assert "`pissa` is probably better than `lora` (P ≥ 0.99), by 0.2" in over_tasks_in_plain_words(found[1:2], 2)
    assert over_tasks_in_plain_words([], 2).startswith("Fewer than two of the 2 tasks have results")


def test_a_probable_arm_and_an_edge_are_not_hidden() -> None:
    loud = [*seeds("lora", 3.0, 3, 0.1), *seeds("full", 1.0, 3, 0.1), *seeds("pissa", 2.85, 3, 0.1)]
    rates = [Rate(a, lr, 3 - lr) for a in ("lora", "full", "pissa") for lr in (0.1, 0.2, 0.3)]
    result = summarise(loud, rates)
    probable = [replace(a, effect=Effect(0.1, -0.01, 0.2, 0.97)) if a.arm == "pissa" else a for a in result.arms]
    said = in_plain_words(replace(result, arms=tuple(probable)))
    assert "plain `lora` is as good here" not in said and "`pissa` is probably better all the same (P ≥ 0.97)" in said
    assert "The best rate of `lora`, `full` and `pissa` lies at an edge" in said


def test_an_interval_that_holds_no_difference_is_given_with_its_sign() -> None:
    """Step-down tests find more than the intervals, which hold for the whole family together, leave out."""
    arms = []
    for a in summarise([c for arm in ("lora", "full", "pissa") for c in seeds(arm, 3.0)]).arms:
        if a.comparison is not None:
            low = 0.1 if a.arm == "full" else -0.02
            found = replace(a.comparison, final=Interval(0.12, low, 0.24 - low, 3), p=(0.001, None))
            arms.append(replace(a, comparison=found, kind="better"))
        else:
            arms.append(a)
    said = in_plain_words(StudyResult(tuple(arms), {}, ()))
    assert "Full fine-tuning ends 0.120 (98 % interval 0.100 … 0.140) below" in said
    assert "better by 0.120 (98 % interval ± 0.140)" in said


def test_many_arms_are_counted() -> None:
    said = told(lora=3.0, full=2.5, **{f"arm{i}": 3.0 + i / 10_000 for i in range(6)})
    assert "is found for the 6 other arms" in said


# ------------------------------------------------------------------------------------------------------------- figures


def test_bands_are_means_and_extremes_and_end_where_the_budget_is_spent() -> None:
    paid = {"init_tokens": 1000, "step_tokens": 10.0}  # worth 100 steps
    runs = [curve("lora", 0, 4.0, 3.0, 2.0), curve("lora", 1, 4.2, 3.4, 2.2), curve("hrp", 0, 3.0, 2.0, 1.0, **paid)]
    hrp, lora = bands(runs, "charged_steps", 300)
    assert lora.x == (100, 200, 300) and lora.mean == pytest.approx((4.1, 3.2, 2.1))
    assert lora.low == (4.0, 3.0, 2.0) and lora.high == (4.2, 3.4, 2.2)
    assert (hrp.arm, hrp.x, hrp.mean) == ("hrp", (200, 300), (3.0, 2.0))  # step 200 of its own is the 300th paid
    assert bands(runs, "charged_steps")[0].mean[-1] == 1.0
    assert bands(runs, "seconds", 350)[0].x == (50, 100, 125)  # half way from the second to the third evaluation
    low, top = loss_limits([hrp, lora])
    assert low < 2.0 and max(hrp.mean[-1], lora.mean[-1]) <= top


def test_an_arm_has_a_look_of_its_own_in_all_figures() -> None:
    names = ["full", "lora", *(f"a{i}" for i in range(40))]
    found = styles(names)
    assert len({(s.colour, s.dash) for s in found.values()}) == 42
    assert len({found[n].colour for n in names[:20]}) == 20 == len({found[n].dark for n in names[:20]})
    assert len(COLOURS) == 18 and found["full"].dash == "--"


def test_rates_far_above_the_best_do_not_stretch_the_axis() -> None:
    rates = [Rate("lora", 10.0**i, loss) for i, loss in enumerate((3.0, 2.9, 3.1, 90.0))]
    low, top = rate_limits(rates, best_rates(rates))
    assert low < 2.9 and 3.1 <= top < 4


@pytest.mark.parametrize("value", [0.0, 1e-7, 2.2, 40.0, 1e7])
def test_an_axis_of_one_value_has_labels_that_differ(value: float) -> None:
    rates = [Rate("lora", 10.0**i, value) for i in range(3)]
    flat = bands([curve("lora", s, value, value) for s in range(2)], "seconds")
    for low, top in (rate_limits(rates, best_rates(rates)), loss_limits(flat)):
        labels = [f"{v:g}" for v in ticks(low, top)]
        assert low < value < top and len(set(labels)) == len(labels) > 1


@pytest.mark.parametrize("room", [40, 99, 138, 200])
@pytest.mark.parametrize(
    "name", ["lora-ga, rank 64, 8 micro-batches", "W" * 60, "i" * 60, "日本語の名前はとても長いので", "a b"]
)
def test_a_name_fits_and_keeps_its_end(name: str, room: int) -> None:
    shown = fitted(name, room)
    assert width(shown, 12.5) <= room and (shown == name) == (width(name, 12.5) <= room)
    if shown != name:
        head, tail = shown.split("…")
        assert name.startswith(head) and name.endswith(tail) and head and tail


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (0.1, -0.0001, 0.25, "+0.100 (+0.000 … +0.250)"),  # no zero with a minus
        (0.0, -0.0, 0.0, "+0.000 (+0.000 … +0.000)"),
        (-0.00021, -0.00032, -0.0001, "-0.00021 (-0.00032 … -0.00010)"),
        (12345.678, 12000.0, 13000.5, "+12346 (+12000 … +13000)"),
        (2.5e7, -math.inf, 3e7, "+2.5e+07 (-inf … +3e+07)"),
    ],
)
def test_differences_have_the_decimals_that_show_them(mean: float, low: float, high: float, said: str) -> None:
    assert between(mean, low, high) == said


def test_losses_have_the_decimals_that_show_them() -> None:
    assert [loss(x) for x in (2.5, 0.0123, 0.00012, 0.0, 512.25)] == [
        "2.5000",
        "0.0123",
        "0.00012",
        "0.0000",
        "512.250",
    ]
    assert spread(Interval(0.00021, 0.0001, 0.00032, 3)) == "0.00021 ± 0.00011"
    assert decimals(math.nan) == 3


def test_what_lies_above_the_axis_of_rates_is_marked_there_and_not_drawn_outside() -> None:
    rates = [Rate("lora", 10.0**i, loss) for i, loss in enumerate((3.0, 2.9, 3.1, 90.0))]
    (drawn,) = rate_charts(rates, Arms(("lora",), styles(["lora"])))
    assert drawn.count('class="dot"') == 3 and drawn.count('class="lost"') == 1


def test_ticks_and_numbers() -> None:
    assert ticks(2.53, 3.21, 6) == [2.6, 2.8, 3.0, 3.2] and ticks(1.0, 1.0) == [1.0]
    assert powers(1e-4, 2e-2) == [1e-4, 1e-3, 1e-2] and powers(1.5e-3, 6e-3) == [2e-3, 5e-3]
    assert (short(1e-4), short(0.003), minus("-0.250")) == ("1e-4", "0.003", "−0.250")
    assert Scale(1, 100, 0, 10, log=True)(10) == 5 and Scale(0, 4, 10, 0)(1) == 7.5
    assert tag("a", "x", class_="b", data_v='"<') == '<a class="b" data-v="&quot;&lt;">x</a>'


@pytest.mark.parametrize(
    "wanted", [(10, 90, 50), (50, 50, 50, 50), (99, 99.5, 100), (0, 1, 2, 98, 99), tuple(range(0, 40, 2))]
)
def test_labels_keep_apart_and_inside(wanted: tuple[float, ...]) -> None:
    found = apart(wanted, 5, 0, 100)
    placed = sorted(found)
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= 0 and placed[-1] <= 100 + 1e-9
    assert sorted(range(len(wanted)), key=lambda i: (wanted[i], found[i])) == sorted(
        range(len(wanted)), key=lambda i: found[i]
    )
    assert apart((10, 90), 5, 0, 100) == [10, 90] and not math.isnan(sum(found))
