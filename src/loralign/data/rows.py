"""Rows of supervised fine-tuning: from the formats people have to prompts, completions, conversations and text.

    read_rows → named → rows_format → to_trl → read_sources (several) → split_eval → chat.fit → SFTTrainer

    format              columns                                         becomes
    messages            messages (role, content), system?               messages
    prompt-completion   prompt, completion (both text, or messages)     prompt, completion
    sharegpt            conversations (from, value), system?            messages
    alpaca              instruction, input?, output, system?, history?  prompt, completion (messages)
    text                text                                            text

The first that fits, from the top. Text is trained as it stands, with the end token after it; messages go through the
chat template. An alpaca prompt is `instruction`, a line break and `input`; `system` becomes a system turn when it isn't
empty and the conversation has none; `history` holds earlier [question, answer] pairs. `tools` and
`chat_template_kwargs` ride along. What means something that is not done here (images, documents, a weight) is refused;
other columns are named and not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loralign.data.columns import MARKS, NAMES, NEEDED, OPTIONAL, REFUSED, Format, faults, likely
from loralign.data.read import read_rows
from loralign.data.table import Row, Rows, collected
from loralign.data.turns import Turn, is_learnt, parsed, text, turn, turns_of
from loralign.types import LoralignError

log = logging.getLogger("loralign")


def named(rows: Rows, columns: Mapping[str, str], known: Iterable[str] = NAMES) -> Rows:
    """The rows under our names of columns. columns: our name -> the name in the rows. known: what ours may be.

    Raises:
        LoralignError: a name that is none of ours, a column that no row has, one that is mapped twice, or one that has
            our name already and keeps it.
    """
    if wrong := faults(columns, known):
        raise LoralignError(f"{rows.name}: `columns` {wrong}")
    for ours, theirs in columns.items():
        if theirs not in rows.columns:
            near = get_close_matches(theirs, rows.columns, n=1, cutoff=0.6)
            mend = f"did you mean {near[0]!r}? They are" if near else "they are"
            own = (
                f", which need no other names: {{source: {rows.name}, columns: {{}}}}" if _fitting(rows.columns) else ""
            )
            raise LoralignError(
                f"{rows.name} has no column {theirs!r}, which `columns` names for `{ours}`; {mend} "
                f"{', '.join(rows.columns)}{own}"
            )
        if ours in rows.columns and ours not in columns.values():
            raise LoralignError(
                f"{rows.name} has a column {ours!r} of its own beside {theirs!r}, which `columns` names for `{ours}`: "
                f"leave that out of `columns`, or drop the column {ours!r}"
            )
    called = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    return replace(rows, columns=tuple(called.get(c, c) for c in rows.columns), called=called) if called else rows


def _fitting(columns: Collection[str]) -> list[Format]:
    """Formats whose columns are all there."""
    return [name for name, needed in NEEDED.items() if all(c in columns for c in needed)]


def rows_format(rows: Rows) -> Format:
    """Which format the columns are, the first that fits and uses every column that has another name.

    Raises:
        LoralignError: preference rows, or columns that fit no format.
    """
    columns, mapped = rows.columns, set(rows.called.values())
    if {"chosen", "rejected"} <= set(columns):
        raise LoralignError(
            f"{rows.name} holds preference rows ({', '.join(columns)}), which task sft can't train on: keep the "
            "chosen answer as `completion` (`data.columns: {completion: chosen}`), or use TRL's DPOTrainer with "
            "loralign.attach"
        )
    fitting = _fitting(columns)
    for name in fitting:
        if mapped <= {*NEEDED[name], *OPTIONAL[name]}:
            return name
    if fitting:
        idle = next(c for c in mapped if c not in (*NEEDED[fitting[0]], *OPTIONAL[fitting[0]]))
        raise LoralignError(
            f"{rows.name}: `columns` names a `{idle}`, which {fitting[0]} rows don't use: leave it out, or name "
            f"{' and '.join(next(n for k, n in NEEDED.items() if idle in (*n, *OPTIONAL[k])))} too"
        )
    own = {ours: theirs for theirs, ours in rows.called.items()}
    shown = ", ".join(f"{own[c]} (as `{c}`)" if c in own else c for c in columns)
    guess = ", ".join(f"{ours}: {theirs}" for ours, theirs in likely(columns).items()) or "instruction: …, output: …"
    wanted = "; ".join(" and ".join(needed) for needed in NEEDED.values())
    raise LoralignError(
        f"{rows.name}, row 1 has the columns {shown}: rename them to one of: {wanted}; or map them by `data.columns` "
        f"(`--columns`, a study's `task.columns`): {{{guess}}}"
    )


def read_trl(source: str | Path, columns: Mapping[str, str] | None = None, split: str | None = None) -> Rows:
    """The rows of a file, a folder or a hub id as conversations, prompts and completions, or text.

    columns: our names -> those in the rows, where they differ.
    """
    rows = read_named(source, columns, split)
    return to_trl(rows, rows_format(rows))


def read_named(source: str | Path, columns: Mapping[str, str] | None = None, split: str | None = None) -> Rows:
    """The rows of a file, a folder or a hub id under our names of columns."""
    columns = columns or {}
    return named(read_rows(source, split, columns.values()), columns)


def has_turns(row: Row) -> bool:
    """Whether a row of `to_trl` goes through the chat template."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def to_trl(rows: Rows, format: Format) -> Rows:
    """The rows as conversations, prompts and completions, or text, each checked; see the table above.

    Raises:
        LoralignError: a row without the needed column or turn, or with one that can't be used; with file and number.
    """
    used = (*NEEDED[format], *OPTIONAL[format])
    if unused := [c for c in rows.columns if c not in used and c not in REFUSED]:
        log.info("%s: not used: the column%s %s", rows.name, "s" * (len(unused) > 1), ", ".join(unused))
    return replace(collected(_converted(rows, format), rows.name), places=rows.places)


def _converted(rows: Rows, format: Format) -> Iterator[Row]:
    convert, own = CONVERT[format], {ours: theirs for theirs, ours in rows.called.items()}
    for n, row in enumerate(rows):
        where = rows.places.said(n)
        for column in NEEDED[format]:
            if row.get(column) is None:
                found = [own.get(c, c) for c in row if row[c] is not None]
                raise LoralignError(
                    f"{where} has no `{own.get(column, column)}`, only {', '.join(found) or 'nothing'}: {format} rows "
                    f"need {' and '.join(own.get(c, c) for c in NEEDED[format])}"
                )
        _check_refused(row, where)
        made = convert(row, where)
        yield made | (_for_template(row, where) if isinstance(made.get("prompt", []), list) else {})


def _check_refused(row: Row, where: str) -> None:
    for column in REFUSED:
        value = row.get(column)
        if column in MARKS:
            if value is False or (column == "weight" and value is not None and not is_learnt({column: value}, where)):
                raise LoralignError(f"{where}: `{column}` says that the row is not to be learnt: drop the row")
        elif value:
            raise LoralignError(
                f"{where}: `{column}` can't be used here, only text is trained: drop the column or the row"
            )


def _for_template(row: Row, where: str) -> Row:
    """What the chat template reads beside the turns."""
    found: Row = {}
    if tools := parsed(row.get("tools"), where):
        tools = [parsed(tool, where) for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise LoralignError(f"{where}: `tools` is no list of objects: write tool definitions, or their JSON text")
        found["tools"] = tools
    if options := parsed(row.get("chat_template_kwargs"), where):
        if not isinstance(options, dict):
            raise LoralignError(f"{where}: `chat_template_kwargs` is no object: write {{name: value}}")
        found["chat_template_kwargs"] = options
    return found


# ----------------------------------------------------------------------------------------------------------- one format


def _messages(row: Row, where: str) -> Row:
    return {"messages": _conversation(row, row["messages"], where)}


def _sharegpt(row: Row, where: str) -> Row:
    return {"messages": _conversation(row, row["conversations"], where)}


def _alpaca(row: Row, where: str) -> Row:
    turns: list[Turn] = []
    for pair in parsed(row.get("history"), where) or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise LoralignError(f"{where}: `history` isn't a list of [question, answer] pairs: write it so")
        turns += [turn("user", pair[0], where), turn("assistant", pair[1], where)]
    question = text(row["instruction"], "`instruction`", where)
    given = row.get("input")
    if given:
        question += "\n" + text(given, "`input`", where)
    return {
        "prompt": _after_system(row, [*turns, turn("user", question, where)], where),
        "completion": [turn("assistant", row["output"], where)],
    }


TEXT_OR_TURNS = "text in quotes, or [{role, content}, …]"


def _prompt_completion(row: Row, where: str) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if said := [c for c in OPTIONAL["prompt-completion"] if row.get(c)]:
            raise LoralignError(
                f"{where}: `{said[0]}` goes through the chat template, which prompt and completion as text don't: "
                "give them as lists of turns"
            )
        return {"prompt": prompt, "completion": completion}
    asked = (
        [turn("user", prompt, where)] if isinstance(prompt, str) else turns_of(prompt, "`prompt`", where, TEXT_OR_TURNS)
    )
    answered = (
        [turn("assistant", completion, where)]
        if isinstance(completion, str)
        else turns_of(completion, "`completion`", where, TEXT_OR_TURNS)
    )
    if any(t["role"] != "assistant" for t in answered):
        raise LoralignError(
            f"{where}: `completion` holds a turn that isn't the assistant's: give the whole conversation as `messages`"
        )
    return {"prompt": _after_system(row, asked, where), "completion": answered}


def _plain_text(row: Row, where: str) -> Row:
    return {"text": text(row["text"], "`text`", where)}


CONVERT: dict[Format, Callable[[Row, str], Row]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _plain_text,
}


def _conversation(row: Row, value: Any, where: str) -> list[Turn]:
    turns = turns_of(value, "the conversation", where)
    if all(t["role"] != "assistant" or "weight" in t for t in turns):
        raise LoralignError(f"{where} has no assistant turn, so nothing to learn from: add the answer or drop the row")
    return _after_system(row, turns, where)


def _after_system(row: Row, turns: list[Turn], where: str) -> list[Turn]:
    """The turns, after the row's `system` where they don't begin with a system turn."""
    if not row.get("system") or turns[0]["role"] in ("system", "developer"):
        return turns
    return [turn("system", row["system"], where), *turns]
