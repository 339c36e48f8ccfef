"""Runs alone in a fresh interpreter, with transformers, peft, torch and safetensors but without loralign.

    python -I clean_process.py '["further import path", …]' jobs.json results.json

jobs.json: [{"folder": …, "base": … or null}, …]. Each folder is loaded as any user would load it, its stored probes are
fed through it, and the logits are compared with the stored ones. One result per job: {"kind": "ok" | "input" |
"verification", "failure": sentence, figures …}. Exit code: 0 all reproduced, 3 a folder is not what it should be,
2 a folder or base that cannot be used at all. Nothing is unpickled, no remote code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # in front, as PYTHONPATH has them: an older package beside this interpreter must not step in
    sys.path[:0] = [path for path in json.loads(sys.argv[1]) if path not in sys.path]

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PROBES = Path("verify") / "probes.safetensors"


class BadInput(Exception):
    """Something that is not there, or is no adapter."""


class Broken(Exception):
    """An adapter that is damaged or computes something else."""


def read_probes(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor | None]:
    """(how the logits were computed, inputs, logits, expected logits or None)."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder: name the one that export wrote")
    if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise BadInput(f"{folder} is no adapter folder (no adapter_config.json): name the one that export wrote")
    if not (folder / PROBES).is_file():
        raise BadInput(f"{folder} has no stored probes ({PROBES}): only folders that loralign exported can be verified")
    try:
        with safe_open(folder / PROBES, framework="pt") as file:
            how = json.loads((file.metadata() or {})["loralign"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        inputs = {key.removeprefix("input."): t for key, t in tensors.items() if key.startswith("input.")}
        return how, inputs, tensors["logits"], tensors.get("expected")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise Broken(f"{folder / PROBES} cannot be read ({first_line(error)}): export again") from error


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The stored tensors, checked to be readable, not empty and finite."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise BadInput(f"{folder} has no adapter_model.safetensors: export again")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise Broken(f"{path} is damaged ({first_line(error)}): export again") from error
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise Broken(f"{name} in {path} is empty: export again")
        if not bool(tensor.isfinite().all()):
            raise Broken(f"{name} in {path} holds NaN or infinite values: the run has diverged")
    if not tensors:
        raise Broken(f"{path} holds no tensors: export again")
    return tensors


def load_base(source: str, revision: str | None, how: dict[str, Any], device: str) -> Any:
    """The base model, or a merged one, by the class that was trained; safetensors (or GGUF) only."""
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    if source.endswith(".gguf"):
        options["gguf_file"], source = os.path.basename(source), os.path.dirname(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the base model {source} is neither a local folder nor in the Hugging Face cache ({first_line(error)}): "
            "name its folder with --base (in Python base=…)"
        ) from error
    name = how["model_class"]
    if not hasattr(transformers, name):
        name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise BadInput(
            f"transformers has no class {name or how['model_class']}, so {source} needs remote code: not verified"
        )
    if how["labels"] is not None and config.num_labels != how["labels"]:
        options["num_labels"] = how["labels"]
    if how["attention"]:
        options["attn_implementation"] = how["attention"]
    if how["quantization"]:
        options["quantization_config"], options["device_map"] = how["quantization"], device
    else:
        options["dtype"] = getattr(torch, how["base_dtype"])
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    try:
        model = getattr(transformers, name).from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the base model {source} cannot be loaded as {name}: {first_line(error)}") from error
    return model if how["quantization"] else model.to(device, getattr(torch, how["dtype"]))


def load_adapter(model: Any, folder: Path, stored: dict[str, Tensor]) -> Any:
    """Stock PEFT on the base; every stored tensor must have arrived, and none may be missing."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise Broken(f"stock PEFT cannot load {folder} on this base: {first_line(error)}") from error
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise Broken(f"stock PEFT found tensors missing in {folder}: {missing[0][:200]}")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in stored.items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise Broken(f"stock PEFT does not load {name} of {folder}: it names a module that the base has not")
    if set(loaded) - set(stored):
        raise Broken(f"{sorted(set(loaded) - set(stored))[0]} is not in {folder}, but its config asks for it")
    return model


def compute(model: Any, inputs: dict[str, Tensor], how: dict[str, Any], device: str) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**{key: value.to(device) for key, value in inputs.items()})
    logits = next(value for key, value in out.items() if key.endswith("logits")).float().cpu()
    return logits[:, -how["kept"] :] if logits.dim() == 3 else logits


def compare(got: Tensor, want: Tensor) -> dict[str, Any]:
    if tuple(got.shape) != tuple(want.shape):
        raise Broken(f"the logits have shape {tuple(got.shape)}, stored were {tuple(want.shape)}")
    gap, norm = (got - want).abs(), float(want.norm())
    return {
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "relative": float(gap.norm()) / norm if norm else float(gap.norm()),
        "top1": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    }


def verify(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of one folder; raises BadInput or Broken."""
    folder = Path(job["folder"])
    how, inputs, logits, expected = read_probes(folder)
    device = "cuda" if how["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    if how["profile"] == "merged":
        source = str(folder)
        model = load_base(source, None, how, device)
    else:
        stored = read_adapter(folder)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        source = job.get("base") or config.get("base_model_name_or_path")
        if not source:
            raise BadInput(
                f"{folder} does not say which base model it belongs to: name it with --base (in Python base=…)"
            )
        revision = None if job.get("base") else config.get("revision")
        model = load_adapter(load_base(source, revision, how, device), folder, stored)
    got = compute(model, inputs, how, device)
    figures = compare(got, logits if expected is None else expected)
    figures.update(profile=how["profile"], base=source, tolerance=how["tolerance"], effect=how["effect"])
    figures.update(lost=how["lost"], device=device, dtype=how["dtype"])
    if not bool(got.isfinite().all()):
        raise Broken(f"the logits of {folder} are not finite")
    if not figures["relative"] <= how["tolerance"]:
        kept = f"({how['tolerance']:.0e} allowed): another base, or a damaged folder"
        return {
            **figures,
            "kind": "verification",
            "failure": f"the logits of {folder} differ by {figures['relative']:.1e} {kept}",
        }
    for name, digest in how["weights"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                failure = f"{folder / name} is not the file that was exported, though the logits agree: export again"
                return {**figures, "kind": "verification", "failure": failure}
    return {**figures, "kind": "ok", "failure": ""}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:300]


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
            said = f"{job['folder']} cannot be verified: {type(error).__name__}: {first_line(error)}"
            result = {"kind": "verification", "failure": said}
        results.append({**result, "seconds": time.perf_counter() - began})
    if any(name == "loralign" or name.startswith("loralign.") for name in sys.modules):
        raise SystemExit("loralign was imported: this proves nothing")
    answers.write_text(json.dumps(results), encoding="utf-8")
    kinds = {result["kind"] for result in results}
    return 3 if "verification" in kinds else 2 if "input" in kinds else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[2]), Path(sys.argv[3])))
