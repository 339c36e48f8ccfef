"""Rows from files: json, jsonl, csv, parquet, arrow, folders written by `save_to_disk`, and hub ids.

Files are read as they are: a csv field stays text, a json value keeps its type, nothing is guessed and nothing is
unpickled. Rows live in memory as JSON text of about the size of the file. Of tables whose columns have types (parquet,
arrow, folders, the hub) only the columns that some format understands, and those that are asked for by name, are read;
the rest may have any type.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS
from datasets.table import InMemoryTable

from loralign.data.columns import MEDIA, UNDERSTOOD
from loralign.data.table import CHUNK, Doubled, Row, Rows, collected, from_json
from loralign.types import LoralignError

UNREADABLE = (
    *(pa.ArrowException, ValueError, TypeError, OverflowError),
    *(KeyError, AttributeError, IndexError, RecursionError, OSError),
)
"""What the readers of a damaged file or folder raise."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LIST_OR_LINES = "write one object per line, or one list of objects"

log = logging.getLogger("loralign")


def read_rows(source: str | Path, split: str | None = None, also: Iterable[str] = ()) -> Rows:
    """The rows of a file, a folder or a hub id; their name is what later errors call them.

    source: `.json` (a list, or one object per line), `.jsonl`, `.csv`, `.parquet`, `.arrow`, a folder written by
    `save_to_disk`, or a hub id. split: a split such as "train" or "train[:10%]"; a file's only split is "train".
    also: columns to read beside those that some format understands.

    Raises:
        LoralignError: no such file, an empty one, a broken line, an unknown ending.
    """
    path, wanted = Path(source).expanduser(), UNDERSTOOD | {*also}
    if path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = _file(path, wanted)
    else:
        found = _hub(str(source), path, split)
    rows = _one_split(found, split, str(source), wanted)
    if len(rows) == 0:
        raise LoralignError(f"{source} has no rows: give a file with at least one")
    return rows


def first_line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------- files


def _file(path: Path, wanted: Set[str]) -> Rows:
    if path.suffix not in READERS:
        raise LoralignError(
            f"{path} ends in {path.suffix or 'nothing'}, which can't be read: give a {', '.join(READERS)} file, "
            "or a folder written by save_to_disk"
        )
    if path.stat().st_size == 0:
        raise LoralignError(f"{path} is empty: give a file with at least one row")
    try:
        return READERS[path.suffix](path, wanted)
    except UnicodeDecodeError as error:
        raise LoralignError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.filename:  # the system refuses the file, whatever is in it
            raise
        raise LoralignError(f"{path} is no {path.suffix[1:]} file ({first_line(error)}): write it again") from error


def _jsonl(path: Path, wanted: Set[str]) -> Rows:
    return collected(_objects(_json_lines(path), path), str(path))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                yield f"line {n}", _parsed(line.strip(), path, n)


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """text: JSON that begins at `line` of the file."""
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}"
        raise LoralignError(f"{at} is not JSON ({error.msg}, column {error.colno}): {LIST_OR_LINES}") from error
    except Doubled as error:
        at = f", line {line}" if path.suffix == ".jsonl" else ""  # of a list, only where it begins is known
        raise LoralignError(f"{path}{at}: {error}") from error
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"
        raise LoralignError(f"{path}, line {line} {why}: {LIST_OR_LINES}") from error


def _json(path: Path, wanted: Set[str]) -> Rows:
    with path.open(encoding="utf-8-sig") as f:
        first = next((c for line in f for c in line if not c.isspace()), "")
    if first != "[":
        return _jsonl(path, wanted)
    values = _parsed(path.read_text(encoding="utf-8-sig"), path)
    rows = ((f"row {n}", value) for n, value in enumerate(values, 1))
    return collected(_objects(rows, path), str(path))


def _csv(path: Path, wanted: Set[str]) -> Rows:
    return collected(_csv_lines(path), str(path))


def _csv_lines(path: Path) -> Iterator[Row]:
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
                    yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise LoralignError(f"{path}, line {reader.line_num} is not csv ({error}): mend its quotes") from error


def _objects(rows: Iterator[tuple[str, Any]], path: Path) -> Iterator[Row]:
    for where, row in rows:
        if not isinstance(row, dict):
            raise LoralignError(f"{path}, {where} is no object but {type(row).__name__}: {LIST_OR_LINES}")
        yield row


def _parquet(path: Path, wanted: Set[str]) -> Rows:
    names = pq.read_schema(path).names
    return _of_table(pq.read_table(path, columns=[c for c in names if c in wanted]), str(path), names)


def _arrow(path: Path, wanted: Set[str]) -> Rows:
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()  # as `datasets` writes it
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        known = [c for c in table.column_names if c in wanted]
        return _of_table(table.select(known), str(path), table.column_names)


READERS: dict[str, Callable[[Path, Set[str]], Rows]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# --------------------------------------------------------------------------------------------- columns that have types


def _of_table(table: pa.Table, name: str, columns: list[str]) -> Rows:
    """table: the columns that some format understands; those of a type that rows never have are left out and named."""
    odd = [field.name for field in table.schema if not _is_plain(field)]
    if odd:
        log.warning("%s: the columns %s are of types that cannot be read, they are left out", name, ", ".join(odd[:5]))
    kept = table.drop_columns(odd)
    if not kept.column_names:
        return collected(({} for _ in range(table.num_rows)), name, columns)
    kept.validate(full=True)  # text that is no UTF-8, for instance
    try:
        dataset = Dataset(InMemoryTable(kept))
    except UNREADABLE:  # what `datasets` once wrote about the columns does not fit them
        dataset = Dataset(InMemoryTable(kept.replace_schema_metadata(None)))
    return _of_dataset(dataset, name, columns, {*kept.column_names})


def _is_plain(field: pa.Field) -> bool:
    try:
        datasets.Features.from_arrow_schema(pa.schema([field]))
    except (ValueError, TypeError, KeyError, pa.ArrowException):
        return False
    return True


def _of_dataset(dataset: Dataset, name: str, columns: list[str], wanted: Set[str]) -> Rows:
    known = [c for c in dataset.column_names if c in wanted]
    media = {c: _filled(dataset, c) for c in known if c in MEDIA}
    plain = [c for c in known if c not in MEDIA]
    rows = iter(dataset.select_columns(plain)) if plain else ({} for _ in range(len(dataset)))

    def read() -> Iterator[Row]:
        for i, row in enumerate(rows):
            yield {c: _without_none(v) for c, v in row.items()} | {c: True for c in media if media[c][i]}

    return collected(read(), name, columns)


def _filled(dataset: Dataset, column: str) -> list[bool]:
    """Which rows hold something there; nothing is decoded."""
    parts = dataset.select_columns([column]).with_format("arrow").iter(CHUNK)
    lists = (pa.ListScalar, pa.LargeListScalar)
    return [v.is_valid and (not isinstance(v, lists) or len(v) > 0) for part in parts for v in part[column]]


def _without_none(value: Any) -> Any:
    """Arrow gives every struct the keys of all others; what a row didn't say goes away again."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


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
        several = "; several sources are a list, [a.jsonl, b.jsonl]" if "," in source else ""
        raise LoralignError(f"no such file: {source}; paths count from the folder where the command runs{several}")
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


def _one_split(found: Rows | Dataset | DatasetDict, split: str | None, source: str, wanted: Set[str]) -> Rows:
    """The rows that `split` means; None means "train", or the only split there is."""
    if isinstance(found, Dataset) and (split is None or not Path(source).expanduser().exists()):
        return _of_dataset(found, source, found.column_names, wanted)
    splits = found if isinstance(found, DatasetDict) else {"train": found}
    if split is None and "train" not in splits and len(splits) > 1:
        raise LoralignError(f"{source} has the splits {', '.join(splits)}: name one")
    try:
        asked = datasets.ReadInstruction.from_spec(split or ("train" if "train" in splits else next(iter(splits))))
        parts = asked.to_absolute({k: len(v) for k, v in splits.items()})
    except (ValueError, AssertionError) as error:
        raise LoralignError(f"{source} has no split {split!r}: it has {', '.join(splits)}") from error
    if isinstance(found, Rows):
        return found.select([i for part in parts for i in range(part.from_, part.to)])
    chosen = datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])
    return _of_dataset(chosen, source, chosen.column_names, wanted)
