"""Verification: what a clean process says about damaged folders, other bases and things that are no adapters."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import toy
import warm
from loralign import adapt, build, sites
from loralign.io import clean_process, probes
from loralign.io import verify as verify_module
from loralign.io.export import export
from loralign.io.verify import SCRIPT, VerifyJob, VerifyReport, verify, verify_many
from loralign.types import LoralignError, Recipe, VerificationFailed, WorkFailed

WEIGHTS = "adapter_model.safetensors"
Run = tuple[int, dict[str, VerifyReport]]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """The clean process inherits this and does not ask the hub for bases that are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an exported folder, its base)."""
    root = tmp_path_factory.mktemp("good")
    toy.llama().save_pretrained(root / "base")
    recipe = build("lora", r=2)
    assert isinstance(recipe, Recipe)
    model = adapt(type(toy.llama()).from_pretrained(root / "base"), recipe)
    with torch.no_grad():
        for site in sites(model):
            site.layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    export(model, root / "adapter")
    return root / "adapter", root / "base"


def _flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 0x40  # the highest exponent bit of the last number
    (folder / WEIGHTS).write_bytes(bytes(data))


def _flipped_low(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4] ^= 0x01  # the lowest bit of the last number
    (folder / WEIGHTS).write_bytes(bytes(data))


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def _set(tensors: dict[str, torch.Tensor], value: torch.Tensor | None) -> None:
    key = sorted(tensors)[0]
    tensors.pop(key)
    if value is not None:
        tensors[key] = value


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped bit": (_flipped, "verification", "differ by|not finite"),
    "flipped low bit": (_flipped_low, "verification", "not the file that was exported"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "verification", "is damaged"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04pickle"), "verification", "is damaged"),
    "NaN": (_tensors(lambda t: _set(t, torch.full((2, 48), float("nan")))), "verification", "holds NaN"),
    "empty": (_tensors(lambda t: _set(t, torch.zeros(0, 48))), "verification", "is empty"),
    "missing tensor": (_tensors(lambda t: _set(t, None)), "verification", "lora_A.weight is missing in"),
    "missing pair": (
        _tensors(lambda t: [t.pop(k) for k in sorted(t)[:2]]),  # type: ignore[func-returns-value]
        "verification",
        "stock PEFT found tensors missing|its config asks for it",
    ),
    "another shape": (_tensors(lambda t: _set(t, torch.zeros(3, 48))), "verification", "its config says rank 2"),
    "another width": (_tensors(lambda t: _set(t, torch.zeros(2, 47))), "verification", "stock PEFT cannot load"),
    "integers": (_tensors(lambda t: _set(t, torch.zeros(2, 48, dtype=torch.int8))), "verification", "holds I8, not"),
    "foreign tensor": (
        _tensors(lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 32)})),
        "verification",
        "lora_B.weight is missing",
    ),
    "wrong alpha": (_config(lora_alpha=64), "verification", "differ by"),
    "probes": (
        lambda f: (f / "verify" / "probes.safetensors").write_bytes(b"junk"),
        "verification",
        "probes.*cannot be read",
    ),
    "no probes": (lambda f: shutil.rmtree(f / "verify"), "input", "no stored probes"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "input", "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "input", "no adapter folder"),
    "base gone": (
        _config(base_model_name_or_path="nobody/nothing"),
        "input",
        r"nobody/nothing is neither a local folder nor in the Hugging Face cache \(.*[\w…]\): name",
    ),
    "base unsaid": (_config(base_model_name_or_path=None), "input", "does not say which base"),
}


@pytest.fixture(scope="module")
def run(good: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The script itself, over every kind of damage at once: exit code and reports."""
    folder, base = good
    root = tmp_path_factory.mktemp("damaged")
    toy.llama(seed=1).save_pretrained(root / "other base")
    toy.llama(hidden_size=16).save_pretrained(root / "smaller base")
    jobs = {"good": (folder, base), "absent": (root / "absent", base)}
    jobs |= {"other base": (folder, root / "other base"), "smaller base": (folder, root / "smaller base")}
    for name, (damage, _, _) in DAMAGE.items():
        shutil.copytree(folder, root / name)
        damage(root / name)
        jobs[name] = (root / name, None if name.startswith("base ") else base)
    asked = [{"folder": str(f), "base": str(b) if b else None} for f, b in jobs.values()]
    (root / "jobs.json").write_text(json.dumps(asked))
    files = [str(root / "jobs.json"), str(root / "results.json")]
    done = warm.run([sys.executable, "-I", str(SCRIPT), "[]", *files])
    assert "Traceback" not in done.stderr
    results = json.loads((root / "results.json").read_text())
    return done.returncode, {name: VerifyReport(name, **r) for name, r in zip(jobs, results, strict=True)}


def test_damage_is_told_apart_in_one_sentence(run: Run) -> None:
    code, reports = run
    assert code == 3
    expected = {name: (kind, pattern) for name, (_, kind, pattern) in DAMAGE.items()}
    expected |= {"absent": ("input", "is no folder"), "other base": ("verification", "differ by")}
    expected |= {"smaller base": ("verification", "stock PEFT cannot load")}
    for name, (kind, pattern) in expected.items():
        report = reports[name]
        assert (report.kind, report.passed) == (kind, False), (name, report.failure)
        assert "\n" not in report.failure and len(report.failure) < 600, name
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(report.failure)


def test_a_good_folder_among_bad_ones_passes(run: Run) -> None:
    report = run[1]["good"]
    assert report.passed and report.relative <= report.tolerance == 1e-5
    assert report.effect > 0.1 and report.top1 == 1.0 and report.lost == 0.0
    assert "Verified in a clean process (float32, cpu)" in report.line()


def test_verify_raises_what_the_exit_codes_stand_for(good: tuple[Path, Path], tmp_path: Path) -> None:
    """One real process; the mapping of kinds to errors is the next test's."""
    folder, base = good
    shutil.copytree(folder, tmp_path / "bad")
    _flipped(tmp_path / "bad")
    with pytest.raises(VerificationFailed, match=r"differ by|not finite"):
        verify(tmp_path / "bad", base=base)


def test_kinds_become_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {kind: VerifyReport("x", kind, "said") for kind in ("ok", "input", "verification")}
    for kind, error in (("input", LoralignError), ("verification", VerificationFailed)):
        monkeypatch.setattr(verify_module, "verify_many", lambda jobs, kind=kind: [reports[kind]])
        with pytest.raises(error, match="said") as caught:
            verify("x")
        assert type(caught.value) is error
    monkeypatch.setattr(verify_module, "verify_many", lambda jobs: [reports["ok"]])
    assert verify("x").passed and asdict(verify("x"))["kind"] == "ok"


def test_a_process_that_dies_is_work_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('killed by the machine')")
    monkeypatch.setattr(verify_module, "SCRIPT", script)
    with pytest.raises(WorkFailed, match="before it had results: killed by the machine"):
        verify_many([VerifyJob(tmp_path)])


def _probes(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change how the logits are said to be computed."""
    path = folder / "verify" / "probes.safetensors"
    with safe_open(path, framework="pt") as file:
        how = json.loads(file.metadata()["loralign"])
    tensors = load_file(path)
    change(how)
    save_file(tensors, path, metadata={"loralign": json.dumps(how)})


def _checked(folder: Path, base: Path) -> VerifyReport:
    """The clean process' own function, here."""
    try:
        return VerifyReport("x", **clean_process.verify({"folder": str(folder), "base": str(base)}))
    except clean_process.Broken as error:
        return VerifyReport("x", "verification", str(error))


def _as_format_1(how: dict[str, Any]) -> None:
    del how["settings"]
    how["format"] = 1


def test_folders_of_older_versions_verify(good: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = good
    shutil.copytree(folder, tmp_path / "old")
    _probes(tmp_path / "old", _as_format_1)
    report = _checked(tmp_path / "old", base)
    assert report.passed and report.proven
    _config(base_model_name_or_path="elsewhere/base", revision="main")(tmp_path / "old")
    assert _checked(tmp_path / "old", base).passed, "where the base lies may be edited"


TAMPERED: dict[str, Any] = {
    "tolerance": float("inf"), "effect": float("nan"), "kept": 0, "profile": "x", "dtype": "int8",
    "weights": {"/dev/zero": ""}, "settings": {"../x.json": ""},
}  # fmt: skip


@pytest.mark.parametrize("key", TAMPERED)
def test_probes_that_no_export_writes_are_refused(key: str, good: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = good
    shutil.copytree(folder, tmp_path / "bad")
    _probes(tmp_path / "bad", lambda how: how.update({key: TAMPERED[key]}))
    report = _checked(tmp_path / "bad", base)
    assert f"`{key}` is" in report.failure and "which no export writes): export again" in report.failure


def test_a_folder_of_no_possible_name_is_input() -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(clean_process.BadInput, match="is no folder") as said:
            clean_process.verify({"folder": name})
        assert len(str(said.value)) < 300


@pytest.mark.parametrize(("effect", "tolerance"), [(0.018, 3e-2), (8e-6, 1e-5)], ids=["as quantised", "small"])
def test_a_wrong_scale_shows_where_the_tolerance_would_hide_it(
    effect: float, tolerance: float, good: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance of a quantised base, and an adapter that hardly moves one in fp32."""
    base = good[1]
    monkeypatch.setitem(probes.TOLERANCE, torch.float32, tolerance)
    model = adapt(type(toy.llama()).from_pretrained(base), build("lora", r=2))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):  # the effect is proportional to B
        reached = 1.0
        if (tmp_path / "out").exists():
            reached = _checked(tmp_path / "out", base).effect
        with torch.no_grad():
            for site in sites(model):
                B = site.layer.lora_B["default"].weight
                B.copy_(B * effect / reached if reached < 1 else torch.randn(B.shape, generator=draw) * 1e-2)
        export(model, tmp_path / "out", overwrite=True)
    right = _checked(tmp_path / "out", base)
    assert right.passed and right.proven and right.effect == pytest.approx(effect, rel=0.3)
    assert right.tolerance > right.effect / 10 and right.update < 0.01
    for factor in (2, 0.001):
        shutil.copytree(tmp_path / "out", tmp_path / str(factor))
        _config(lora_alpha=json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_alpha"] * factor)(
            tmp_path / str(factor)
        )
        wrong = _checked(tmp_path / str(factor), base)
        assert wrong.relative <= tolerance, "by the logits alone it would pass"
        assert "the update of" in wrong.failure
    _config(lora_alpha=33)(tmp_path / "out")  # by a thirty-second: below what logits tell, the checksum knows
    assert "adapter_config.json is not the file that was exported" in _checked(tmp_path / "out", base).failure


def test_the_clean_process_knows_nothing_of_loralign() -> None:
    text = SCRIPT.read_text() + Path(clean_process.stored.__file__).read_text()
    assert "import loralign" not in text and "from loralign" not in text
    assert "pickle" not in text.replace("unpickled", "") and '"trust_remote_code": False' in text
