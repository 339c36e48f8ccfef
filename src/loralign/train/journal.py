"""log.jsonl, one line per log of the Trainer, and progress; a loss that is not finite ends the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loralign.evidence import Progress
from loralign.io.json_file import parsed
from loralign.io.provenance import write_text
from loralign.types import WorkFailed

log = logging.getLogger("loralign")

BEFORE = 0
"""Step of the evaluation before training."""


class Journal(TrainerCallback):
    """The log of one run. resumed_step: lines beyond it are of an attempt that was cut off, None: a new run."""

    def __init__(self, path: Path, resumed_step: int | None, progress: Progress | None) -> None:
        self.path, self.progress = path, progress
        self.kept = [] if resumed_step is None else [e for e in entries(path) if e.get("step", 0) <= resumed_step]
        self.opened, self._tenth = False, 0

    @property
    def loss_before(self) -> float | None:
        """Evaluation loss before the first step, of a resumed run too."""
        return next((e["eval_loss"] for e in self.kept if e.get("step") == BEFORE and "eval_loss" in e), None)

    def note_evidence(self, facts: Mapping[str, Any]) -> None:
        """What the start knows, as the first line; `facts` may be empty."""
        if facts:
            self.kept.append({"step": BEFORE, "evidence": dict(facts)})

    def _open(self) -> None:
        """With the first line, so that a run which is refused leaves no file."""
        self.opened = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in self.kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        if not self.opened:
            self._open()
        entry = {"step": state.global_step, **logs}
        if "eval_loss" in logs and any(e.get("step") == entry["step"] and "eval_loss" in e for e in self.kept):
            return  # measured again for the export of a run that had ended
        self.kept.append(entry)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        self._say(state.global_step, state.max_steps, logs)
        loss = logs.get("loss")
        if loss is not None and not abs(loss) < float("inf"):
            raise WorkFailed(
                f"the loss is {loss} at step {state.global_step}: lower the learning rate, or look for broken rows in "
                "the data"
            )

    def _say(self, step: int, steps: int, logs: Mapping[str, Any]) -> None:
        """Every evaluation, and the training loss at the tenths of the way."""
        tenth = 10 * step // max(1, steps)
        if "eval_loss" in logs:
            when = f"step {step} of {steps}" if step else "before training"
            log.info("%s: evaluation loss %.4f", when, logs["eval_loss"])
        elif "loss" in logs and tenth > self._tenth:
            self._tenth = tenth
            log.info("step %d of %d: loss %.4f", step, steps, logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress("train", state.global_step, state.max_steps)


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; a kill may have cut the last one, others are named."""
    found, lines = [], path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry = parsed(line.decode("utf-8"))
            if isinstance(entry, dict) and isinstance(entry.get("step", 0), int):
                found.append(entry)
        except ValueError:
            continue
    if len(lines) - len(found) > 1 or (len(lines) > len(found) and lines[-1].endswith(b"}")):
        log.warning("%s holds %d lines that cannot be read: they are left out", path.name, len(lines) - len(found))
    return found
