"""Just enough of the ONNX format to read weights out of a file: named tensors, and what each node takes.

ONNX is protobuf: a message is fields of (number, wire type, value). Numbers below are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLOAT, INT64 = 1, 7
_KINDS: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), INT64: np.dtype("<i8")}


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    value: np.ndarray | None
    """Of a Constant."""


def read_graph(path: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """Initialisers by name, and the nodes in order."""
    graph = next(value for number, value in fields(memoryview(path.read_bytes())) if number == 7)
    tensors, nodes = {}, []
    for number, value in fields(graph):
        if number == 5:
            name, array = _tensor(value)
            tensors[name] = array
        elif number == 1:
            nodes.append(_node(value))
    return tensors, nodes


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of every field; of a varint its eight bytes, little endian."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, memoryview(value.to_bytes(8, "little"))
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size, at = _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    name, kind, raw, dims = "", FLOAT, b"", []
    for number, value in fields(message):
        if number == 1:
            dims.append(int.from_bytes(value, "little"))
        elif number == 2:
            kind = int.from_bytes(value, "little")
        elif number == 8:
            name = bytes(value).decode()
        elif number == 9:
            raw = bytes(value)
    if kind not in _KINDS or len(raw) != _KINDS[kind].itemsize * int(np.prod(dims)):
        return name, np.empty(0)
    return name, np.frombuffer(raw, _KINDS[kind]).reshape(dims)


def _node(message: memoryview) -> Node:
    found: dict[int, list[memoryview]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    text = {number: [bytes(v).decode() for v in values] for number, values in found.items() if number in (1, 2, 3, 4)}
    tensors = [v for attribute in found.get(5, ()) for number, v in fields(attribute) if number == 5]
    constant = _tensor(tensors[0])[1] if tensors else None
    return Node(text.get(3, [""])[0], text.get(4, [""])[0], tuple(text.get(1, ())), text.get(2, [""])[0], constant)
