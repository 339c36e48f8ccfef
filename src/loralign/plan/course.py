"""The course of an outer loop: links, what each one trains, what is committed; whether its rules have room in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from loralign.plan.combinations import draw, probe
from loralign.types import Episode, LoralignError, Recipe, Site, Train


def course(recipe: Recipe, total_steps: int | None, names: Sequence[str]) -> list[Episode]:
    """The links of a run of so many steps; of unknown length (0, None): the first alone."""
    found: list[Episode] = []
    done, total = 0, total_steps or 2**31
    while done < total and (episode := recipe.outer.episode(len(found), total, names, draw)) is not None:
        found.append(episode)
        done += episode.steps
        if not total_steps:
            break
    return found


def links(recipe: Recipe, total_steps: int, names: Sequence[str]) -> int:
    """How many links a run of so many steps has."""
    return len(course(recipe, total_steps, names))


def trained_by(episode: Episode, names: Sequence[str]) -> frozenset[str]:
    """The sites that a link trains."""
    return frozenset(names if episode.sites is None else episode.sites)


def commits(episodes: Sequence[Episode], ranks: Mapping[str, int]) -> Counter[str]:
    """Slots of each site that knots turn into frozen ones; the last link stays live."""
    found: Counter[str] = Counter()
    for episode in episodes[:-1]:
        for name in trained_by(episode, list(ranks)):
            found[name] += min(ranks[name], episode.slots or ranks[name])
    return found


def sides(recipe: Recipe, found: Sequence[Site]) -> dict[str, Train]:
    """The factors that train at each site, at the start; some inits choose by the shape."""
    by_shape = {wide: probe(recipe, recipe.s(), (40, 48) if wide else (48, 40)).train for wide in (False, True)}
    return {site.name: by_shape[site.d_out < site.d_in] for site in found}


def idle(recipe: Recipe, total_steps: int | None) -> str:
    """What to say where a run ends before a rule acts, with the mend; "" where all act. None: of unknown length."""
    if why := _too_short(recipe, total_steps):
        return why
    first = 1 + max((rule.facts.wait_steps for rule in recipe.rules if rule.facts.wait_steps is not None), default=-1)
    if not first or (total_steps and first < total_steps):
        return ""
    said = f"{recipe.name}: its rule acts after step {first}"
    if not total_steps:
        return f"{said}: the run must have more, and how many `train.epochs` makes is known only with the rows"
    lower = f"lower `options.wait_steps` to {total_steps - 2} at most or " if total_steps > 1 else ""
    return (
        f"{said} and the run has {total_steps} steps, so it is trained as if without it: {lower}raise `train.steps` to "
        f"{first + 1} at least"
    )


def check_length(recipe: Recipe, total_steps: int | None) -> None:
    """Raise LoralignError where a rule's schedule cannot act in a run of so many steps (None, 0: of unknown length)."""
    if why := _too_short(recipe, total_steps):
        raise LoralignError(why)


def _too_short(recipe: Recipe, total_steps: int | None) -> str:
    """Why a schedule has no room in some link of a run, with the mend; "" where all have."""
    scheduled = [ask for rule in recipe.rules if (ask := rule.facts.too_short) is not None]
    if not total_steps or not scheduled:
        return ""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    link = min(total_steps, *(episode.steps for episode in course(recipe, total_steps, names)))
    where = f"in a link of {link} steps, " * (link < total_steps)
    return next((f"{recipe.name}: {where}{why}" for ask in scheduled if (why := ask(link))), "")
