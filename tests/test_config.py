"""Recipe files: what they mean, every mistake in one sentence with the mend, the published schema, the examples."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from loralign import METHODS, Full, LoralignError, Recipe, build
from loralign.config.errors import dotted, expected, validated
from loralign.config.foreign import FOREIGN, INSTEAD
from loralign.config.keys import keys_text
from loralign.config.recipe import (
    load,
    micro_batch_size,
    options_said,
    parse,
    schema,
    schema_text,
    to_job,
    to_recipe,
)
from loralign.config.sections import RunFile, SourceSection, TrainSection
from loralign.config.study_file import StudyFile
from loralign.config.tasks_file import TasksFile
from loralign.config.yaml_text import read_yaml
from loralign.data.mix import Source
from loralign.methods.table import learning_rate
from loralign.train.job import Data, Training
from loralign.types import Weight

ROOT = Path(__file__).parents[1]
LEAST: dict[str, Any] = {"model": "m", "data": {"train": "rows.jsonl"}, "output": "out"}


def with_(**changes: Any) -> dict[str, Any]:
    return {**LEAST, **changes}


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


WRITTEN = "model: m\ndata: {train: rows.jsonl}\noutput: out\n"


# -------------------------------------------------------------------------------------------------------------- meaning


def gamma_of(recipe: Recipe) -> float:
    """From LoRA-GA's scale c = d_out^¼/√γ at d_out = 16."""
    init: Any = recipe.init
    c: float = init.scale(Weight("w", (16, 4), lambda: torch.zeros(16, 4)), 1, 1.0)
    return 4 / c**2


def test_the_least_file_is_plain_lora() -> None:
    recipe = to_recipe(parse(LEAST))
    assert isinstance(recipe, Recipe)
    assert (recipe.name, recipe.r, recipe.alpha, recipe.dropout, recipe.targets) == (
        "lora",
        16,
        32.0,
        0.0,
        "all-linear",
    )


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = file(tmp_path, WRITTEN + "alpha: 1e1\ntrain: {learning_rate: 1e-4, steps: 5}\n")
    read = load(path, ["dropout=5e-2"])
    assert (read.train.learning_rate, read.alpha, read.dropout) == (1e-4, 10.0, 0.05)


def test_overrides_reach_into_sections_and_stand_above_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, WRITTEN + "train: {steps: 5}\n")
    read = load(
        path, ["train.steps=7", "data.eval=0.1", "method=lora-ga", "options.gamma=16", "targets=[q_proj, v_proj]"]
    )
    assert read.train.steps == 7
    assert read.data.eval == 0.1
    recipe = to_recipe(read)
    assert isinstance(recipe, Recipe)
    assert recipe.targets == ("q_proj", "v_proj")
    assert gamma_of(recipe) == pytest.approx(16)


def test_a_preset_sets_fields_of_the_run_too() -> None:
    """The clip and dropout of a paper go with its options, and the file may still say otherwise."""
    paper = to_recipe(parse(with_(method="prolora", preset="paper")))
    own = to_recipe(parse(with_(method="prolora", preset="paper", max_grad_norm=2.0)))
    assert isinstance(paper, Recipe) and isinstance(own, Recipe)
    assert (paper.max_grad_norm, paper.dropout, paper.r) == (0.3, 0.1, 32)
    assert (own.max_grad_norm, own.dropout) == (2.0, 0.1)


def test_a_preset_gives_way_to_the_file() -> None:
    paper = to_recipe(parse(with_(method="lora-ga", preset="paper")))
    mixed = to_recipe(parse(with_(method="lora-ga", preset="paper", rank=4, options={"gamma": 2})))
    assert isinstance(paper, Recipe)
    assert isinstance(mixed, Recipe)
    assert (paper.r, paper.alpha, gamma_of(paper)) == pytest.approx((8, 16, 16))
    assert (mixed.r, mixed.alpha, gamma_of(mixed)) == pytest.approx((4, 16, 2))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_reached_by_its_id(name: str) -> None:
    recipe = to_recipe(parse(with_(method=name)))
    assert recipe.name == name
    assert isinstance(recipe, Full) == METHODS[name].reference


def test_a_job_takes_the_prior_where_no_rate_is_given() -> None:
    job = to_job(parse(with_(rank=8, alpha=16)), hidden_size=576)
    assert job.training.learning_rate == learning_rate("lora", 2.0, 576)[0]
    assert "LoRA Without Regret" in job.training.lr_source
    given = to_job(parse(with_(train={"learning_rate": 3e-4})), hidden_size=576)
    assert (given.training.learning_rate, given.training.lr_source) == (3e-4, "given")


def test_every_key_of_a_section_reaches_the_job() -> None:
    """Another value for every key arrives under the same name."""
    kept = {"mix": "all", "max_length": 7, "assistant_only": False, "packing": True}
    entries = [{"source": "a", "share": 0.25, "split": "test"}, {"source": "c", "share": 0.75, "columns": {}}]
    data = {"train": entries, "eval": "b", "columns": {"prompt": "q"}, **kept}
    train = {
        "learning_rate": 0.5, "steps": 3, "batch_size": 6, "micro_batch_size": 3, "schedule": "linear", "warmup": 0.5,
        "eval_every": 1, "save_every": 1, "keep": 5, "patience": 4, "load_best": True, "log_every": 9,
        "report_to": ["wandb"], "precision": "bf16", "gradient_checkpointing": True, "workers": 1,
        "compile": "off", "extra": {"optim": "adamw_torch"},
    }  # fmt: skip
    job = to_job(parse(with_(data=data, train=train)), 576)
    sources = {"train": (Source("a", {"prompt": "q"}, "test", 0.25), Source("c", {}, None, 0.75))}
    held_out = {"eval": Source("b", {"prompt": "q"})}
    assert {f.name: getattr(job.data, f.name) for f in fields(Data)} == {**sources, **held_out, **kept}
    sent = {f.name: getattr(job.training, f.name) for f in fields(Training)}
    wanted = {**train, "report_to": ("wandb",), "lr_source": "given", "epochs": 1.0}
    assert sent == wanted
    assert set(train) | {"epochs"} == set(TrainSection.model_fields)


@pytest.mark.parametrize(("batch", "micro"), [(16, 4), (6, 3), (7, 1), (1, 1), (2, 2)])
def test_the_micro_batch_divides_the_batch(batch: int, micro: int) -> None:
    assert micro_batch_size(TrainSection(batch_size=batch)) == micro


# ------------------------------------------------------------------------------------------------------------- mistakes


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (with_(tarin={"steps": 1}), "`tarin` is no key of a recipe; did you mean `train`?"),
    "unknown key in a section": (with_(train={"step": 1}), "`train.step` is no key .* did you mean `train.steps`?"),
    "key of another tool": (with_(lora_alpha=8), "`lora_alpha` .* it is called `alpha` here"),
    "key of another section": (with_(steps=8), "`steps` .* it is called `train.steps` here"),
    "option at the top": (with_(gamma=8), "`gamma` .* it belongs under `options`: `options.gamma`"),
    "nothing near": (with_(xyzzy=8), "`xyzzy` is no key of a recipe; the keys there are model, method, "),
    "missing": (
        {"data": {"train": "a"}, "output": "o"},
        "`model` is missing: folder, .gguf file or hub id of the base",
    ),
    "missing in a section": ({"model": "m", "data": {}, "output": "o"}, "`data.train` is missing: training rows"),
    "text for a number": (with_(rank="eight"), "`rank` must be a whole number, not 'eight'"),
    "fraction for a count": (with_(rank=1.5), "`rank` must be a whole number, not 1.5"),
    "yes for a number": (with_(seed=True), "`seed` must be a whole number, not True"),
    "number for text": (with_(model=3), "`model` must be text, not 3"),
    "empty": (with_(model=None), "`model` must be text, not empty"),
    "too small": (with_(rank=0), "`rank` must be greater than or equal to 1, not 0"),
    "too large": (with_(dropout=1.0), "`dropout` must be less than 1, not 1.0"),
    "negative seed": (with_(seed=-1), "`seed` must be greater than or equal to 0, not -1"),
    "number for a section": (with_(data=3), "`data` must be a section of `key: value` lines, not 3"),
    "word out of a list": (
        with_(train={"schedule": "sine"}),
        "`train.schedule` must be one of cosine, linear, .*not 's",
    ),
    "text for a list": (with_(exclude="lm_head"), "`exclude` must be a list of text, not 'lm_head'"),
    "share out of range": (with_(data={"train": "a", "eval": 1.5}), "`data.eval` must be less than 1, not 1.5"),
    "value in a mapping": (with_(ranks={"q_proj": "x"}), "`ranks.q_proj` must be a whole number, not 'x'"),
    "two mistakes": (with_(rank="x", alpha="y"), r"`rank` must be a whole number, not 'x' \(also wrong: `alpha`\)$"),
    "another trainer's file": (
        {"model_name_or_path": "m", "stage": "sft", "dataset": "d", "lora_r": 8, "template": "x", "data": {"train": 1}},
        r"`model_name_or_path` is no key of a recipe; it is called `model` here "
        r"\(also wrong: `stage`, `dataset`, `lora_r` and 2 more; missing: `model`, `output`\)$",
    ),
    "unknown method": (with_(method="lora-gaa"), "unknown method 'lora-gaa'; did you mean lora-ga, "),
    "ambiguous method": (with_(method="dora"), "'dora' means two things .*: dynamic-rank-lora or PEFT's use_dora"),
    "two transforms": (with_(method="lora-pro + lora-rite"), "lora-pro and lora-rite both set the transform"),
    "mix with full": (with_(method="lora-ga + full"), "`full` trains the matrices themselves"),
    "rank of full": (with_(method="full", rank=4), "`rank` means nothing to `method: full`"),
    "unknown option": (
        with_(method="lora-ga", options={"gama": 1}),
        "lora-ga has no option 'gama'; did you mean 'gamma'",
    ),
    "option of another method": (with_(options={"gamma": 1}), "lora has no option 'gamma'; it takes betas, eps"),
    "type of an option": (with_(method="lora-ga", options={"gamma": "x"}), "`options.gamma` must be a number, not 'x'"),
    "pair of numbers": (
        with_(options={"betas": [0.9]}),
        r"`options.betas` must be a list of 2 values \(a number, a numb",
    ),
    "object option": (with_(method="lora-plus", options={"inner": "adamw"}), "`options.inner` "),
    "unknown preset": (with_(method="lora-ga", preset="mine"), "no preset 'mine'; its presets are paper, paper-llama"),
    "no presets": (with_(preset="paper"), "lora has no preset 'paper'; it has no presets: leave `preset` out"),
    "steps and epochs": (with_(train={"steps": 1, "epochs": 1}), "both say how long to train: keep one"),
    "micro batch": (with_(train={"batch_size": 4, "micro_batch_size": 3}), "4 is no multiple of .* 3: take 2"),
    "evaluation without rows": (
        with_(train={"eval_every": 1}),
        "`train.eval_every` needs evaluation rows: set `data.eval",
    ),
    "patience without evaluation": (
        with_(data={"train": "a", "eval": 0.1}, train={"patience": 2}),
        "`train.patience` needs evaluations during training: set `train.eval_every`",
    ),
    "best of other steps": (
        with_(data={"train": "a", "eval": 0.1}, train={"load_best": True, "eval_every": 2, "save_every": 3}),
        "`train.load_best` saves at every evaluation: leave `train.save_every` out",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_mend(what: str) -> None:
    content, expected = MISTAKES[what]
    with pytest.raises(LoralignError, match=rf"^r\.yaml: .*{expected}") as caught:
        parse(content, "r.yaml")
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value).lower()


TEXTS = {
    "no mapping": ("- a\n- b\n", "r.yaml is no recipe: it should hold lines of `key: value`"),
    "empty file": ("", "r.yaml is no recipe"),
    "broken YAML": ("model: m\ndata: {train: a\noutput: o\n", r"r.yaml, line \d: "),
    "tab": ("model: m\ndata:\n\ttrain: a\n", "r.yaml, line 3: "),
    "a key twice": (WRITTEN + "output: other\n", "r.yaml, line 4: the key 'output' stands twice"),
    "python object": (
        "model: !!python/object/apply:os.system [echo]\n",
        "r.yaml, line 1: could not determine a constr",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_file_that_is_no_recipe(what: str, tmp_path: Path) -> None:
    text, expected = TEXTS[what]
    with pytest.raises(LoralignError, match=expected):
        load(file(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LoralignError, match=r"no such recipe file: .*none\.yaml; examples/ holds some"):
        load(tmp_path / "none.yaml")
    with pytest.raises(LoralignError, match=r"cannot read .*: Is a directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoralignError, match="it is no text file"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train", r"--set 'train': write key=value, for instance --set train\.steps=10"),
        ("=3", "write key=value"),
        ("train..steps=3", "write key=value"),
        ("model.name=x", "`model` is 'm', it has no keys inside"),
        ("train={steps: 1", "--set train"),
    ],
)
def test_overrides_that_mean_nothing(override: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(LoralignError, match=expected):
        load(file(tmp_path, WRITTEN), [override])


def test_a_list_of_one_thing_or_another_is_said_as_one() -> None:
    assert expected(list[list[str | int] | int] | None) == (
        "a list of (a list of (text or a whole number) or a whole number)"
    )
    assert expected(list[str]) == expected(tuple[str, ...]) == "a list of text"


def test_foreign_names_point_to_keys_that_exist() -> None:
    keys = {**dict(dotted(RunFile)), **dict(dotted(SourceSection))}
    assert set(FOREIGN.values()) <= set(keys)
    own = {key.rpartition(".")[2] for key in keys}
    assert not INSTEAD.keys() & (own | FOREIGN.keys()) and all(len(said) < 110 for said in INSTEAD.values())
    named = {key for said in INSTEAD.values() for key in re.findall(r"`((?:train|data)\.\w+)", said)}
    assert named <= set(keys)
    for page in {page for said in INSTEAD.values() for page in re.findall(r"docs/\w+\.md", said)}:
        assert (ROOT / page).is_file()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("datasets", "it is called `data.train` here"),
        ("load_in_4bit", "a recipe of `train` says `quantize: nf4`"),
        ("optim", "the method brings its optimizer"),
        ("train.warmup_steps", "a share of the steps"),
        ("deepspeed", "accelerate launch"),
    ],
)
def test_a_key_of_another_trainer_is_answered(key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LoralignError, match=re.escape(f"`{key}` is no key of a recipe; ")) as caught:
        load(file(tmp_path, WRITTEN), [f"{key}=1"])
    assert said in str(caught.value)


def test_a_key_of_another_trainer_is_not_named_where_the_file_has_none_like_it() -> None:
    """A study has no `data.train`."""
    study = read_yaml(ROOT / "examples" / "compare.yaml", [])
    with pytest.raises(LoralignError) as caught:
        validated(StudyFile, {**study, "dataset": "x"}, "s.yaml", "a study")
    assert "`dataset` is no key of a study" in str(caught.value) and "data.train" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- schema, examples


def test_the_published_schema_is_the_present_one() -> None:
    published = (ROOT / "docs" / "schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), "run: loralign schema --out docs/schema.json"


def test_every_key_and_option_of_the_schema_has_its_place() -> None:
    found = schema()
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(RunFile.model_fields)
    assert all("description" in p for p in found["properties"].values())
    by_method = {
        line["if"]["properties"]["method"]["const"]: line["then"]["properties"]["options"]["properties"]
        for line in found["allOf"]
    }
    assert set(by_method) == set(METHODS)
    assert {"gamma", "micro_batches", "betas"} <= set(by_method["lora-ga"])
    assert by_method["full"] == {}
    assert by_method["lora-pro"]["moments"]["enum"] == ["factor", "full", "none"]
    for line in METHODS.values():
        offered = {name: default for name, _, default in options_said(line)}
        assert offered.keys() == by_method[line.id].keys()
        build(line.id, offered)


@pytest.mark.parametrize("file", [RunFile, StudyFile, TasksFile])
def test_every_key_stands_in_the_text_to_read(file: type[BaseModel]) -> None:
    said = keys_text(file).splitlines()
    assert max(map(len, said)) <= 140
    for key, field in dotted(file):
        name, indent = key.rpartition(".")[2], "    " * key.count(".")
        found = [i for i, line in enumerate(said) if line.startswith(f"{indent}{name}: ")]
        assert any((", required" in said[i]) == field.is_required() for i in found)
        assert any(said[i + 1].split()[:3] == (field.description or "").split()[:3] for i in found), key
    assert (file is not StudyFile) or "    method: text, required" in said, "of items of a list, too"


RECIPE_KEYS = {"model", "data"}  # a study has arms, TRL's own files neither
EXAMPLES = sorted(
    p
    for p in (ROOT / "examples").glob("*.yaml")
    if p.stem != "tasks" and {*yaml.safe_load(p.read_text("utf-8"))} >= RECIPE_KEYS
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_parse_and_name_the_schema(path: Path) -> None:
    assert to_job(load(path), 576).training.batch_size >= 1
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=../docs/schema.json\n")
    assert set(yaml.safe_load(path.read_text("utf-8"))) <= set(json.loads(schema_text())["properties"])
