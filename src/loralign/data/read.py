"""Rows from files: json, jsonl, csv, parquet, arrow, folders written by `save_to_disk`, and hub ids.

Files are read as they are: a csv field stays text, a json value keeps its type, nothing is guessed and nothing is
unpickled. Rows live in memory as an Arrow table of about the size of the file; parquet and folders keep their own.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS
from datasets.table import InMemoryTable

from loralign.types import LoralignError

Row = dict[str, Any]

OPTIONAL = ("input", "system", "history", "tools")
"""Columns that a row may lack: the row then holds None there."""
CHUNK = 1000
MISFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)
UNREADABLE = (*MISFIT, KeyError, AttributeError, IndexError, RecursionError, OSError)
"""What the readers of a damaged file or folder raise."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LIST_OR_LINES = "write one object per line, or one list of objects"

log = logging.getLogger("loralign")


def read_rows(source: str | Path, split: str | None = None) -> Dataset:
    """The rows of a file, a folder or a hub id; `dataset.info.dataset_name` is the name that later errors give.

    source: `.json` (a list, or one object per line), `.jsonl`, `.csv`, `.parquet`, `.arrow`, a folder written by
    `save_to_disk`, or a hub id. split: a split such as "train" or "train[:10%]"; a file's only split is "train".

    Raises:
        LoralignError: no such file, an empty one, a broken line, an unknown ending, rows with different columns.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = _file(path)
    else:
        found = _hub(str(source), path, split)
    rows = _one_split(found, split, str(source))
    if len(rows) == 0:
        raise LoralignError(f"{source} has no rows: give a file with at least one")
    rows.info.dataset_name = str(source)
    return rows


def name_of(dataset: Dataset) -> str:
    """What errors call these rows."""
    return dataset.info.dataset_name or "the data"


def first_line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def as_dataset(rows: Iterable[Row], name: str, schema: pa.Schema | None = None) -> Dataset:
    """An in-memory dataset of rows that share their columns; `schema` fixes the types, otherwise the rows give them."""
    tables: list[pa.Table] = []
    seen = schema or pa.schema([])
    for first, chunk in _chunks(rows):
        try:
            tables.append(_table(chunk, schema))
            seen = _joined(seen, tables[-1])
        except MISFIT as error:
            n = first + _first_misfit(chunk, schema, seen)
            raise LoralignError(
                f"{name}, row {n} doesn't fit the rows before ({first_line(error)}): give each column one type, for "
                "instance text everywhere"
            ) from error
    table = pa.concat_tables(tables, promote_options="permissive") if tables else seen.empty_table()
    dataset = Dataset(InMemoryTable(table))
    dataset.info.dataset_name = name
    return dataset


def _chunks(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, 1-based, and rows)."""
    chunk: list[Row] = []
    first = 1
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield first, chunk
            first, chunk = first + CHUNK, []
    if chunk:
        yield first, chunk


def _table(rows: list[Row], schema: pa.Schema | None) -> pa.Table:
    columns = dict.fromkeys(c for row in rows for c in row)
    return pa.Table.from_pydict({c: [row.get(c) for row in rows] for c in columns}, schema=schema)


def _joined(seen: pa.Schema, table: pa.Table) -> pa.Schema:
    return pa.unify_schemas([seen, table.schema], promote_options="permissive")


def _first_misfit(rows: list[Row], schema: pa.Schema | None, seen: pa.Schema) -> int:
    """Index of the first row that makes no table with the rows up to it, by bisection; some row doesn't."""
    low, high = 0, len(rows) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            _joined(seen, _table(rows[: middle + 1], schema))
            low = middle + 1
        except MISFIT:
            high = middle
    return low


# ---------------------------------------------------------------------------------------------------------------- files


def _file(path: Path) -> Dataset:
    if path.suffix not in READERS:
        raise LoralignError(
            f"{path} ends in {path.suffix or 'nothing'}, which can't be read: give a {', '.join(READERS)} file, "
            "or a folder written by save_to_disk"
        )
    if path.stat().st_size == 0:
        raise LoralignError(f"{path} is empty: give a file with at least one row")
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise LoralignError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.filename:  # the system refuses the file, whatever is in it
            raise
        raise LoralignError(f"{path} is no {path.suffix[1:]} file ({first_line(error)}): write it again") from error


def _jsonl(path: Path) -> Dataset:
    return as_dataset(_same_columns(_json_lines(path), path), str(path))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                yield f"line {n}", _parsed(line.strip(), path, n)


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """text: JSON that begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}"
        raise LoralignError(f"{at} is not JSON ({error.msg}, column {error.colno}): {LIST_OR_LINES}") from error
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"
        raise LoralignError(f"{path}, line {line} {why}: {LIST_OR_LINES}") from error


def _json(path: Path) -> Dataset:
    with path.open(encoding="utf-8-sig") as f:
        first = next((c for line in f for c in line if not c.isspace()), "")
    if first != "[":
        return _jsonl(path)
    values = _parsed(path.read_text(encoding="utf-8-sig"), path)
    rows = ((f"row {n}", value) for n, value in enumerate(values, 1))
    return as_dataset(_same_columns(rows, path), str(path))


def _csv(path: Path) -> Dataset:
    return as_dataset((row for _, row in _csv_lines(path)), str(path))


def _csv_lines(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or not all(header):
                raise LoralignError(f"{path}, line 1: the header names a column twice or not at all: name each once")
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise LoralignError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, the header has {len(header)}: "
                        "put fields with commas or line breaks in quotes"
                    )
                if fields:
                    yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise LoralignError(f"{path}, line {reader.line_num} is not csv ({error}): mend its quotes") from error


def _same_columns(rows: Iterable[tuple[str, Any]], path: Path) -> Iterator[Row]:
    """The rows, as long as each has the columns of those before; optional ones may be missing."""
    columns: dict[str, None] | None = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise LoralignError(f"{path}, {where} is no object but {type(row).__name__}: {LIST_OR_LINES}")
        columns = dict.fromkeys(row) if columns is None else columns
        if odd := [c for c in row.keys() ^ columns.keys() if c not in OPTIONAL]:
            raise LoralignError(
                f"{path}, {where} has the columns {', '.join(row)}, the rows before have {', '.join(columns)}: "
                f"give every row the same columns (see {', '.join(sorted(odd))})"
            )
        columns |= dict.fromkeys(row)
        yield row


def _parquet(path: Path) -> Dataset:
    return _of_table(pq.read_table(path), path)


def _of_table(table: pa.Table, path: Path) -> Dataset:
    """The table's columns; those of a type that rows of text never have, such as maps, are left out and named."""
    odd = [field.name for field in table.schema if not _is_plain(field)]
    if odd:
        log.warning("%s: the columns %s are of types that cannot be read, they are left out", path, ", ".join(odd[:5]))
    kept = table.drop_columns(odd)
    try:
        return Dataset(InMemoryTable(kept))
    except UNREADABLE:  # what `datasets` once wrote about the columns does not fit them
        return Dataset(InMemoryTable(kept.replace_schema_metadata(None)))


def _is_plain(field: pa.Field) -> bool:
    try:
        datasets.Features.from_arrow_schema(pa.schema([field]))
    except (ValueError, TypeError, KeyError, pa.ArrowException):
        return False
    return True


def _arrow(path: Path) -> Dataset:
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()  # as `datasets` writes it
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
    return _of_table(table, path)


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# ------------------------------------------------------------------------------------------------------ folders and hub


def _folder(path: Path) -> Dataset | DatasetDict:
    if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        files = sorted(f.name for f in path.iterdir() if f.suffix in READERS)
        inside = f"give one of its files ({', '.join(files[:5])})" if files else "give a file"
        raise LoralignError(f"{path} was not written by save_to_disk: {inside}")
    try:
        return datasets.load_from_disk(str(path))
    except UNREADABLE as error:
        raise LoralignError(f"{path} is a damaged save_to_disk folder ({first_line(error)}): write it again") from error


def _hub(source: str, path: Path, split: str | None) -> Dataset | DatasetDict:
    if not HUB_ID.fullmatch(source) or path.suffix in READERS or path.exists():
        raise LoralignError(f"no such file: {source}; paths count from the folder where the command runs")
    if source in BUILDERS:  # such a name would read every file of the folder where the command runs
        raise LoralignError(f"{source} is a kind of file, not a file: name the file, such as rows.{source}")
    try:
        name = split.split("[")[0] if split else None
        return datasets.load_dataset(source, split=split) if name else datasets.load_dataset(source)
    except Exception as error:  # whatever the libraries make of a name, a connection or a stranger's files
        raise LoralignError(
            f"{source} is no local file, and the hub gave none ({first_line(error)}): check the name, or, without a "
            "connection, give a local file"
        ) from error


def _one_split(found: Dataset | DatasetDict, split: str | None, source: str) -> Dataset:
    """The rows that `split` means; None means "train", or the only split there is."""
    if isinstance(found, Dataset) and (split is None or not Path(source).expanduser().exists()):
        return found
    splits = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise LoralignError(f"{source} has the splits {', '.join(splits)}: name one")
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in splits.items()})
    except (ValueError, AssertionError) as error:
        raise LoralignError(f"{source} has no split {split!r}: it has {', '.join(splits)}") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])
