"""Rows of supervised fine-tuning: from the formats people have to the ones that TRL's SFTTrainer takes.

    read_rows → rows_format → to_trl → split_eval → chat.fit → SFTTrainer

    format              columns                                         becomes
    messages            messages (role, content)                        messages
    prompt-completion   prompt, completion (both text, or messages)     prompt, completion
    sharegpt            conversations (from, value), system?            messages
    alpaca              instruction, input?, output, system?, history?  prompt, completion (messages)
    text                text                                            text

The first that fits, from the top. Text is trained as it stands, with the end token after it; messages go through the
chat template. An alpaca prompt is `instruction`, a line break and `input`; `system` becomes a system turn when it isn't
empty; `history` holds earlier [question, answer] pairs. `tools` rides along. Other columns are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from loralign.data.read import Row, as_dataset, name_of, read_rows
from loralign.types import LoralignError

Format = Literal["messages", "prompt-completion", "sharegpt", "alpaca", "text"]

NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Parts of a turn beside role and content that chat templates read."""

Turn = dict[str, Any]


def rows_format(dataset: Dataset) -> Format:
    """Which format the columns are, the first that fits.

    Raises:
        LoralignError: preference rows, or columns that fit no format.
    """
    columns = dataset.column_names
    if {"chosen", "rejected"} <= set(columns):
        raise LoralignError(
            f"{name_of(dataset)} holds preference rows ({', '.join(columns)}), which task sft can't train on: keep the "
            "chosen answer as `completion`, or use TRL's DPOTrainer with loralign.attach"
        )
    for name, needed in NEEDED.items():
        if all(c in columns for c in needed):
            return name
    wanted = "; ".join(" and ".join(needed) for needed in NEEDED.values())
    raise LoralignError(
        f"{name_of(dataset)}, row 1 has the columns {', '.join(columns)}: rename them to one of: {wanted}"
    )


def to_trl(dataset: Dataset, format: Format) -> Dataset:
    """The rows as SFTTrainer takes them, each checked; see the table above.

    Raises:
        LoralignError: a row without the needed column or turn, with its file and number.
    """
    return as_dataset(_converted(dataset, format), name_of(dataset))


def _converted(dataset: Dataset, format: Format) -> Iterator[Row]:
    convert = CONVERT[format]
    for n, row in enumerate(dataset, 1):
        where = f"{name_of(dataset)}, row {n}"
        for column in NEEDED[format]:
            if row[column] is None:
                found = [c for c in row if row[c] is not None]
                raise LoralignError(
                    f"{where} has no `{column}`, only {', '.join(found) or 'nothing'}: {format} rows need "
                    f"{' and '.join(NEEDED[format])}"
                )
        tools = row.get("tools")
        yield convert(row, where) | ({} if not tools else {"tools": _as_json(tools)})


# ----------------------------------------------------------------------------------------------------------- one format


def _messages(row: Row, where: str) -> Row:
    return {"messages": _conversation(row["messages"], where)}


def _sharegpt(row: Row, where: str) -> Row:
    turns = _conversation(row["conversations"], where)
    return {"messages": turns if turns[0]["role"] == "system" else _system(row, where) + turns}


def _alpaca(row: Row, where: str) -> Row:
    turns = _system(row, where)
    for pair in row.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise LoralignError(f"{where}: `history` isn't a list of [question, answer] pairs: write it so")
        turns += [_turn("user", pair[0], where), _turn("assistant", pair[1], where)]
    question = _text(row["instruction"], "`instruction`", where)
    given = row.get("input")
    if given:
        question += "\n" + _text(given, "`input`", where)
    return {
        "prompt": [*turns, _turn("user", question, where)],
        "completion": [_turn("assistant", row["output"], where)],
    }


def _prompt_completion(row: Row, where: str) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    asked = [_turn("user", prompt, where)] if isinstance(prompt, str) else _turns(prompt, "`prompt`", where)
    answered = (
        [_turn("assistant", completion, where)]
        if isinstance(completion, str)
        else _turns(completion, "`completion`", where)
    )
    if any(t["role"] != "assistant" for t in answered):
        raise LoralignError(
            f"{where}: `completion` holds a turn that isn't the assistant's: give the whole conversation as `messages`"
        )
    return {"prompt": asked, "completion": answered}


def _plain_text(row: Row, where: str) -> Row:
    return {"text": _text(row["text"], "`text`", where)}


CONVERT: dict[Format, Callable[[Row, str], Row]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _plain_text,
}


# ---------------------------------------------------------------------------------------------------------------- turns


def _conversation(value: Any, where: str) -> list[Turn]:
    turns = _turns(value, "the conversation", where)
    if all(t["role"] != "assistant" for t in turns):
        raise LoralignError(f"{where} has no assistant turn, so nothing to learn from: add the answer or drop the row")
    return turns


def _turns(value: Any, what: str, where: str) -> list[Turn]:
    if not isinstance(value, list) or not value or not all(isinstance(t, dict) for t in value):
        raise LoralignError(f"{where}: {what} is no list of turns: write [{{role, content}}, …]")
    return [_one_turn(turn, where) for turn in value]


def _one_turn(turn: Turn, where: str) -> Turn:
    said = turn.get("role") or turn.get("from")
    if said not in ROLES:
        known = ", ".join(ROLES)
        raise LoralignError(f"{where}: a turn has the role {said!r}: use one of {known}")
    content = turn.get("content", turn.get("value"))
    extra = {k: turn[k] for k in KEPT if turn.get(k) is not None}
    if content is None and extra.get("tool_calls"):
        content = ""
    return _turn(ROLES[said], content, where) | extra


def _turn(role: str, content: Any, where: str) -> Turn:
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": _text(content, f"the {role}'s turn", where)}


def _system(row: Row, where: str) -> list[Turn]:
    return [_turn("system", row["system"], where)] if row.get("system") else []


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        found = "missing" if value is None else f"of type {type(value).__name__}"
        raise LoralignError(f"{where}: {what} is {found}: write it as text")
    return value


# ------------------------------------------------------------------------------------------------- split and provenance


def split_eval(dataset: Dataset, held_out: float | str | Path, *, seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, evaluation rows), both in the order they had.

    held_out: a share in (0, 1) of the rows, or a file whose rows are all for evaluation. A share goes by a hash of each
    row's content keyed by the seed: the order of the rows doesn't matter, equal rows stay on one side, and no more than
    the share is held out.
    """
    if isinstance(held_out, str | Path):
        rows = read_rows(held_out)
        return dataset, to_trl(rows, rows_format(rows))
    if not 0 < held_out < 1:
        raise LoralignError(f"eval {held_out} is no share: give a number between 0 and 1, or a file")
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(dataset):
        key = blake2b(_as_bytes(row), digest_size=16, key=str(seed).encode()).digest()
        groups.setdefault(key, []).append(i)
    chosen: set[int] = set()
    for _, rows_alike in sorted(groups.items()):
        if len(chosen) + len(rows_alike) <= round(held_out * len(dataset)):
            chosen.update(rows_alike)
    held = sorted(chosen)
    kept = [i for i in range(len(dataset)) if i not in chosen]
    if not kept or not held:
        side = "training" if held else "evaluation"
        raise LoralignError(
            f"eval {held_out} of the {len(dataset)} rows of {name_of(dataset)} leaves no {side} row "
            f"({len(groups)} of them differ): give another share, more rows, or a file"
        )
    return dataset.select(kept), dataset.select(held)


def fingerprint(dataset: Dataset, *settings: Any) -> str:
    """A hash of the rows, in order, and of settings (plain values, paths, dataclasses); equal on every machine."""
    digest = blake2b(digest_size=16)
    for part in (*settings, len(dataset)):
        _add(digest, _as_bytes(part))
    for row in dataset:
        _add(digest, _as_bytes(row))
    return digest.hexdigest()


def _add(digest: blake2b, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _as_bytes(value: Any) -> bytes:
    return _as_json(value).encode("utf-8", "surrogatepass")


def _as_json(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"dataclass": type(value).__name__, **asdict(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path | bytes) or type(value).__module__ == "datetime":
        return repr(value)
    raise TypeError(f"{type(value).__name__} has no stable fingerprint: pass plain values")
