"""Compact files: half the bytes or fewer, and exactly the plain export again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import toy
from loralign import LoralignError, Recipe, adapt, build, drive, optimizer, sites
from loralign.cli.app import main
from loralign.io.compact import expand
from loralign.io.export import export
from loralign.io.folder import COMPACT
from toy import batch_for

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "sbora-fa": ("sbora-fa", {"place": 1}, 0.5),
    "sbora-fb": ("sbora-fb", {}, 0.5),
    "prolora": ("prolora", {"unshared": 1, "share_A": 7, "share_B": 7}, 1 / 8 + 7 / 8 / 7),
    "reslora": ("reslora", {}, 2 / 3),
}
"""Last: the share of the plain file's numbers; r = 8, u = 1, square matrices, two layers (reslora: ranks r and 2r)."""
PLAIN = ("adapter_model.safetensors", "adapter_config.json")


def wide() -> Any:
    return toy.llama(hidden_size=140, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)


def trained(name: str, options: dict[str, Any], **fields: Any) -> Any:
    made = build(name, options, **{"r": 8, "alpha": 16.0, "seed": 3, "targets": ("q_proj", "o_proj"), **fields})
    assert isinstance(made, Recipe)
    model = adapt(wide(), made)
    opt = optimizer(model, made, 0.01)
    driver = drive(model, made, opt, 2)
    model.train()
    for _ in range(2):
        model(**batch_for(model)).loss.backward()
        opt.step()
        driver.after_step()
        opt.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compact")
    for case, (name, options, _) in CASES.items():
        model = trained(name, options)
        export(model, root / case, base_id="toy", probes=batch_for(model))
    return {case: root / case for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_it_holds_what_the_papers_say_and_gives_the_plain_adapter(
    case: str, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, share = exported[case], CASES[case][2]
    plain = load_file(folder / PLAIN[0])
    small = load_file(folder / COMPACT)
    whole = sum(t.numel() for t in plain.values())
    indices = sum(t.nbytes for t in small.values() if not t.is_floating_point())
    numbers = sum(t.numel() for t in small.values() if t.is_floating_point())
    assert numbers == pytest.approx(share * whole, rel=1e-12)
    assert indices == (4 * 8 * 4 if "sbora" in case else 0)  # four modules of rank 8
    on_disk = (folder / COMPACT).stat().st_size
    assert on_disk <= share * (folder / PLAIN[0]).stat().st_size + indices + 6000  # names, config

    assert f"`{COMPACT}` holds the same in {on_disk / (folder / PLAIN[0]).stat().st_size:.0%} of the bytes" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    assert main(["expand", str(folder / COMPACT), "--out", str(tmp_path / "plain")]) == 0
    assert "(4 modules)" in capsys.readouterr().out
    for file in PLAIN:
        assert (tmp_path / "plain" / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_head_that_trained_whole_is_in_it(tmp_path: Path) -> None:
    made = build("sbora-fa", r=8, seed=3, targets=("query",))
    model = adapt(toy.bert(), made)  # type: ignore[arg-type]
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)  # type: ignore[union-attr,operator]
        for site in sites(model):
            site.layer.lora_B["default"].live.normal_()  # type: ignore[index]
    export(model, tmp_path / "out", base_id="toy", probes=batch_for(model))
    expand(tmp_path / "out" / COMPACT, tmp_path / "plain")
    for file in PLAIN:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    assert any("classifier" in key for key in load_file(tmp_path / "plain" / PLAIN[0]))


@pytest.mark.parametrize("profile", ["portable", "merged"])
def test_only_what_is_exact_and_smaller_has_one(profile: Any, tmp_path: Path) -> None:
    model = trained("sbora-fa", {})
    export(model, tmp_path / "served", profile=profile, base_id="toy", probes=batch_for(model))
    export(model, tmp_path / "half", dtype=torch.bfloat16, base_id="toy", probes=batch_for(model))
    export(trained("delta-lora", {"wait_steps": 0}), tmp_path / "delta", base_id="toy", probes=batch_for(model))
    export(trained("lora", {}), tmp_path / "lora", base_id="toy", probes=batch_for(model))
    site = sites(model)[0]
    with torch.no_grad():
        site.layer.lora_B["default"].live[:, 0] = 0.0  # type: ignore[index]
    export(model, tmp_path / "fewer", drop={site.name: [0]}, base_id="toy", probes=batch_for(model))
    assert not list(tmp_path.rglob(COMPACT.name))


def test_an_export_over_an_earlier_one_leaves_no_compact_file_of_it(tmp_path: Path) -> None:
    model = trained("sbora-fa", {})
    export(model, tmp_path / "out", base_id="toy", probes=batch_for(model))
    assert (tmp_path / "out" / COMPACT).is_file()
    export(trained("lora", {}), tmp_path / "out", base_id="toy", probes=batch_for(model), overwrite=True)
    assert not (tmp_path / "out" / COMPACT).exists()


def test_a_damaged_or_foreign_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    source = exported["prolora"] / COMPACT
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        meta = json.loads(file.metadata()["loralign"])
    first = next(k for k in tensors if k.startswith("chunk_A"))

    def refused(why: str, changed: dict[str, Any] | None, **changes: Any) -> None:
        text = {} if changed is None else {"loralign": json.dumps({**meta, **changed})}
        save_file({**tensors, **changes.get("tensors", {})}, tmp_path / "bad.safetensors", text)
        with pytest.raises(LoralignError, match=why) as caught:
            expand(tmp_path / "bad.safetensors", tmp_path / "out")
        assert len(str(caught.value)) < 300
        assert not (tmp_path / "out").exists()

    refused("no compact adapter", None)
    refused("another version", {"format": 2})
    refused("version 9 of prolora, this is version 1", {"version": 9})
    refused("unknown here", {"method": "x" * 500})
    refused("damaged", {"args": {"strange": 1}})
    refused("must be", {"args": {"unshared": -1}})
    refused("damaged", {"sites": {"model": [1, 2]}})
    refused("has shape", {}, tensors={first: torch.zeros(2, 2)})
    refused("NaN", {}, tensors={first: torch.full_like(tensors[first], torch.nan)})
    (tmp_path / "bad.safetensors").write_bytes(source.read_bytes()[:-100])
    with pytest.raises(LoralignError, match="no readable file"):
        expand(tmp_path / "bad.safetensors", tmp_path / "out")
    with pytest.raises(LoralignError, match="is not there"):
        expand(tmp_path / "none.safetensors", tmp_path / "out")
