"""The course of an outer loop: links, what each one trains, what is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from loralign.plan.combinations import draw, probe
from loralign.types import Episode, Recipe, Site, Train


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
