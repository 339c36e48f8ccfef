"""From a row to what is trained: the prompt of inference, then the answer, in tokens.

For every answer that is learnt, with the tokenizer's own template:

    prompt(turns before the answer) is the beginning of what is trained, and the answer's text follows it, with loss

Where one text holds this for all answers of a conversation, it is trained as one. Where it doesn't (a template that
drops the thoughts of earlier turns, or ends only the last one), each answer is trained alone, after its own prompt. A
template that does not begin an answer as its own prompt ends (a prompt that opens a thought, an answer without one)
leaves only the common beginning, and a template that drops thoughts trains the answer without them: both are noted. A
template that renders no tools, no tool call or not the answer is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loralign.data.prompt import Chat, Plain
from loralign.data.table import Row
from loralign.data.turns import THOUGHTS, Turn
from loralign.types import LoralignError

Note = Literal["prompt", "thoughts", "tokens", "empty"]


@dataclass(frozen=True)
class Sample:
    """One row of tokens. spans: those with loss, as (first, after the last). notes: what is not as the row said."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """A turn that is learnt. before: the prompt, or what the text shares with it; after: the text through its end."""

    prompt: str
    before: str
    after: str
    notes: tuple[Note, ...]


# ----------------------------------------------------------------------------------------------------------------- text


def of_text(plain: Plain, row: Row) -> Sample:
    ids = plain.encode(plain.ended(row["text"]))
    return Sample(ids, ((0, len(ids)),))


def of_completion(plain: Plain, row: Row) -> Sample:
    """Prompt and completion as text."""
    notes: tuple[Note, ...] = () if row["completion"].strip() else ("empty",)
    return _after(plain, row["prompt"], row["prompt"] + plain.ended(row["completion"]), notes)


def _after(coder: Plain | Chat, prompt: str, whole: str, notes: tuple[Note, ...]) -> Sample:
    """The tokens of the prompt as inference has them, then those of the rest of the whole text."""
    start, ids = coder.encode(prompt), coder.encode(whole)
    shared = common(start, ids)
    if shared < len(start) and whole.startswith(prompt):  # the last token of the prompt would grow into the answer
        rest = coder.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        if coder.tokenizer.decode(start + rest) == coder.tokenizer.decode(ids):
            return Sample(start + rest, ((len(start), len(start) + len(rest)),), notes)
        notes = (*notes, "tokens")
    return Sample(ids, ((shared, len(ids)),), notes)


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common beginning, by bisection over slices."""
    low, high = 0, min(len(one), len(other))
    middle = high
    while low < high:
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low


# ---------------------------------------------------------------------------------------------------------------- turns


def of_every_token(chat: Chat, row: Row, where: str) -> Sample:
    """A conversation with loss on all of it."""
    turns, learnt = _learnt(row)
    if len(learnt) < sum(turn["role"] == "assistant" for turn in turns) and "messages" in row:
        raise LoralignError(f"{where} marks a turn as not to be learnt, which needs assistant_only: true")
    text = chat.text(turns, row)
    for i in learnt:
        _check_answer(turns[i], text, where)
    _check_tools(text, row, where)
    _check_turns(turns, text, where)
    ids = chat.encode(text)
    return Sample(ids, ((0, len(ids)),))


def of_answers(chat: Chat, row: Row, where: str) -> list[Sample]:
    """A conversation with loss on the answers that are learnt: one row, or one for each answer."""
    turns, learnt = _learnt(row)
    answers = [_answer(chat, row, turns, i, where) for i in learnt]
    _check_tools(answers[0].prompt, row, where)
    _check_turns(turns[: learnt[-1]], answers[-1].prompt, where)
    together = _together(chat, answers) if len(answers) > 1 else None
    return [together] if together else [_alone(chat, answer) for answer in answers]


def last_answer(coder: Plain | Chat, row: Row, where: str) -> Sample:
    """The answer that a row ends with, after its prompt."""
    if isinstance(coder, Plain):
        return of_completion(coder, row)
    turns, learnt = _learnt(row)
    return _alone(coder, _answer(coder, row, turns, learnt[-1], where))


def _learnt(row: Row) -> tuple[list[Turn], list[int]]:
    """The turns, and the positions of those that are learnt."""
    asked = row.get("prompt", [])
    turns: list[Turn] = row["messages"] if "messages" in row else asked + row["completion"]
    learnt = [i for i, t in enumerate(turns) if t["role"] == "assistant" and "weight" not in t and i >= len(asked)]
    return turns, learnt


def _answer(chat: Chat, row: Row, turns: list[Turn], i: int, where: str) -> _Answer:
    if i == 0:
        raise LoralignError(f"{where}: it starts with the assistant, which answers nothing: drop that turn or the row")
    prompt, after = chat.prompt(turns[:i], row), chat.text(turns[: i + 1], row)
    exact = after.startswith(prompt)
    before = after[: common(prompt, after)]
    lost = _check_answer(turns[i], after[len(before) :], where)
    empty = not turns[i]["content"].strip() and not turns[i].get("tool_calls")
    found: dict[Note, bool] = {"prompt": not exact, "thoughts": lost, "empty": empty}
    return _Answer(prompt, before, after, tuple(note for note, there in found.items() if there))


def _alone(chat: Chat, answer: _Answer) -> Sample:
    return _after(chat, answer.prompt, answer.after, answer.notes)


def _together(chat: Chat, answers: list[_Answer]) -> Sample | None:
    """All answers in the text of the last one; None where a prompt isn't its beginning, or an answer ends otherwise."""
    whole = answers[-1].after
    if not all(whole.startswith(answer.before) for answer in answers):
        return None
    ids = chat.encode(whole)
    spans = []
    for answer in answers:
        start = chat.encode(answer.before)
        if ids[: len(start)] != start:
            return None
        through = ids if answer.after == whole else chat.encode(answer.after)
        stop = common(through, ids)
        if stop < len(through) and not chat.ends & set(ids[len(start) : stop]):
            return None
        spans.append((len(start), stop))
    return Sample(ids, tuple(spans), tuple(note for answer in answers for note in answer.notes))


# --------------------------------------------------------------------------------------------------- what must be there


def _check_answer(turn: Turn, text: str, where: str) -> bool:
    """Refuse a text that an answer's content or calls are missing from; True where only its thoughts are."""
    for call in turn.get("tool_calls", ()):
        inner = call.get("function", call)
        if not all(_stands(part, text) for part in (inner["name"], *_texts(inner.get("arguments")))):
            raise LoralignError(
                f"{where}: the chat template doesn't render the tool call of {inner['name']}: use a model "
                "whose template does, or write the call into the content"
            )
    said, thoughts = turn["content"], next((turn[key] for key in THOUGHTS if key in turn), "")
    lost = not _stands(str(thoughts), text)
    if _stands(said, text):
        return lost
    if "</think>" in said and _stands(said.rpartition("</think>")[2], text):
        return True
    raise LoralignError(
        f"{where}: the chat template doesn't render the assistant's turn as it is ({_short(said)}): give prompt and "
        "completion as text, or mend the template"
    )


def _check_tools(text: str, row: Row, where: str) -> None:
    for tool in row.get("tools", ()):
        inner = tool.get("function", tool)
        name = str(inner.get("name", "")) if isinstance(inner, dict) else ""
        if not _stands(name, text):
            raise LoralignError(
                f"{where}: the chat template doesn't render the tool {name}: use a model whose template renders "
                "`tools`, or write them into the system turn and drop the column"
            )


def _check_turns(turns: list[Turn], text: str, where: str) -> None:
    for turn in turns:
        if turn["role"] != "assistant" and not _stands(turn["content"], text):
            raise LoralignError(
                f"{where}: the chat template doesn't render the {turn['role']}'s turn ({_short(turn['content'])}): "
                "use a model whose template does, or write it into another turn"
            )


def _stands(said: str, text: str) -> bool:
    """Whether what was said is in a text: as it is, or word by word where the template quotes or breaks it."""
    return said.strip() in text or all(word in text for word in _words(said))


def _words(said: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in said).split()


def _texts(value: Any) -> list[str]:
    """The texts inside arguments, whatever their form."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _short(said: str) -> str:
    said = " ".join(said.split())
    return said if len(said) <= 40 else said[:39] + "…"
