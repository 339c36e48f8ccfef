"""The recorded studies: their journals load, are read by the rules that they ran under, and justify today's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loralign.compare.report import collect
from loralign.compare.schedule import hopeless, rate_trials, wanted
from loralign.compare.spec import Outcome, Spec
from loralign.compare.store import Store
from loralign.config.study import load_study

RECORDS = Path(__file__).parent.parent / "records"
STUDIES = {"2026-11-26-h100-study": "ablation.yaml", "2026-11-26-h100-cora": "study.yaml"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Spec]:
    found = {}
    for name, file in STUDIES.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(RECORDS / name / "study.journal", folder)
        (found[name],) = load_study(RECORDS / name / file, [f"output={folder}"], reading=True)
    return found


def test_old_journals_are_read_as_they_ran(studies: dict[str, Spec]) -> None:
    """No model, no rows; 300 steps for every arm, one seed per rate, no rate asked for that was not run."""
    for name, spec in studies.items():
        done = Store(spec).outcomes()
        found = collect(spec, done)
        assert spec.charge == "read" and (spec.choice_seeds, spec.baseline_seeds) == (1, spec.seeds)
        assert found.missing == 0 and len(found.curves) > 15, name
        assert {o.pruned for o in done.values()} == {True, False}  # kept as they are
        assert sum(o.pruned for o in found.trials.values()) == sum(o.pruned for o in done.values())


def test_what_a_start_read_is_paid_for(studies: dict[str, Spec]) -> None:
    """hrp read as much as 100 steps: its final loss is that at step 200, an evaluation."""
    spec = studies["2026-11-26-h100-study"]
    curves = [c for c in collect(spec, Store(spec).outcomes()).curves if c.arm in ("hrp", "lora-ga", "lora")]
    for c in curves:
        if c.arm == "hrp":
            assert c.ahead == 100 and c.final == c.losses[c.steps.index(200)] > c.losses[-1]
        elif c.arm == "lora-ga":
            at = c.losses[c.steps.index(275)], c.losses[-1]
            assert c.ahead == 9 and c.final == pytest.approx(at[1] + (at[0] - at[1]) * 9 / 25)
        else:
            assert c.final == c.losses[-1]


def whole_rates(spec: Spec) -> Iterator[tuple[str, list[Outcome]]]:
    done = Store(spec).outcomes()
    trials, _ = rate_trials(spec, done)
    for arm in spec.arms:
        own = [done[t.key] for t in trials if t.arm == arm.name]
        yield arm.name, [o for o in own if not o.pruned and not o.diverged and o.losses]


def test_no_best_rate_of_the_records_would_have_been_given_up(studies: dict[str, Spec]) -> None:
    """Against all others of its arm at once, whatever their order; some that ended far above would have been."""
    spared, hopeless_ones, arms = 0, 0, 0
    for spec in studies.values():
        for _, runs in whole_rates(spec):
            best = min(runs, key=lambda o: o.losses[-1])
            arms += 1
            for run in runs:
                others = [o for o in runs if o is not run]
                stopped = any(hopeless(run.steps[:n], run.losses[:n], spec.steps, others) for n in range(1, 13))
                assert not (stopped and run is best)
                hopeless_ones += stopped
                spared += run is best
    assert arms == spared == 26 and hopeless_ones >= 5


def test_a_margin_at_one_evaluation_would_not_do(studies: dict[str, Spec]) -> None:
    """delta-lora's best rate was 1.6 nats above another's first evaluation at half of its steps, and ended best."""
    runs = dict(whole_rates(studies["2026-11-26-h100-study"]))["delta-lora"]
    best = min(runs, key=lambda o: o.losses[-1])
    first = min(o.losses[0] for o in runs if o is not best)
    assert best.losses[best.steps.index(150)] - first > 1.5
    assert best.losses[best.steps.index(200)] < first


def test_a_journal_from_before_ranks_were_kept_goes_on(tmp_path: Path) -> None:
    """The axes' study: its first 37 trials count, its arms are the file's, no rank is made up."""
    name = "2026-11-29-h200-axes"
    shutil.copy(RECORDS / name / "study.journal", tmp_path)
    (spec,) = load_study(RECORDS / name / "study.yaml", [f"output={tmp_path}"], reading=True)
    done = Store(replace(spec, reading=False)).outcomes()  # refuses what was begun otherwise
    old = list(done.values())[:37]
    assert len(old) == 37 and {o.ranks for o in old} == {None}
    assert {t.key for t in wanted(spec, done)} >= set(done)
