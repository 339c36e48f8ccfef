"""The columns that rows may have, by format; what each means is in `rows.py`. And other names for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Literal

Format = Literal["messages", "prompt-completion", "sharegpt", "alpaca", "text"]

NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
TEMPLATE = ("tools", "chat_template_kwargs")
"""Read by chat templates, beside the turns."""
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", *TEMPLATE),
    "prompt-completion": ("system", *TEMPLATE),
    "sharegpt": ("system", *TEMPLATE),
    "alpaca": ("input", "system", "history", *TEMPLATE),
    "text": (),
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MARKS = ("weight", "train", "loss", "trainable")
"""0 or false: not to be learnt; of a turn, or of a row."""
REFUSED = ("documents", *MEDIA, *MARKS)
"""Mean something that is not done here: refused where a row says so."""
NAMES = tuple(dict.fromkeys(c for by_format in (NEEDED, OPTIONAL) for columns in by_format.values() for c in columns))
"""Of the columns that are trained."""
UNDERSTOOD = {*NAMES, *REFUSED}

USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "instruction": ("question", "query", "request", "instruction", "prompt", "user", "input", "source"),
    "output": ("answer", "response", "reply", "completion", "chosen", "assistant", "output", "target"),
    "text": ("content", "body", "document", "sentence", "article"),
}
"""What such columns are called elsewhere, the likelier name first."""


def faults(columns: Mapping[str, str], known: Iterable[str] = NAMES) -> str:
    """What is wrong with names of columns as {ours: theirs}, whatever the rows are; "" where nothing is."""
    known = tuple(known)
    if columns and not any(ours in known for ours in columns) and all(theirs in known for theirs in columns.values()):
        turned = ", ".join(f"{theirs}: {ours}" for ours, theirs in columns.items())
        return f"has our names on the right: write it the other way round, {{{turned}}}"
    for ours in columns:
        if ours in known:
            continue
        near = get_close_matches(ours, known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"the columns here are {', '.join(known)}"
        return f"maps {ours!r}, which is no column here; {mend}"
    twice = next((theirs for theirs, count in Counter(columns.values()).items() if count > 1), None)
    if twice is not None:
        both = " and ".join(repr(ours) for ours, theirs in columns.items() if theirs == twice)
        return f"maps both {both} to {twice!r}: a column has one meaning, drop one"
    return ""


def likely(there: Iterable[str]) -> dict[str, str]:
    """Names for columns of no format, {ours: theirs}, by what such columns are usually called; {} for unusual ones."""
    by_name = {column.strip().lower(): column for column in there}
    found = {ours: by_name[name] for ours, names in USUAL.items() for name in reversed(names) if name in by_name}
    for needed in (("messages",), ("instruction", "output"), ("text",)):
        if all(ours in found for ours in needed):
            return {ours: found[ours] for ours in needed if found[ours] != ours}
    return {}
