"""A hundred damaged adapter folders: whoever opens one says what is wrong in a sentence, nobody takes it for good."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_trl
import toy
from loralign import adapt, build, sites
from loralign.evidence.sources import Adapter
from loralign.io import clean_process
from loralign.io.export import export
from loralign.train.use import open_adapter
from loralign.types import LoralignError, Recipe, WorkFailed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Damage = Callable[[Path], None]

FIELDS: dict[str, list[Any]] = {
    "r": [0, -4, "x", None, 3, 1.5, True, 10**12],
    "lora_alpha": [None, "x", float("inf"), float("nan"), [1], True],
    "target_modules": [None, [], "", ["q_proj"], ["nothing"], "(([a-z.0-9_]+)+)+X", "(", [1], {"a": 1}, ["lm_head"]],
    "exclude_modules": [["q_proj"], "(", 3],
    "rank_pattern": [{"q_proj": 3}, {"q_proj": 0}, {"(": 2}, [1], {"q_proj": "x"}, "x"],
    "alpha_pattern": [{"q_proj": "x"}, [1], {"(": 1}],
    "peft_type": ["IA3", "FOO", None, 3, ["LORA"], "LOHA"],
    "bias": ["all", 3],
    "use_dora": [True, "x"],
    "use_rslora": ["x", 3],
    "lora_bias": [True],
    "init_lora_weights": ["pissa", "unknown", 3, ["x"], {}],
    "modules_to_save": ["x", [3], ["lm_head"]],
    "layer_replication": [[[0, 2]]],
    "target_parameters": [["x"]],
    "trainable_token_indices": [[1]],
    "lora_dropout": [2, "x", None],
    "revision": [3],
    "base_model_name_or_path": [3, ["x"]],
}


def _config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**fields, **changes}), encoding="utf-8")

    return damage


def _text(text: str | bytes, name: str = CONFIG) -> Damage:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def _tensors(change: Callable[[dict[str, Tensor], random.Random], Any]) -> Callable[[int], Damage]:
    def seeded(seed: int) -> Damage:
        def damage(folder: Path) -> None:
            tensors = load_file(folder / WEIGHTS)
            change(tensors, random.Random(seed))
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)

        return damage

    return seeded


def _one(tensors: dict[str, Tensor], draw: random.Random) -> str:
    return draw.choice(sorted(tensors))


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor], random.Random], None]:
    def change(tensors: dict[str, Tensor], draw: random.Random) -> None:
        for key in list(tensors):
            if old in key:
                tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _without(part: str) -> Callable[[dict[str, Tensor], random.Random], None]:
    def change(tensors: dict[str, Tensor], draw: random.Random) -> None:
        for key in [k for k in tensors if part in k]:
            del tensors[key]

    return change


def _replaced(make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], random.Random], None]:
    def change(tensors: dict[str, Tensor], draw: random.Random) -> None:
        key = _one(tensors, draw)
        tensors[key] = make(tensors[key])

    return change


def _holding(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == t.numel() // 2, value, t)


SHAPED: dict[str, Callable[[dict[str, Tensor], random.Random], Any]] = {
    "one gone": lambda t, d: t.pop(_one(t, d)),
    "one pair gone": lambda t, d: [t.pop(k) for k in sorted(t) if k.startswith(_one(t, d).split(".lora_")[0])][:0],
    "one layer gone": _without("layers.0."),
    "all gone": _without(""),
    "a module renamed": _rename("q_proj", "query"),
    "a prefix gone": _rename("base_model.model.", ""),
    "layer 99": _rename("layers.1.", "layers.99."),
    "A and B exchanged": lambda t, d: [
        _rename(*names)(t, d) for names in (("lora_A", "side"), ("lora_B", "lora_A"), ("side", "lora_B"))
    ],
    "one transposed": _replaced(lambda t: t.T),
    "one too wide": _replaced(lambda t: torch.cat([t, t], dim=1)),
    "one too long": _replaced(lambda t: torch.cat([t, t])),
    "one flat": _replaced(lambda t: t.flatten()),
    "one empty": _replaced(lambda t: t[:0]),
    "one of integers": _replaced(lambda t: t.to(torch.int32)),
    "one NaN": _replaced(_holding(float("nan"))),
    "one infinite": _replaced(_holding(float("inf"))),
    "one more": lambda t, d: t.update({"base_model.model.model.layers.0.mlp.odd.weight": torch.ones(2, 2)}),
    "one pair more": lambda t, d: t.update(
        {f"base_model.model.model.layers.9.mlp.up_proj.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    ),
    "an embedding": lambda t, d: t.update(
        {f"base_model.model.model.embed_tokens.lora_embedding_{s}": torch.ones(2, 2) for s in "AB"}
    ),
    "a magnitude": lambda t, d: t.update(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}
    ),
}  # fmt: skip


def _folder_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


DAMAGES: dict[str, Damage] = {f"{k} = {v!r}": _config(**{k: v}) for k, values in FIELDS.items() for v in values}
DAMAGES |= {f"{name} {seed}": _tensors(change)(seed) for name, change in SHAPED.items() for seed in (0, 1)}
DAMAGES |= {f"weights cut at {n}": lambda f, n=n: _cut(f / WEIGHTS, n) for n in (0, 7, 9, 300, -3000, -1)}  # type: ignore[misc]
DAMAGES |= {f"config cut at {n}": lambda f, n=n: _cut(f / CONFIG, n) for n in (0, 1, 100, -3)}  # type: ignore[misc]
DAMAGES |= {
    "config is a list": _text("[]"), "config is null": _text("null"), "config is latin": _text(b'{"a": "\xe4"}'),
    "config is deep": _text("[" * 100_000), "weights are a pickle": _text(b"\x80\x04pickle", WEIGHTS),
    "weights gone": lambda f: (f / WEIGHTS).unlink(), "config gone": lambda f: (f / CONFIG).unlink(),
    "only a pickle": lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin") and None,
    "weights are a folder": _folder_for_weights,
    "no folder": lambda f: shutil.rmtree(f),
}  # fmt: skip


def _cut(path: Path, at: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:at])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `base` and `adapter`."""
    root = tmp_path_factory.mktemp("good")
    toy.llama().save_pretrained(root / "base")
    tiny_trl.tokenizer().save_pretrained(root / "base")
    recipe = build("lora", r=2)
    assert isinstance(recipe, Recipe)
    model = adapt(type(toy.llama()).from_pretrained(root / "base"), recipe)
    with torch.no_grad():
        for site in sites(model):
            site.layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    export(model, root / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("loralign.carrier.stored.MATCHING_S", 0.2)
        patch.setattr(clean_process.stored, "MATCHING_S", 0.2)
        yield root


def test_the_good_folder_is_opened_and_verified(good: Path) -> None:
    open_adapter(good / "adapter", str(good / "base"))
    figures = clean_process.verify({"folder": str(good / "adapter"), "base": str(good / "base")})
    assert figures["kind"] == "ok" and figures["proven"]
    assert Adapter(good / "adapter").names


@pytest.mark.parametrize(("base", "revision"), [(None, "0123abc"), ("other", None)])
def test_the_base_is_loaded_at_the_revision_that_the_adapter_names(
    base: str | None, revision: str | None, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another base its revision says nothing."""
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    _config(base_model_name_or_path="org/base", revision="0123abc")(tmp_path / "adapter")
    asked: list[tuple[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        raise LoralignError("no hub here")

    monkeypatch.setattr("loralign.train.use.load", load)
    with pytest.raises(LoralignError, match="no hub here"):
        open_adapter(tmp_path / "adapter", base, "none")
    assert asked == [(base or "org/base", revision)]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_all(name: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "adapter", tmp_path / "bad")
    DAMAGES[name](tmp_path / "bad")
    with pytest.raises(LoralignError) as refused:
        open_adapter(tmp_path / "bad", str(good / "base"))
    with pytest.raises((clean_process.Broken, clean_process.BadInput)) as found:
        clean_process.verify({"folder": str(tmp_path / "bad"), "base": str(good / "base")})
    assert type(refused.value) is LoralignError and not isinstance(refused.value, WorkFailed)
    for said in (str(refused.value), str(found.value)):
        assert said and len(said) < 300 and "\n" not in said, said
        assert "unexpected" not in said.split(":")[0]


def test_an_adapter_of_a_changed_base_says_how_it_becomes_plain(good: Path, tmp_path: Path) -> None:
    """PiSSA's factors count from a base without its main directions: to read them as plain would be wrong."""
    shutil.copytree(good / "adapter", tmp_path / "pissa")
    _config(init_lora_weights="pissa")(tmp_path / "pissa")
    with pytest.raises(LoralignError, match="may change the base: save it with PEFT's argument `path_initial_model_f"):
        open_adapter(tmp_path / "pissa", str(good / "base"))
