"""The columns that rows may have, by format; what each means is in `rows.py`."""

from __future__ import annotations

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
UNDERSTOOD = {c for by_format in (NEEDED, OPTIONAL) for columns in by_format.values() for c in columns} | {*REFUSED}
