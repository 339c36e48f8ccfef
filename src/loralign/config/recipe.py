"""Strings to objects: recipe files (YAML) become a `Job`. The only place that interprets names and numbers from files.

A file is strict: an unknown key, a wrong type or an inconsistent pair of values raises LoralignError, one sentence with
the mend. Paths in it are relative to the folder where the command runs.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError

from loralign.carrier.patterns import check_pattern
from loralign.carrier.quantise import check_plain
from loralign.config.errors import expected, sentence, validated
from loralign.config.sections import RecipeKeys, RunFile, SourceSection, TrainSection, written_schema
from loralign.config.sources import check_sources, entries, to_data
from loralign.config.yaml_text import read_yaml
from loralign.methods.build import DEFAULTS, build
from loralign.methods.table import METHODS, RESOLVED, learning_rate, method
from loralign.train.job import Job, Training
from loralign.types import Full, LoralignError, Method, Recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a recipe file, with `key=value` overrides (dotted keys, YAML values) on top.

    Raises LoralignError: no such file, broken YAML, an unknown key (with the nearest one), a wrong type, a method or
    option that does not exist, values that do not go together.
    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "r.yaml")
        >>> _ = path.write_text("model: m\\ndata: {train: rows.jsonl}\\noutput: out")
        >>> load(path, ["train.steps=10"]).train.steps
        10
    """
    return parse(read(path, overrides), Path(path).name)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe file as plain data, with the overrides on top; neither keys nor values are checked yet."""
    return read_yaml(Path(path), overrides)


def parse(content: Mapping[str, Any], name: str = "recipe") -> RunFile:
    """A mapping as it stands in a file; `name` is said in errors."""
    for where, entry in entries(content):
        validated(SourceSection, entry, f"{name}, {where}", "a source")
    file = validated(RunFile, content, name, options=lambda: frozenset(o for i in METHODS for o in options_of(i)))
    try:
        to_recipe(file)
        _consistent(file)
    except LoralignError as error:
        raise LoralignError(f"{name}: {error}") from error
    return file


# --------------------------------------------------------------------------------------------------------------- recipe


def to_recipe(file: RecipeKeys) -> Recipe | Full:
    """The recipe of a file: preset, then what the file says; its parts go together."""
    lines = [method(part) for part in file.method.split("+")]
    if any(line.reference for line in lines):
        idle = [k for k in ("rank", "alpha", "dropout", "ranks") if getattr(file, k) not in (None, 0, {})]
        if idle:
            raise LoralignError(
                f"`{idle[0]}` means nothing to `method: {file.method}`, which has no adapter: leave it out"
            )
    preset = _preset(lines, file.preset)
    numbers = ("alpha", "dropout", "weight_decay", "max_grad_norm")
    fields: dict[str, Any] = {k: preset.pop(k) for k in ("r", *numbers) if k in preset}
    fields |= {k: getattr(file, k) for k in numbers if k in file.model_fields_set}
    fields |= {"r": file.rank} if file.rank is not None else {}
    fields |= {"seed": file.seed, "exclude": tuple(file.exclude), "ranks": dict(file.ranks)}
    fields["targets"] = file.targets if isinstance(file.targets, str) else tuple(file.targets)
    options = {**preset, **_typed(lines, file.options)}
    recipe = build(file.method, options, **{k: v for k, v in fields.items() if v is not None})
    if isinstance(recipe, Recipe):
        from loralign.plan.combinations import check_combination  # imports PEFT, for which a wrong key need not wait

        check_combination(recipe)
    return recipe


def options_of(name: str) -> frozenset[str]:
    """The options that a method or mix takes."""
    return frozenset(_option_types([method(part) for part in name.split("+")]))


def options_said(line: Method) -> Iterator[tuple[str, str, Any]]:
    """Every option of a method that a file can hold: its name, its type in words, its default."""
    types = _option_types([line])
    defaults: dict[str, Any] = {}
    for factory in _factories([line]):
        for name, parameter in inspect.signature(factory).parameters.items():
            defaults.setdefault(name, parameter.default)
    yield from ((n, expected(types[n]), d) for n, d in defaults.items() if _type_schema(types[n]) is not None)


def _preset(lines: Sequence[Method], name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    known = sorted({key for line in lines for key in line.presets})
    if name not in known:
        said = f"its presets are {', '.join(known)}" if known else "it has no presets: leave `preset` out"
        raise LoralignError(f"{' + '.join(line.id for line in lines)} has no preset {name!r}; {said}")
    return {key: value for line in lines for key, value in line.presets.get(name, {}).items()}


def _factories(lines: Sequence[Method]) -> Iterator[Callable[..., Any]]:
    """Of the parts that a method or mix is made of, its own before those of plain LoRA."""
    if any(line.reference for line in lines):
        return
    for line in lines:
        yield from (f for f in (line.init, line.form, line.transform, *line.rules, line.outer) if f is not None)
    yield from (f for axis, f in DEFAULTS.items() if all(getattr(line, axis) is None for line in lines))


def _option_types(lines: Sequence[Method]) -> dict[str, Any]:
    """Type of every option, from the factories' signatures; what is not annotated may be anything."""
    found: dict[str, Any] = {}
    for factory in _factories(lines):
        hints = typing.get_type_hints(factory, include_extras=True)
        for name in inspect.signature(factory).parameters:
            found.setdefault(name, hints.get(name, Any))
    return found


def _typed(lines: Sequence[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as their factories want them; names are checked by `build`."""
    types = {name: kind for name, kind in _option_types(lines).items() if name in options}
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    shape = create_model("Options", __config__=config, **{name: (kind, ...) for name, kind in types.items()})  # type: ignore[call-overload]
    try:
        made = shape.model_validate_json(json.dumps({name: options[name] for name in types}))
    except ValidationError as error:
        raise LoralignError(sentence(error, shape, prefix="options.")) from error
    except TypeError as error:  # a date, for instance
        raise LoralignError(f"`options`: {error}") from error
    return {name: getattr(made, name) if name in types else value for name, value in options.items()}


# ------------------------------------------------------------------------------------------------------------------ job


def to_job(file: RunFile, hidden_size: int) -> Job:
    """The run that a file describes.

    hidden_size: of the model; scales the learning-rate prior where the file gives no rate.
    """
    recipe, t = to_recipe(file), file.train
    rate, source = t.learning_rate, "given"
    if rate is None:
        s = recipe.s() if isinstance(recipe, Recipe) else 1.0
        rate, why = learning_rate(file.method, s, hidden_size)
        source = f"prior of {recipe.name}: {why}"
    given = t.model_dump(exclude={"learning_rate", "epochs", "micro_batch_size", "report_to", "load_best"})
    training = Training(
        learning_rate=rate,
        lr_source=source,
        epochs=t.epochs or 1.0,
        micro_batch_size=micro_batch_size(t),
        report_to=tuple(t.report_to),
        load_best=t.load_best or t.patience is not None,
        **given,
    )
    return Job(
        model=file.model,
        recipe=recipe,
        data=to_data(file.data),
        training=training,
        output=Path(file.output).expanduser(),
        revision=file.revision,
        seed=file.seed,
        trust_remote_code=file.trust_remote_code,
        quantize=file.quantize,
        cache=Path(file.cache).expanduser() if file.cache else None,
        source=file.model_dump(mode="json", exclude_unset=True),
    )


def micro_batch_size(t: TrainSection) -> int:
    """Rows per forward: as given, else the largest divisor of the batch up to 4."""
    return t.micro_batch_size or max(d for d in range(1, 5) if t.batch_size % d == 0)


def _consistent(file: RunFile) -> None:
    """Values that do not go together, with the mend."""
    t, rows = file.train, file.train.batch_size
    check_sources(to_data(file.data))
    if isinstance(file.targets, str) and file.targets != "all-linear":
        check_pattern(file.targets)
    if t.steps is not None and t.epochs is not None:
        raise LoralignError(
            "`train.steps` and `train.epochs` both say how long to train: keep one, set the other to null"
        )
    if t.micro_batch_size is not None and rows % t.micro_batch_size:
        fitting = [d for d in range(1, rows + 1) if rows % d == 0]  # rows is bounded
        near = min(fitting, key=lambda d: (abs(d - t.micro_batch_size), d))  # type: ignore[operator]
        raise LoralignError(
            f"`train.batch_size` {rows} is no multiple of `train.micro_batch_size` {t.micro_batch_size}: take {near}"
        )
    if file.quantize is not None:
        check_plain(file.quantize, file.model, {})
    if file.quantize is not None and any(method(part).reference for part in file.method.split("+")):
        raise LoralignError(
            f"`method: {file.method}` trains the weights that `quantize: {file.quantize}` rounds: leave `quantize` "
            "out, or train an adapter"
        )
    best = "train.patience" if t.patience is not None else "train.load_best" if t.load_best else ""
    needy = best or ("train.eval_every" if t.eval_every is not None else "")
    if needy and file.data.eval is None:
        raise LoralignError(f"`{needy}` needs evaluation rows: set `data.eval` to a file or a share such as 0.05")
    if best and t.eval_every is None:
        raise LoralignError(f"`{best}` needs evaluations during training: set `train.eval_every`")
    if best and t.save_every not in (None, t.eval_every):
        raise LoralignError(f"`{best}` saves at every evaluation: leave `train.save_every` out")


# --------------------------------------------------------------------------------------------------------------- schema


def schema() -> dict[str, Any]:
    """JSON schema of recipe files, for editors; every method brings its options."""
    found = RunFile.model_json_schema()
    ids = sorted(METHODS)
    mix = {"type": "string", "pattern": r"^[a-z0-9-]+( *\+ *[a-z0-9-]+)+$"}
    found["properties"]["method"] |= {"anyOf": [{"enum": [*ids, *RESOLVED]}, mix]}
    found["allOf"] = [_method_schema(METHODS[i]) for i in ids]
    return found


def schema_text() -> str:
    """The schema as it stands in docs/schema.json."""
    return written_schema(schema(), "loralign recipe")


def _type_schema(kind: Any) -> dict[str, Any] | None:
    """None for objects that a file cannot hold, such as a transform."""
    try:
        return TypeAdapter(kind).json_schema()
    except PydanticSchemaGenerationError:
        return None


def _method_schema(line: Method) -> dict[str, Any]:
    options = {name: _type_schema(kind) for name, kind in sorted(_option_types([line]).items())}
    options = {name: found for name, found in options.items() if found is not None}
    then: dict[str, Any] = {"options": {"properties": options, "additionalProperties": False}}
    if line.presets:
        then["preset"] = {"enum": [*sorted(line.presets), None]}
    test = {"properties": {"method": {"const": line.id}}, "required": ["method"]}
    return {"if": test, "then": {"properties": then}}
