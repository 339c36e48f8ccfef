"""Regular expressions over module names: checked before anything is matched, because a bad one never ends."""

from __future__ import annotations

import re
import subprocess
import sys

from loralign.types import LoralignError

SECONDS = 5.0
NAMES = (
    "model.layers.31.self_attn.q_proj",
    "model.language_model.layers.17.mlp.experts.63.down_proj",
    "transformer.h.11.attn.c_attn",
    "encoder.block.23.layer.1.DenseReluDense.wi_0",
    "distilbert.transformer.layer.5.attention.out_lin_with_a_long_name",
)
_TRY = "import re, sys; pattern = re.compile(sys.argv[1]); [pattern.fullmatch(name) for name in sys.argv[2:]]"


def check_pattern(pattern: str, key: str = "targets") -> None:
    """Raise LoralignError for a broken expression, and for one that takes seconds on a module's name.

    Example:
        >>> check_pattern(r".*\\.(q|v)_proj")
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise LoralignError(
            f"`{key}` {pattern[:60]!r} is no regular expression ({error}); a list of endings is [q_proj, v_proj]"
        ) from error
    if not _may_run_away(pattern):
        return
    try:  # in another process: the matcher cannot be interrupted in this one, unless it is the main thread
        subprocess.run([sys.executable, "-I", "-S", "-c", _TRY, pattern, *NAMES], timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoralignError(
            f"`{key}` {pattern[:60]!r} takes more than {SECONDS:.0f} s on one module's name: it repeats a repetition, "
            "as (a+)+ does; repeat once"
        ) from error


def _may_run_away(pattern: str) -> bool:
    """Whether it holds more than two repetitions: with fewer the time is bounded by the square of the name's length."""
    return len(re.findall(r"[*+?}]", pattern)) > 2
