"""Runs alone in a fresh interpreter, with transformers, peft, torch and safetensors but without loralign.

    python -I clean_process.py '["further import path", …]' jobs.json results.json

jobs.json: [{"folder": …, "base": … or null}, …]. Each folder is loaded as any user would load it, its stored probes are
fed through it, and the logits are compared with the stored ones. One result per job: {"kind": "ok" | "input" |
"verification", "failure": sentence, figures …}. Exit code: 0 all reproduced, 3 a folder is not what it should be,
2 a folder or base that cannot be used at all. Nothing is unpickled, no remote code runs.

The update itself is compared, logits − logits without it, where the precision of the logits is no fine measure of it
(the stored tensor "base"). `proven`: a scale that is wrong by a tenth would have shown.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # in front, as PYTHONPATH has them: an older package beside this interpreter must not step in
    sys.path[:0] = [path for path in json.loads(sys.argv[1]) if path not in sys.path]

import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor


def _by_path(path: Path) -> Any:
    """A file of loralign that needs no other one, without importing the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


stored = _by_path(Path(__file__).parents[1] / "carrier" / "stored.py")
gguf_file = _by_path(Path(__file__).with_name("gguf_reader.py"))
BadInput, Broken = stored.BadInput, stored.Broken
shown, first_line = stored.shown, stored.first_line

PROBES = Path("verify") / "probes.safetensors"
WEIGHTS = (".safetensors", ".gguf")
LOOSEST = 3e-2
"""No export of loralign allows more."""
SHARE = 0.1
"""A difference below this share of the update is proof of its scale."""
WRONG = 0.5
"""One above this share, and above the noise, is another update."""


def read_probes(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(how the logits were computed, inputs, what came out: logits, expected, base)."""
    try:
        there = folder.is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise BadInput(f"{shown(folder)} is no folder: name the one that export wrote")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json", gguf_file.NAME)):
        raise BadInput(f"{shown(folder)} is no adapter folder (no adapter_config.json): name the one that export wrote")
    if not (folder / PROBES).is_file():
        raise BadInput(
            f"{shown(folder)} has no stored probes ({PROBES}): only folders that loralign exported can be verified"
        )
    try:
        with safe_open(folder / PROBES, framework="pt") as file:
            how = json.loads((file.metadata() or {})["loralign"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        inputs = {key.removeprefix("input."): t for key, t in tensors.items() if key.startswith("input.")}
        wrong = wrong_field(how) or ("" if "logits" in tensors and inputs else "no logits or no inputs")
        if wrong:
            raise ValueError(wrong)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise Broken(f"{shown(folder / PROBES)} cannot be read ({first_line(error)}): export again") from error
    return how, inputs, {key: tensors[key] for key in ("logits", "expected", "base") if key in tensors}


def wrong_field(how: Any) -> str:
    """The first setting that no export writes, "" where all are as they should be."""
    precisions = ("float32", "float16", "bfloat16")
    files, settings = how["weights"], how.get("settings", {})
    fine = {
        "profile": how["profile"] in ("peft", "portable", "gguf", "merged"),
        "base_dtype": how["base_dtype"] in precisions,
        "dtype": how["dtype"] in precisions,
        "kept": isinstance(how["kept"], int) and how["kept"] >= 1,
        "tolerance": 0 < how["tolerance"] <= LOOSEST,
        "effect": 0 <= how["effect"] < math.inf,
        "lost": 0 <= how["lost"] < math.inf,
        "weights": isinstance(files, dict) and all(n == Path(n).name and n.endswith(WEIGHTS) for n in files),
        "settings": isinstance(settings, dict) and set(settings) <= {"adapter_config.json", "config.json"},
    }
    wrong = [key for key, right in fine.items() if not right]
    return f"`{wrong[0]}` is {stored.short(how.get(wrong[0]))}, which no export writes" if wrong else ""


def load_base(source: str, revision: str | None, how: dict[str, Any], device: str) -> Any:
    """The base model, or a merged one, by the class that was trained; safetensors (or GGUF) only."""
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    if source.endswith(".gguf"):
        options["gguf_file"], source = os.path.basename(source), os.path.dirname(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        stored.check_base(config)
    except Exception as error:
        said = textwrap.shorten(first_line(error), 80, placeholder=" …")
        raise BadInput(
            f"the base model {shown(Path(source))} is neither a local folder nor in the Hugging Face cache ({said}): "
            "name its folder with --base (in Python base=…)"
        ) from error
    name = str(how["model_class"])
    if not hasattr(transformers, name):
        name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise BadInput(
            f"transformers has no class {name or how['model_class']}, so {source} needs remote code: not verified"
        )
    if how["labels"] is not None and config.num_labels != how["labels"]:
        options["num_labels"], options["ignore_mismatched_sizes"] = how["labels"], True  # the head is the adapter's
    if how.get("vocabulary") is not None and getattr(config, "vocab_size", None) != how["vocabulary"]:
        options["vocab_size"] = how["vocabulary"]
    if how["attention"]:
        options["attn_implementation"] = how["attention"]
    if how["quantization"]:
        options["device_map"] = device
        if getattr(config, "quantization_config", None) is None:  # quantised while it is loaded
            options["quantization_config"] = how["quantization"]
    options["dtype"] = getattr(torch, how["base_dtype"])
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    try:
        model = getattr(transformers, name).from_pretrained(source, **options)
    except Exception as error:
        said = f"the base model {shown(Path(source))} cannot be loaded as {name}: {first_line(error)[:120]}"
        raise BadInput(f"{said}; download or copy it again") from error
    return model if how["quantization"] else model.to(device, getattr(torch, how["dtype"]))


def compute(model: Any, inputs: dict[str, Tensor], how: dict[str, Any], device: str) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**{key: value.to(device) for key, value in inputs.items()})
    logits = next(value for key, value in out.items() if key.endswith("logits")).float().cpu()
    return logits[:, -how["kept"] :] if logits.dim() == 3 else logits


def without_update(model: Any) -> Any:
    """The same model with every low-rank update off; heads that were trained in full stay."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = dict.fromkeys(module.scaling, 0.0)
    return model


def compare(got: Tensor, want: Tensor) -> dict[str, Any]:
    if tuple(got.shape) != tuple(want.shape):
        raise Broken(f"the logits have shape {tuple(got.shape)}, stored were {tuple(want.shape)}")
    gap = (got - want).abs()
    return {
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "relative": relative(got, want),
        "top1": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    }


def relative(got: Tensor, want: Tensor) -> float:
    norm = float(want.norm())
    return float((got - want).norm()) / norm if norm else float((got - want).norm())


def verify(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of one folder; raises BadInput or Broken."""
    folder = Path(job["folder"])
    how, inputs, kept = read_probes(folder)
    device = "cuda" if how["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    source, model = opened(folder, job.get("base"), how, device)
    want = kept.get("expected", kept["logits"])
    got = compute(model, inputs, how, device)
    figures = compare(got, want)
    figures.update(profile=how["profile"], base=source, tolerance=how["tolerance"], effect=how["effect"])
    figures.update(
        lost=how["lost"], device=device, dtype=how["dtype"], proven=how["tolerance"] <= SHARE * how["effect"]
    )
    if not bool(got.isfinite().all()):
        raise Broken(f"the logits of {shown(folder)} are not finite")
    if "base" in kept and how["profile"] != "merged":
        base = compute(without_update(model), inputs, how, device)
        off = relative(got - base, want - kept["base"])
        noise = max(how["tolerance"] / 4, 4 * relative(base, kept["base"]))  # what two machines may differ by
        figures.update(update=off, proven=off <= SHARE, other=off > WRONG and off * how["effect"] > noise)
    said = judged(folder, how, figures)
    return {**figures, **said}


def opened(folder: Path, base: str | None, how: dict[str, Any], device: str) -> tuple[str, Any]:
    """Name of what was loaded, and the model."""
    if how["profile"] == "merged":
        return str(folder), load_base(str(folder), None, how, device)
    if how["profile"] == "gguf":
        return opened_gguf(folder, base, how, device)
    config = stored.read_config(folder)
    tensors = stored.read_tensors(folder, config)
    source = base or named(config.get("base_model_name_or_path"), folder)
    model = load_base(source, None if base else config.get("revision"), how, device)
    return source, stored.load_adapter(model, folder, config, tensors)


def opened_gguf(folder: Path, base: str | None, how: dict[str, Any], device: str) -> tuple[str, Any]:
    """A file of llama.cpp, written back as stock PEFT's adapter and loaded as such."""
    path = folder / gguf_file.NAME
    try:
        fields = gguf_file.Fields(path)
        source = base or named(fields.base, folder)
        model = load_base(source, None if base else fields.revision, how, device)
        with tempfile.TemporaryDirectory(prefix="loralign-gguf-") as room:
            gguf_file.write_as_peft(fields, model, Path(room))
            config = stored.read_config(Path(room))
            return source, stored.load_adapter(model, Path(room), config, stored.read_tensors(Path(room), config))
    except ImportError as error:
        raise BadInput(f"{shown(path)} is read by the package gguf: pip install 'loralign[gguf]'") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise Broken(f"{shown(path)} is damaged ({first_line(error)}): export again") from error


def named(base: Any, folder: Path) -> str:
    if not isinstance(base, str) or not base:
        raise BadInput(
            f"{shown(folder)} does not say which base model it belongs to: name it with --base (in Python base=…)"
        )
    return base


def judged(folder: Path, how: dict[str, Any], figures: dict[str, Any]) -> dict[str, str]:
    """Kind and failure: other logits, another update, other files."""
    wrong, other = "", figures.pop("other", False)
    if not figures["relative"] <= how["tolerance"]:
        allowed = f"({how['tolerance']:.0e} allowed): another base, or a damaged folder"
        wrong = f"the logits of {shown(folder)} differ by {figures['relative']:.1e} {allowed}"
    elif other:
        said = f"the update of {shown(folder)} differs by {figures['update']:.0%} from the exported one"
        wrong = f"{said}: another scale, another base, or a damaged folder"
    else:
        for name, was in {**how["weights"], **how.get("settings", {})}.items():
            if stored.digest(folder / name) != was:
                agree = "though the logits agree" if figures["proven"] else "and its logits cannot tell what it does"
                wrong = f"{shown(folder / name)} is not the file that was exported, {agree}: export again"
                break
    return {"kind": "verification" if wrong else "ok", "failure": wrong}


def main(questions: Path, answers: Path) -> int:
    jobs = json.loads(questions.read_text(encoding="utf-8"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for job in jobs:
        began = time.perf_counter()
        try:
            result = verify(job)
        except BadInput as error:
            result = {"kind": "input", "failure": str(error)}
        except Broken as error:
            result = {"kind": "verification", "failure": str(error)}
        except Exception as error:  # one damaged folder must not hide the others
            said = f"{shown(Path(job['folder']))} cannot be verified: {type(error).__name__}: {first_line(error)}"
            result = {"kind": "verification", "failure": said}
        results.append({**result, "seconds": time.perf_counter() - began})
    if any(name == "loralign" or name.startswith("loralign.") for name in sys.modules):
        raise SystemExit("loralign was imported: this proves nothing")
    answers.write_text(json.dumps(results), encoding="utf-8")
    kinds = {result["kind"] for result in results}
    return 3 if "verification" in kinds else 2 if "input" in kinds else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[2]), Path(sys.argv[3])))
