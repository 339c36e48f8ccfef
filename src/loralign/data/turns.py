"""One turn of a conversation: its role, its text, its tool calls, and the marks that say whether it is learnt.

    role, content            as chat templates read them; sharegpt's `from` and `value` are the same
    tool_calls               calls, each with `arguments` as an object or as the JSON text of one
    function_call            one call in the older form of the OpenAI API; becomes `tool_calls`
    weight, train, loss, trainable    0 or false: the turn is read, not learnt; 1 or true: learnt, as without a mark

Content may be a list of text parts. Every other key is handed to the chat template as it is.
"""

from __future__ import annotations

from typing import Any

from loralign.data.columns import MARKS
from loralign.data.table import Doubled, from_json
from loralign.types import LoralignError

Turn = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
UNLEARNT = {"weight": 0}
"""The mark that a turn keeps here, whatever its own was called."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
KNOWN = ("role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS, "weight")
"""Keys of turns that templates may lack without a word: what is lost of them is found in the text."""
_READ = ("role", "from", "content", "value", "function_call", *MARKS)


def turns_of(value: Any, what: str, where: str, write: str = "[{role, content}, …]") -> list[Turn]:
    """A list of turns, checked; where: file and row, write: what may stand there, for the error."""
    value = parsed(value, where)
    if not isinstance(value, list) or not value or not all(isinstance(t, dict) for t in value):
        raise LoralignError(f"{where}: {what} is no list of turns: write {write}")
    return [_one_turn(turn, where) for turn in value]


def turn(role: str, content: Any, where: str) -> Turn:
    """A turn of role and text; content: text, or a list of text parts."""
    if isinstance(content, list):
        odd = [p.get("type") for p in content if isinstance(p, dict) and not isinstance(p.get("text"), str)]
        if odd:
            raise LoralignError(f"{where}: the {role}'s turn holds a part of type {odd[0]}: only text is trained")
        if all(isinstance(part, dict) for part in content):
            content = "".join(part["text"] for part in content)
    return {"role": role, "content": text(content, f"the {role}'s turn", where)}


def text(value: Any, what: str, where: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        found = "missing" if value is None else f"of type {type(value).__name__}"
        raise LoralignError(f"{where}: {what} is {found}: write it as text")
    return value


def parsed(value: Any, where: str) -> Any:
    """A list or an object may stand as its JSON text; other text stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = from_json(value)
    except Doubled as error:
        raise LoralignError(f"{where}: {error}") from error
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def is_learnt(said: Turn, where: str) -> bool:
    """Whether no mark of a turn (or row) takes it out."""
    learnt = True
    for key in MARKS:
        value = said.get(key)
        if value is not None and value not in (0, 1):
            raise LoralignError(f"{where}: `{key}` is {value!r}, but only 0 and 1 (false and true) are understood")
        learnt = learnt and value in (None, 1)
    return learnt


def _one_turn(said: Turn, where: str) -> Turn:
    name = said.get("role") or said.get("from")
    if not isinstance(name, str) or name not in ROLES:
        raise LoralignError(f"{where}: a turn has the role {name!r}: use one of {', '.join(ROLES)}")
    content, role = said.get("content", said.get("value")), ROLES[name]
    calls = _calls(said, name, content, where)
    if name == "function_call":
        content = ""
    if content is None and role == "assistant" and (calls or any(said.get(key) for key in THOUGHTS)):
        content = ""
    made = turn(role, content, where) | ({"tool_calls": calls} if calls else {})
    made |= {k: v for k, v in said.items() if k not in _READ and k != "tool_calls" and v is not None}
    if role != "assistant" and any(said.get(key) == 1 for key in MARKS):
        raise LoralignError(f"{where}: a mark says that the {role}'s turn is learnt; only the assistant's are: drop it")
    return made if role != "assistant" or is_learnt(said, where) else made | UNLEARNT


def _calls(said: Turn, role: str, content: Any, where: str) -> list[Any]:
    """The tool calls of a turn, arguments as objects."""
    calls = parsed(said.get("tool_calls"), where) or []
    if role == "function_call":
        calls = parsed(content, where)
    elif said.get("function_call"):
        calls = [{"type": "function", "function": parsed(said["function_call"], where)}]
    calls = [parsed(call, where) for call in ([calls] if isinstance(calls, dict) else calls)]
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    inner = parsed(call.get("function"), where) if isinstance(call, dict) and "function" in call else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise LoralignError(f"{where}: a tool call is no object with a name: write {{name, arguments}}")
    if "arguments" in inner:
        given = inner["arguments"]
        arguments = {} if given in (None, "") else parsed(given, where)
        if not isinstance(arguments, dict):
            raise LoralignError(
                f"{where}: the `arguments` of the call of {inner['name']} are no object: write one, or its JSON text"
            )
        inner = inner | {"arguments": arguments}
    return inner if inner.keys() == call.keys() or "function" not in call else call | {"function": inner}
