"""The `data` section of a recipe as the sources of a run, and names of columns as commands take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loralign.config.errors import validated
from loralign.config.sections import DataSection, SourceSection
from loralign.config.yaml_text import value_of
from loralign.data.mix import Source, share_faults, sources_of
from loralign.train.job import Data
from loralign.types import LoralignError


def entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Sources that are written out, and where they stand."""
    data = content.get("data")
    for key in ("train", "eval"):
        given = data.get(key) if isinstance(data, Mapping) else None
        for i, entry in enumerate(given if isinstance(given, list) else [given], 1):
            if isinstance(entry, Mapping):
                yield f"`data.{key}`" + (f", source {i}" if isinstance(given, list) else ""), entry


def to_data(d: DataSection) -> Data:
    """The rows of a file; each source has the names of columns that hold for it."""

    def one(given: str | SourceSection) -> Source:
        if isinstance(given, str):
            return Source(given, d.columns)
        columns = given.columns if "columns" in given.model_fields_set else d.columns
        return Source(given.source, columns, given.split, given.share)

    train = tuple(one(each) for each in (d.train if isinstance(d.train, list) else [d.train]))
    held_out = one(d.eval) if isinstance(d.eval, str | SourceSection) else d.eval
    return Data(train, held_out, d.mix, d.max_length, d.assistant_only, d.packing)


def check_sources(data: Data) -> None:
    """Sources, shares and a mix that do not go together, with the mend."""
    sources = sources_of(data.train)
    if wrong := share_faults(sources):
        raise LoralignError(f"`data.train` {wrong}")
    if isinstance(data.eval, Source) and data.eval.share is not None:
        raise LoralignError("`data.eval` has a share of a mix, which only `data.train` is: leave `share` out")
    if data.mix == "all" and all(source.share is None for source in sources):
        raise LoralignError(
            "`data.mix: all` repeats rows where shares ask for it: give sources a `share`, or leave it out"
        )


def columns_of(text: str) -> dict[str, str]:
    """`data.columns` as a command takes it, YAML text.

    Raises:
        LoralignError: it is no mapping, or one that `data.columns` would not take.
    """
    given = value_of(text, "--columns")
    if not isinstance(given, Mapping):
        raise LoralignError(
            f"--columns {text!r}: write our names and those of the rows as in `data.columns`, "
            "{prompt: question, completion: answer}"
        )
    found = validated(DataSection, {"train": "rows", "columns": given}, "--columns")
    return dict(found.columns)
