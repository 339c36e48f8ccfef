"""The reader of weights in ONNX files, against messages that are written here field by field."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from onnx_file import read_graph


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, array: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[str(array.dtype)]
    dims = b"".join(field(1, n) for n in array.shape)
    return dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes())


def test_tensors_and_nodes_come_out_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    W, ids = rng.normal(size=(300, 2)).astype("float32"), np.arange(3, dtype="int64")
    constant = field(1, b"value") + field(5, tensor("", W[:2])) + field(20, 4)
    nodes = [
        field(1, b"x") + field(1, b"W") + field(2, b"y") + field(3, b"/a/b/MatMul") + field(4, b"MatMul"),
        field(2, b"c") + field(3, b"const") + field(4, b"Constant") + field(5, constant),
    ]
    graph = b"".join(field(1, node) for node in nodes) + field(2, b"graph")
    graph += field(5, tensor("W", W)) + field(5, tensor("ids", ids)) + field(5, field(8, b"empty") + field(2, 9))
    path = tmp_path / "m.onnx"
    path.write_bytes(field(1, 8) + varint(2 << 3 | 5) + b"\0" * 4 + field(7, graph))
    tensors, found = read_graph(path)
    np.testing.assert_array_equal(tensors["W"], W)
    np.testing.assert_array_equal(tensors["ids"], ids)
    assert tensors["empty"].size == 0  # a kind that is not read
    first, second = found
    assert (first.name, first.kind, first.inputs, first.output) == ("/a/b/MatMul", "MatMul", ("x", "W"), "y")
    assert first.value is None and second.kind == "Constant" and second.value is not None
    np.testing.assert_array_equal(second.value, W[:2])
