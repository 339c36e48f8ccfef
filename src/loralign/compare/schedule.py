"""What a study needs next, as pure functions of the trials that are finished.

Phase "rate": every arm the same number of log-spaced rates on one seed, judged on validation rows; the best few of each
arm (`finalists`) on further seeds, then one is chosen (`rates.choose_rate`). While some arm's best rate lies at an edge
of its grid, one rate is added to *every* arm, at most `extensions` times. Phase "seed": every arm's chosen rate on
fresh seeds with equal data order, the baseline on more of them, judged on test rows that no choice ever saw.

A rate is given up only where it diverged or is hopeless by a wide margin (`_hopeless`); it still counts. It is judged
against rates of its own arm that stand before it in the plan, so that the order in which workers finish changes nothing
(`in_order`). What comes next depends on finished outcomes alone: a study that was killed ends with the same table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loralign.compare.rates import Rate, choose_rate, edge
from loralign.compare.spec import BASELINE, Arm, Outcome, Spec, Trial, grid, rate

Done = Mapping[str, Outcome]
GIVE_UP_AFTER = 0.75
"""Of the steps; from half of them on, every evaluation must have been hopeless."""


def judged(outcome: Outcome) -> float:
    """What a rate is chosen by: the final validation loss; a diverged or given-up trial counts as infinitely bad."""
    return math.inf if outcome.diverged or outcome.pruned or not outcome.losses else outcome.losses[-1]


def rates_of(spec: Spec, arm: Arm, done: Done, trials: Sequence[Trial]) -> list[Rate]:
    """The finished rates of an arm, from low to high, with the losses of those that ran on every further seed."""
    own = [t for t in trials if t.arm == arm.name and t.key in done]
    found = []
    for t in sorted((t for t in own if t.seed == spec.rate_seed), key=lambda t: t.lr):
        o = done[t.key]
        further = [judged(done[f.key]) for f in own if f.index == t.index and f.seed != spec.rate_seed]
        kept = tuple(further) if len(further) == spec.choice_seeds - 1 else ()
        found.append(Rate(arm.name, t.lr, o.losses[-1] if o.losses else math.inf, o.diverged, o.pruned, kept))
    return found


def best_index(spec: Spec, arm: Arm, done: Done, trials: Sequence[Trial]) -> int | None:
    """Grid index of the arm's best rate, None where every rate diverged."""
    best = choose_rate(rates_of(spec, arm, done, trials))
    return next((t.index for t in trials if best and t.arm == arm.name and t.lr == best.lr), None)


# -------------------------------------------------------------------------------------------------------- what is next


def rate_trials(spec: Spec, done: Done) -> tuple[list[Trial], dict[str, str]]:
    """All trials of phase "rate" that the finished ones call for, and the arms whose best is still at an edge.

    Rounds: the grid, one more rate for every arm while any arm's best is at an edge ("low" or "high"), the finalists,
    and again one more rate where the chosen one lies at an edge. Every arm's centre comes first, then every arm's next
    rate, so that workers side by side still know the earlier rates of an arm when they judge a later one, and a study
    that stops early is balanced.
    """
    grids = (grid(arm, spec.rates, spec.ratio) for arm in spec.arms)
    first = [t for turn in zip(*grids, strict=True) for t in turn]
    base = [Trial("rate", t.arm, t.index, t.lr, spec.rate_seed) for t in first]
    left = spec.extensions
    while True:
        if any(t.key not in done for t in base):
            return base, {}
        known = in_order(spec, done, base)
        trials = base
        edges = _edges(spec, known, base)
        if not edges or not left:
            trials = [*base, *run_offs(spec, known, base)]
            if any(t.key not in done for t in trials):
                return trials, {}
            edges = _edges(spec, known, trials)
        if not edges or not left:
            return trials, edges
        base, left = base + [_one_more(arm, spec, known, trials) for arm in spec.arms], left - 1


def run_offs(spec: Spec, done: Done, base: Sequence[Trial]) -> list[Trial]:
    """The finalists on further seeds, in turn over arms; for one that diverges there, the next best runs, too."""
    lists = [_run_off(spec, arm, done, base) for arm in spec.arms]
    return [own[i] for i in range(max(map(len, lists), default=0)) for own in lists if i < len(own)]


def _run_off(spec: Spec, arm: Arm, done: Done, base: Sequence[Trial]) -> list[Trial]:
    finished = [t for t in base if t.arm == arm.name and judged(done[t.key]) < math.inf]
    found: list[Trial] = []
    sound = 0
    for t in sorted(finished, key=lambda t: (judged(done[t.key]), t.lr)):
        if sound == spec.finalists:
            break
        own = [replace(t, seed=spec.rate_seed + i) for i in range(1, spec.choice_seeds)]
        found += own
        sound += not any(f.key in done and judged(done[f.key]) == math.inf for f in own)
    return found


def _edges(spec: Spec, done: Done, trials: Sequence[Trial]) -> dict[str, str]:
    return {arm.name: side for arm in spec.arms if (side := edge_of(spec, arm, done, trials))}


def edge_of(spec: Spec, arm: Arm, done: Done, trials: Sequence[Trial]) -> str | None:
    rates = rates_of(spec, arm, done, trials)
    best = choose_rate(rates)
    return edge(best.lr if best else None, rates)


def _one_more(arm: Arm, spec: Spec, done: Done, trials: Sequence[Trial]) -> Trial:
    """The next rate beyond the edge nearer to the arm's best."""
    indices = [t.index for t in trials if t.arm == arm.name]
    best = best_index(spec, arm, done, trials)
    side = edge_of(spec, arm, done, trials)
    if side is None:
        side = "low" if best is None or best - min(indices) <= max(indices) - best else "high"
    index = min(indices) - 1 if side == "low" else max(indices) + 1
    return Trial("rate", arm.name, index, rate(arm, index, spec.ratio), spec.rate_seed)


def seed_trials(spec: Spec, done: Done, trials: Sequence[Trial]) -> list[Trial]:
    """Every arm's chosen rate on the reported seeds, seed by seed so that an unfinished study is balanced."""
    known = in_order(spec, done, trials)
    chosen = {arm.name: best_index(spec, arm, known, trials) for arm in spec.arms}
    found = []
    for seed in range(max(spec.seeds, spec.baseline_seeds)):
        for arm in spec.arms:
            index, seeds = chosen[arm.name], spec.baseline_seeds if arm.name == BASELINE else spec.seeds
            if index is not None and seed < seeds:
                found.append(Trial("seed", arm.name, index, rate(arm, index, spec.ratio), seed))
    return found


def wanted(spec: Spec, done: Done) -> list[Trial]:
    """Every trial that the study needs, as far as finished outcomes decide it; a pure function."""
    trials, _ = rate_trials(spec, done)
    if any(t.key not in done for t in trials):
        return trials
    return [*trials, *seed_trials(spec, done, trials)]


# ------------------------------------------------------------------------------------------------------------ giving up


def earlier(trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
    """The rates of the same arm and seed that stand before a trial in the plan."""
    own = [t for t in trials if t.arm == trial.arm and t.seed == trial.seed]
    return own[: own.index(trial)] if trial in own else []


def should_stop(trial: Trial, steps: Sequence[int], losses: Sequence[float], spec: Spec, done: Done) -> bool:
    """Give a hopeless rate up, in the search alone.

    Not while an earlier one is still running: what is given up must not depend on who finished first.
    """
    if not spec.prune or trial.phase != "rate" or trial.seed != spec.rate_seed:
        return False
    trials, _ = rate_trials(spec, done)
    before = earlier(trial, trials)
    if any(t.key not in done for t in before):
        return False
    finished = in_order(spec, done, before)
    return hopeless(steps, losses, spec.steps, [finished[t.key] for t in before])


def hopeless(steps: Sequence[int], losses: Sequence[float], total: int, before: Sequence[Outcome]) -> bool:
    """Past three quarters of the steps, and at every evaluation since half of them, above what an earlier rate that ran
    to its end had at its very first evaluation.

    In the recorded studies no best rate was above that for longer than a spike: of 26 arms one (`delta-lora`, 0.002)
    was at half of the steps, by 1.6 nats, and back below it two evaluations later (tests/test_records.py).
    """
    if not steps or not GIVE_UP_AFTER * total <= steps[-1] < total:
        return False
    whole = [o for o in before if not o.diverged and not o.pruned and o.losses]
    late = [loss for step, loss in zip(steps, losses, strict=True) if step >= total / 2]
    return bool(whole) and min(late) > min(o.losses[0] for o in whole)


def in_order(spec: Spec, done: Done, trials: Sequence[Trial]) -> dict[str, Outcome]:
    """Outcomes as one worker, going through the plan in order, would have had them.

    With several workers a rate may run to its end although an earlier one, unfinished then, would have ended it: it
    counts as given up, at that step. Live `should_stop` never gives up more than this.
    """
    found = dict(done)
    if not spec.prune:
        return found
    for trial in (t for t in trials if t.seed == spec.rate_seed and t.key in found):
        o = found[trial.key]
        before = [found[t.key] for t in earlier(trial, trials) if t.key in found]
        for n in range(1, len(o.steps) + 1):
            if hopeless(o.steps[:n], o.losses[:n], spec.steps, before):
                found[trial.key] = _given_up(o, n)
                break
    return found


def _given_up(o: Outcome, n: int) -> Outcome:
    """The outcome after n evaluations; what was measured later is forgotten."""
    steps, seconds, losses = o.steps[:n], o.seconds[:n], o.losses[:n]
    ended = replace(o, steps=steps, seconds=seconds, losses=losses, pruned=True)
    return replace(ended, metrics={}, rank=0, ranks=None, step_tokens=0.0)
