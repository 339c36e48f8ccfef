"""ranks.jsonl: the slots of every module at each log of a run whose rule decides about them; ranks.png at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loralign.io.heatmap import heat_map
from loralign.io.provenance import write_text
from loralign.train.callback import RecipeCallback
from loralign.train.journal import entries

log = logging.getLogger("loralign")

NAME, PICTURE = "ranks.jsonl", "ranks.png"


class RankLog(TrainerCallback):
    """Of one run, in its output folder. Added after the recipe's own callback. resumed_step: lines beyond it are of an
    attempt that was cut off, None: a new run."""

    def __init__(self, run: RecipeCallback, folder: Path, resumed_step: int | None = None) -> None:
        self.run, self.folder = run, folder
        kept = [] if resumed_step is None else [e for e in entries(folder / NAME) if e["step"] <= resumed_step]
        self.course: dict[int, Mapping[str, int]] = {e["step"]: e["ranks"] for e in kept}

    @property
    def wanted(self) -> bool:
        return self.run.driver is not None and self.run.driver.allocates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(state)
        if self.wanted and state.is_world_process_zero:
            text = "".join(_line(step, ranks) for step, ranks in sorted(self.course.items()))
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / NAME, text)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._note(state) and state.is_world_process_zero:
            with (self.folder / NAME).open("a", encoding="utf-8") as file:
                file.write(_line(state.global_step, self.course[state.global_step]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_log(args, state, control)
        said = self.run.summary()  # on every rank: sharded gates are gathered
        if self.wanted and state.is_world_process_zero:
            picture(self.course, self.folder / PICTURE, f"{self.run.recipe.name}: {said}")

    def _note(self, state: Any) -> bool:
        """Whether there was something new to note."""
        if not self.wanted:
            return False
        assert self.run.driver is not None
        ranks = self.run.driver.ranks()  # on every rank, also where the first one knows this step from its file
        new = state.global_step not in self.course
        self.course.setdefault(state.global_step, ranks)
        return new


def _line(step: int, ranks: Mapping[str, int]) -> str:
    return json.dumps({"step": step, "slots": sum(ranks.values()), "ranks": dict(ranks)}) + "\n"


def picture(course: Mapping[int, Mapping[str, int]], path: Path, title: str) -> None:
    """The first, a middle and the last step side by side: rows are layers, columns kinds of modules."""
    steps = sorted(course)
    shown = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))
    most = max(max(course[step].values(), default=1) for step in shown)
    panels = {f"step {step}": {name: float(r) for name, r in course[step].items()} for step in shown}
    heat_map(panels, path, title=title, scale="rank", most=max(1, most))
