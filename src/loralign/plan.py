"""What may be combined, and what a run will cost: one table, read before anything is spent."""

from __future__ import annotations

from loralign.types import LoralignError, Recipe


def check_combination(recipe: Recipe) -> None:
    """Raise LoralignError, with the alternative, where the axes of a recipe do not go together."""
    accepts = recipe.transform.accepts
    if not recipe.form.identity and "gated" not in accepts:
        raise LoralignError(
            f"{recipe.name}: a form that computes its factors hides the pair from this optimizer; use transform adamw"
        )
