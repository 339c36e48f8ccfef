"""A study as plain data: arms, grid, seeds, task. `config/` parses the file, nothing here interprets its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loralign.types import Full, Recipe

Phase = Literal["rate", "seed"]
Charge = Literal["steps", "read", "none"]
BASELINE, REFERENCE = "lora", "full"


@dataclass(frozen=True)
class Arm:
    """One competitor: a recipe or the full reference, and the centre of its learning-rate grid."""

    name: str
    recipe: Recipe | Full
    lr: float
    """Centre of the grid (the method's prior)."""
    lr_source: str = "given"
    tuned_on: tuple[tuple[str, str], ...] = ()
    """Tasks on which the centre was tuned: name and fingerprint of the training rows; a study on these says so."""
    family: str = "primary"
    """Arms that are tested together; each family has its own level, so that no arm weakens one of another family."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Options and preset as the study file has them, plain data."""


@dataclass(frozen=True)
class TaskSpec:
    """What is learned.

    kind "text": plain causal LM on `text` rows, cut into blocks of `length` tokens. "sft": rows with answers, loss on
    the answers. "classify": `text` and `label` rows, a fresh head with its own fixed learning rate.
    """

    kind: Literal["text", "sft", "classify"]
    train: str
    valid: str
    test: str
    length: int = 128
    head_lr: float = 1e-3
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our names of columns to those in the rows, where they differ."""


@dataclass(frozen=True)
class Budget:
    """Limits on the whole study; None: no limit."""

    trials: int | None = None
    minutes: float | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True)
class Spec:
    """Everything that decides the outcome, and where it is kept."""

    model: str
    task: TaskSpec
    arms: tuple[Arm, ...]
    output: Path
    steps: int = 300
    batch_size: int = 32
    micro_batch_size: int = 32
    eval_every: int = 25
    schedule: str = "cosine"
    warmup: float = 0.03
    rates: int = 5
    """Learning rates per arm, the same for all."""
    ratio: float = 2.0
    """Between neighbouring rates."""
    extensions: int = 3
    """How often one rate may be added to every arm because some arm's best lies at its edge."""
    finalists: int = 2
    """Of every arm's rates, so many run on further seeds before one is chosen."""
    choice_seeds: int = 3
    """Seeds on which the finalists are judged, the search's own among them."""
    seeds: int = 5
    """Reported seeds of an arm, 0 … seeds−1."""
    baseline_seeds: int = 5
    """Of `lora`, which every arm is compared with."""
    rate_seed: int = 1000
    """The seed of the search; the finalists' further ones follow it."""
    charge: Charge = "steps"
    """What becomes of the tokens that a start reads: an arm trains that many fewer steps, or is read at the step where
    they are paid for although it trained on, or they are not charged, which is then said."""
    prune: bool = True
    autocast: bool = True
    """bf16 autocast on GPUs over an fp32 base, the same for every arm."""
    compile: bool = False
    """Run compiled blocks on GPUs; rows must be of one length."""
    capture: bool = True
    """Replay recorded steps on GPUs."""
    cpu_threads: int = 1
    """Of a worker on a CPU. Sums depend on it to the last bit, so it belongs to the study and not to the machine."""
    references: bool = True
    """Whether `lora` and `full` were to be added."""
    budget: Budget = field(default_factory=Budget)
    source: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of model and data (`identity.content_of`); a study goes on with the same ones only."""
    reading: bool = False
    """Nothing will run, the journal is only read."""
    task_name: str = ""
    """Of a study of several tasks."""
    shared_rows: int = 0
    """Rows of the test file that stand in the training or validation file, too."""


@dataclass(frozen=True)
class Trial:
    """One training run. index: of the rate on the arm's grid, 0 = the prior, negative = below."""

    phase: Phase
    arm: str
    index: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.arm}/{self.index:+d}/{self.seed}"


def key_parts(key: str) -> tuple[str, str, int, int]:
    """Phase, arm, index and seed of a trial's key; an arm's name may hold any sign. Raises ValueError."""
    phase, rest = key.split("/", 1)
    arm, index, seed = rest.rsplit("/", 2)
    return phase, arm, int(index), int(seed)


def arm_of(key: str) -> str:
    return key_parts(key)[1]


@dataclass(frozen=True)
class Outcome:
    """What a trial measured. losses: on validation rows (phase rate) or test rows (phase seed), lower is better.

    seconds: since the trial's start, init included, evaluations not. init_tokens: read by evidence or preheating;
    step_tokens: by one optimizer step, the mean over the training rows; padding counts in neither. step_s: median over
    the stretches between evaluations. peak_bytes: of a GPU, 0 on a CPU. device: what the trial ran on.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    diverged: bool = False
    pruned: bool = False
    init_s: float = 0.0
    init_tokens: int = 0
    step_tokens: float = 0.0
    step_s: float = 0.0
    total_s: float = 0.0
    between_s: float = 0.0
    """What one trial after another costs beside training: unloading the last one, reset, init, trainer."""
    peak_bytes: int = 0
    trainable: int = 0
    rank: int = 0
    ranks: Mapping[str, int] | None = None
    """By module at the end: the slots that live where a rule decides about them, else the rank of an export. None
    without an adapter, where the trial diverged, and in trials from before this was kept."""
    begun_slots: int | None = None
    """Of all modules before the first step, where a rule decides about them."""
    device: str = ""
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A trial that raised an error. session: the run of the command that tried it; bad_input: the error is a mistake
    in what was given, not of the work."""

    key: str
    said: str
    session: str
    bad_input: bool = False


def grid(arm: Arm, count: int, ratio: float) -> list[Trial]:
    """`count` log-spaced rates around the prior, centre first, as trials on seed −1."""
    low = -((count - 1) // 2)
    indices = sorted(range(low, low + count), key=lambda i: (abs(i), -i))
    return [Trial("rate", arm.name, i, rate(arm, i, ratio), -1) for i in indices]


def rate(arm: Arm, index: int, ratio: float) -> float:
    """lr·ratioⁱ, rounded to four digits so that it reads well and is the same on every machine."""
    return float(f"{arm.lr * ratio**index:.4g}")
