"""The page of a study, and of one with several tasks: verdict, figures, tables, flags, how to reproduce, the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import yaml

from loralign.compare.curves import Curve, Interval
from loralign.compare.figures import Axis, bands, styles
from loralign.compare.page.charts import NARROW, WIDE, Arms, loss_chart, rate_charts
from loralign.compare.page.effects import Difference, effects_chart
from loralign.compare.page.heat import rank_charts
from loralign.compare.page.svg import tag
from loralign.compare.page.tables import arms_table, trials_table
from loralign.compare.rates import Rate
from loralign.compare.spec import BASELINE, Outcome, Spec, key_parts, rate
from loralign.compare.summary import in_plain_words
from loralign.compare.tables import budgets
from loralign.compare.verdict import FIXED, LEVEL, ArmResult, StudyResult

KINDS = {"text": "plain causal LM", "sft": "answers of a causal LM", "classify": "classification"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Shown:
    """What the page shows of one task. data: all of it as results.json has it."""

    spec: Spec
    result: StudyResult
    curves: Sequence[Curve]
    rates: Sequence[Rate]
    trials: Mapping[str, Outcome]
    data: Mapping[str, Any]


def page(studies: Sequence[Shown], overall: str = "") -> str:
    """The whole file. overall: what there is to say over several tasks."""
    first = studies[0]
    several, arms = len(studies) > 1, arms_of(studies)
    title = f"{_count(len(arms.names), 'arm')} on {PurePath(first.spec.model).name}" + (
        f", {len(studies)} tasks" if several else ""
    )
    body = [tag("p", "loralign compare", class_="above"), tag("h1", escape(title))]
    button = tag("button", "Dark", type="button", id="theme", hidden="")
    parts = [tag("header", tag("div", *body), button), overall]
    parts += [_study(s, i, arms, several=several) for i, s in enumerate(studies)]
    parts += [_reproduce(studies)] if several else []
    parts.append(tag("footer", f"Written by loralign {_version(first)}. Nothing on this page comes from the network."))
    data = [_embedded(f"data-{i}", s.data) for i, s in enumerate(studies)]
    head = [
        '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">', '<link rel="icon" href="data:,">',
        tag("title", escape(title)), tag("style", _colours(studies) + _file("style.css")),
    ]  # fmt: skip
    inside = [tag("main", *parts), '<div id="tip" role="status"></div>', *data, tag("script", _file("behaviour.js"))]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{"".join(inside)}</body></html>\n'


def _embedded(name: str, data: Mapping[str, Any]) -> str:
    """JSON within a script element: no `<` may end it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _version(shown: Shown) -> str:
    return str(shown.data["environment"]["versions"].get("loralign", ""))


def marked(said: str) -> str:
    """Text with `names` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(said))


# -------------------------------------------------------------------------------------------------------------- colours

LIGHT = {
    "paper": "#fdfdfb", "ink": "#1a1c1f", "soft": "#65686d", "rule": "#d9d8d2", "hair": "#ecebe6", "ghost": "#e3e2dc",
    "wash": "#f3f2ee", "link": "#1d5fa8", "heat": "#1d5fa8", "warn": "#f6e7c8", "warn-ink": "#6b4a00",
}  # fmt: skip
DARK = {
    "paper": "#16181b", "ink": "#e9e8e4", "soft": "#9da0a5", "rule": "#3a3d42", "hair": "#26292d", "ghost": "#303338",
    "wash": "#1f2226", "link": "#8bbcf2", "heat": "#7db4f0", "warn": "#4a3a16", "warn-ink": "#f3d999",
}  # fmt: skip


def _colours(studies: Sequence[Shown]) -> str:
    """Custom properties of both themes; an arm has one colour in every task."""
    arms = arms_of(studies)
    light = {**LIGHT, **{f"a{i}": s.colour for i, s in enumerate(arms.look[n] for n in arms.names)}}
    dark = {**DARK, **{f"a{i}": s.dark for i, s in enumerate(arms.look[n] for n in arms.names)}}
    written = [";".join(f"--{k}:{v}" for k, v in theme.items()) for theme in (light, dark)]
    own = "".join(f'[data-arm="{i}"]{{--c:var(--a{i})}}' for i in range(len(arms.names)))
    return (
        f":root{{{written[0]}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{written[1]}}}}}"
        f":root[data-theme=dark]{{{written[1]};color-scheme:dark}}:root[data-theme=light]{{color-scheme:light}}{own}\n"
    )


def arms_of(studies: Sequence[Shown]) -> Arms:
    """Of all tasks: the place of a name is the arm's number on the page."""
    names = tuple(dict.fromkeys(arm.name for s in studies for arm in s.spec.arms))
    return Arms(names, styles(names))


# ------------------------------------------------------------------------------------------------------------ one task


def _study(s: Shown, number: int, arms: Arms, *, several: bool) -> str:
    heading = tag("h2", escape(s.spec.task_name), id=f"task-{number}") if several else ""
    parts = [heading, tag("p", marked(in_plain_words(s.result)), class_="verdict"), _facts(s)]
    if figures := _figures(s, arms):
        parts += [chips(arms, [a.name for a in s.spec.arms]), *figures]
    parts += [*([_table(s, arms)] if s.result.arms else []), _said(s)]
    parts += [*([] if several else [_reproduce([s])]), _trials(s, arms, number, several=several)]
    return tag("div", *parts, data_study=number, class_="task" if several else None)


def section(title: str, how: str, *inside: str) -> str:
    return tag("section", tag("h2", title), tag("p", how, class_="how") if how else "", *inside)


def _facts(s: Shown) -> str:
    spec, done = s.spec, s.trials
    devices = ", ".join(sorted({o.device for o in done.values() if o.device}))
    tokens = next((o.step_tokens for o in done.values() if o.step_tokens), 0.0)
    rows = PurePath(spec.task.train)
    named = rows.parent.name if rows.stem in ("train", "rows") and rows.parent.name else rows.name
    rates = f"{_count(max(spec.rates, len(s.rates) // len(spec.arms)), 'rate')} per arm"
    judged = f", the best {spec.finalists} on {spec.choice_seeds} seeds" if spec.choice_seeds > 1 else ", one seed"
    said = {
        "Task": f"{KINDS[spec.task.kind]}, {named}",
        "One trial": f"{spec.steps} steps of {spec.batch_size} rows" + (f", {tokens:,.0f} tokens" if tokens else ""),
        "Search": f"{rates}{judged}, on validation rows",
        "Result": f"test rows, {spec.seeds} other seeds, {spec.baseline_seeds} of lora",
        "Trials": f"{len(done)} on {devices}" if devices else str(len(done) or "none yet"),
    }
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", escape(v))) for k, v in said.items()), class_="facts")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def chips(arms: Arms, shown: Sequence[str]) -> str:
    made = [
        tag("button", "<i></i>", escape(name), type="button", data_arm=i, aria_pressed="false")
        for i, name in enumerate(arms.names)
        if name in shown
    ]
    return tag("div", *made, class_="chips", role="group", aria_label="Bring an arm forward in all figures")


def both(wide: str, narrow: str) -> str:
    return tag("div", wide, class_="wide") + tag("div", narrow, class_="narrow")


def _figures(s: Shown, arms: Arms) -> list[str]:
    made = []
    if found := differences(s.result.arms):
        how = (
            f"Final test loss less <code>{BASELINE}</code>’s. Dot and line: the mean and its {LEVEL} interval, which "
            "holds for the arm’s whole family together. Pale bar: the effect shrunken towards the other arms’, 95 %. "
            + FIXED
        )
        made.append(section("Effects", how, both(*(effects_chart(found, arms, room) for room in (WIDE, NARROW)))))
    budget = s.spec.steps if s.spec.charge != "none" else math.inf
    axes: tuple[tuple[Axis, str], ...] = (("charged_steps", "steps"), ("seconds", "seconds"))
    for axis, unit in axes:
        if lines := bands(s.curves, axis, budget):
            how = f"Mean over seeds, band from the lowest seed to the highest. What a start reads counts in its {unit}."
            charts = (loss_chart(lines, arms, room, unit=unit) for room in (WIDE, NARROW))
            made.append(section(f"Test loss against {unit}", how, both(*charts)))
    if small := rate_charts(s.rates, arms):
        ringed = "chosen one" if s.result.arms else "best so far"
        how = (
            f"Final validation loss of every rate that was tried; the {ringed} is ringed, the other arms are drawn in "
            "grey. Above the axis: × diverged, – given up, ⌃ a loss too high for it."
        )
        made.append(section("Learning rates", how, tag("div", *small, class_="few")))
    if ranks := {a.arm: a.ranks for a in s.result.arms if a.ranks}:
        how = (
            "Mean over seeds by layer, from the top, and kind of module: slots that live where a rule decides about "
            "them, else the rank of an export. One scale for all arms."
        )
        made.append(section("Ranks at the end", how, tag("div", *rank_charts(ranks, arms), class_="maps")))
    return made


def differences(arms: Sequence[ArmResult]) -> list[Difference]:
    """Arm − baseline of every tested arm, the lowest first."""
    found = []
    for a in arms:
        if a.comparison is None:
            continue
        f, e = a.comparison.final, a.effect
        tested = Interval(-f.mean, -f.high, -f.low, f.n)
        found.append(
            Difference(a.arm, tested, (-e.mean, -e.high, -e.low) if e else None, e.better if e else None, a.kind)
        )
    return sorted(found, key=lambda d: d.tested.mean)


def _table(s: Shown, arms: Arms) -> str:
    how = (
        f"Test loss at each arm’s own best rate, ± 95 % over seeds; against lora: {LEVEL} for a whole family together."
    )
    return section("All arms", f"{how} A head sorts{budgets(s.result.notes)}.", arms_table(s.result, arms.names.index))


def _said(s: Shown) -> str:
    """Flags first, then notes about the whole, then what is said of every arm."""
    flags = [_item(_sort(flag), f"<b>{escape(a.arm)}</b>: {marked(flag)}") for a in s.result.arms for flag in a.flags]
    notes = [_item(_sort(note), marked(note[:1].upper() + note[1:])) for note in s.result.notes]
    arms = [_item("", f"<b>{escape(a.arm)}</b>: {marked(a.sentence)}") for a in s.result.arms]
    nothing = [_item("", "Every best rate lies inside its grid, no seed diverged, all arms had the same budget.")]
    inside = tag("ul", *(flags + notes or nothing), class_="said")
    every = tag("details", tag("summary", "Every arm in a sentence"), tag("ul", *arms, class_="said")) if arms else ""
    return section("Flags and notes", "", inside, every)


def _item(sort: str, said: str) -> str:
    return tag("li", tag("span", sort, class_="flag") if sort else "", said)


SORTS = {
    "failed": "failed and left out", "edge": "edge of its grid", "diverged": "diverged on",
    "few seeds": "fewer than", "unequal budget": "charged",
    "unfinished": "unfinished", "control": "the control fails", "same task": "tuned on this very task",
    "shared rows": "stand in the training", "devices": "not comparable",
}  # fmt: skip
"""What a flag or note is about, by words that it holds."""


def _sort(said: str) -> str:
    return next((sort for sort, words in SORTS.items() if words in said), "note")


def _reproduce(studies: Sequence[Shown]) -> str:
    first = studies[0]
    text = yaml.safe_dump(dict(first.data["study"]), sort_keys=False, allow_unicode=True, width=100)
    env = first.data["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    prints = [f"{s.spec.task_name} {k} {v}".strip() for s in studies for k, v in sorted(s.spec.content.items())]
    told = f"Report written with Python {env['python']}, {versions}."
    inside = [tag("pre", "loralign compare study.yaml"), _folded("study.yaml", text)]
    inside += [_folded("Fingerprints of model and data", "\n".join(prints))] if prints else []
    inside.append(tag("p", escape(told), class_="how"))
    how = "Interrupted anywhere, the same command goes on where it was; on a CPU it ends the same to the last bit."
    return section("Reproduce", how, *inside)


def _folded(summary: str, text: str) -> str:
    return tag("details", tag("summary", summary), tag("pre", escape(text)))


def _trials(s: Shown, arms: Arms, number: int, *, several: bool) -> str:
    lrs = {}
    for key in s.trials:
        _, arm, index, _ = key_parts(key)
        own = next((a for a in s.spec.arms if a.name == arm), None)
        if own:
            lrs[key] = rate(own, index, s.spec.ratio)
    known = {k: o for k, o in s.trials.items() if k in lrs}
    task = s.spec.task_name
    file, name = (f"{task}/results.json", f"results-{task}.json") if several else ("results.json",) * 2
    link = tag("a", "Download all of it as JSON", href=file, download=name, data_from=f"data-{number}")
    table = tag("details", tag("summary", _count(len(known), "trial")), trials_table(known, lrs, arms.names.index))
    how = "Every trial with its whole curve is part of this file, as results.json has it."
    return section("Raw trials", how, tag("div", link, class_="tools"), table if known else "")
