"""A quantised base from rows to a verified adapter, by the command line: train, verify, eval, export, resume, plan.

    python scripts/quantised_check.py nf4 --out OUT                 # bitsandbytes, one GPU
    python scripts/quantised_check.py nf4 --key --out OUT           # quantised while it is loaded: `quantize: nf4`
    python scripts/quantised_check.py int8 --key --out OUT          # torchao, also on the CPU
    python scripts/quantised_check.py nf4 --key --tiny --out OUT    # below a minute

A Llama of random weights at the shape of SmolLM2-135M on a GPU, a tiny one on a CPU, is stored quantised, or with --key
quantised by the recipe; every command must end as it should, an adapter of another scale must not verify, and a run
that was stopped must end as the whole one: to the bit on a CPU, within 1 % on a GPU, whose sums are in no fixed order.
A table says what came out, OUT/quantised.json also what each command said: the peak of the run's tensors and what the
plan says of it (rows are as long as the plan takes them to be, and what torch keeps for matrix products, which the plan
leaves out, is there before and not counted), the peak while the base is loaded, and how far the adapter's logits on
the base as it is are from those in training, beside how far it moves them.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)

from loralign.carrier.quantise import Quantize
from loralign.cli.app import main as command
from loralign.io.verify import VerifyJob, verify_many
from loralign.train.model import load

WORDS, LENGTH = 4000, 64
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3}  # fmt: skip
STEPS = 6
RECIPE = """\
model: {model}
data: {{train: rows.jsonl, eval: 0.25, max_length: {length}}}
method: lora
rank: 8
train: {{steps: {steps}, batch_size: 8, learning_rate: 1e-3, save_every: 3, log_every: 1}}
output: out
quantize: {key}
"""


def plain(sizes: dict[str, int]) -> None:
    """base, rows.jsonl and r.yaml, which trains on base, in the working folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=256, **sizes))
    model.to(dtype()).save_pretrained("base")
    words = Tokenizer(WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{k}": k for k in range(3, WORDS)}, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained("base")
    prompts = [" ".join(f"w{3 + (7 * k + j) % 90}" for j in range(LENGTH - 3)) for k in range(64)]
    rows = [{"prompt": prompt, "completion": f" w{100 + k % 3} w{110}"} for k, prompt in enumerate(prompts)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe("base", "null")


def recipe(model: str, key: str) -> None:
    text = RECIPE.format(model=model, key=key, steps=STEPS, length=LENGTH)
    Path("r.yaml").write_text(text, encoding="utf-8")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def quantise(kind: str) -> None:
    """Store base as quantised, which r.yaml trains on from now on."""
    if kind == "nf4":
        config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype())
    else:
        config = TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(
        "base", quantization_config=config, dtype=dtype(), device_map="cuda" if torch.cuda.is_available() else None
    ).save_pretrained("quantised")
    for file in Path("base").iterdir():
        if not Path("quantised", file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, "quantised")
    recipe("quantised", "null")


def run(*words: object) -> dict[str, Any]:
    """One command in this process."""
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()
    with redirect_stdout(out), redirect_stderr(err):
        code = command([str(word) for word in words])
    said = {"command": " ".join(map(str, words)), "code": code, "seconds": time.perf_counter() - started}
    print(f"{said['command']}: {code}, {said['seconds']:.1f} s", flush=True)
    return {**said, "out": out.getvalue()[-2000:], "err": err.getvalue()[-2000:]}


def scaled(folder: str, to: str) -> None:
    shutil.copytree(folder, to)
    path = Path(to, "adapter_config.json")
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**body, "lora_alpha": 1.05 * body["lora_alpha"]}), encoding="utf-8")


def apart(one: str, other: str) -> float:
    """‖B − A‖ / ‖A‖ over all tensors of two adapters."""
    a, b = (load_file(Path(f, "adapter_model.safetensors")) for f in (one, other))
    off = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return float((off / sum(float(t.double().square().sum()) for t in a.values())) ** 0.5)


def kept_by_torch() -> int:
    """Bytes on the GPU once it has multiplied matrices in a forward and a backward, each of which keeps a workspace."""
    gc.collect()
    x = torch.ones(8, 8, device="cuda", dtype=dtype(), requires_grad=True)
    (x @ x).sum().backward()
    del x
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def while_loading(kind: Quantize) -> int:
    """Bytes of a GPU at the fullest moment of loading base so; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    before = kept_by_torch()
    load("base", quantize=kind)
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def on_plain_base() -> tuple[float, float]:
    """How far the adapter's logits on base as it is are from those in training, and how far it moves the latter."""
    with safe_open("out/verify/probes.safetensors", framework="pt") as file:
        how, want = json.loads(file.metadata()["loralign"]), file.get_tensor("logits").float()
        ids = file.get_tensor("input.input_ids")
    found = AutoModelForCausalLM.from_pretrained("base", dtype=dtype())
    got = PeftModel.from_pretrained(found, "out").eval()(ids).logits[:, -want.shape[1] :].float()
    return float((got - want).norm() / want.norm()), float(how["effect"])


def verified(base: str) -> dict[str, str]:
    """ok or not, of what was written; one clean process for all."""
    jobs = [VerifyJob("merged"), *(VerifyJob(folder, base) for folder in ("out", "served", "scaled"))]
    return {str(report.folder): report.kind for report in verify_many(jobs)}


def check(kind: Quantize, key: bool, sizes: dict[str, int]) -> dict[str, Any]:
    plain(sizes)
    of = "base" if key else "quantised"
    if key:
        recipe("base", kind)
    else:
        quantise(kind)
    cuda = torch.cuda.is_available()
    loading = while_loading(kind)
    before = kept_by_torch() if cuda else 0
    found: dict[str, Any] = {"train": run("train", "r.yaml")}
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    if found["train"]["code"] not in (0, 3):
        sys.exit(found["train"]["err"])
    wrong = [] if found["train"]["code"] == 0 and "Verified" in found["train"]["out"] else ["train"]
    scaled("out", "scaled")
    shutil.copytree("out", "again")
    shutil.rmtree(f"again/checkpoints/checkpoint-{STEPS}")
    for name, code, words in (
        ("eval", 0, ("eval", "out", "--data", "rows.jsonl", "--base", of, "--limit", 8)),
        ("portable", 0, ("export", "out", "--base", of, "--profile", "portable", "--out", "served")),
        ("merged", 0, ("export", "out", "--base", of, "--profile", "merged", "--out", "merged")),
        ("resume", 0, ("train", "r.yaml", "--set", "output=again", "--resume")),
        ("plan", 0, ("plan", "r.yaml", "--json", *(("--device", "cuda") if cuda else ()))),
    ):
        found[name] = run(*words)
        if found[name]["code"] != code:
            wrong.append(name)
    found["verified"] = reports = verified(of)
    wrong += [f"verify {name}" for name, kind in reports.items() if (kind == "ok") == (name == "scaled")]
    off = apart("out", "again")
    if off > (0.01 if cuda else 0.0):
        wrong.append("resumed run")
    planned = json.loads(found["plan"]["out"])["peak_bytes"] if found["plan"]["code"] == 0 else None
    away, effect = on_plain_base()
    figures = {"resumed_off": off, "loading_bytes": loading, "peak_bytes": peak, "planned_bytes": planned}
    return {**found, **figures, "plain_base_off": away, "effect": effect, "wrong": wrong}


def table(found: dict[str, Any]) -> list[str]:
    """What came out, a line each."""
    rows = {k: f"{v['code']} in {v['seconds']:.1f} s" for k, v in found.items() if isinstance(v, dict) and "code" in v}
    rows |= {f"verify {name}": kind for name, kind in found["verified"].items()}
    rows |= {"resumed run, off": f"{found['resumed_off']:.1e}"}
    peaks = {"peak while loading": "loading_bytes", "peak of a step": "peak_bytes", "the same by plan": "planned_bytes"}
    rows |= {said: f"{found[key] / 1e6:.0f} MB" for said, key in peaks.items() if found[key]}
    rows |= {"logits on the base as it is, off": f"{found['plain_base_off']:.1%}, moved {found['effect']:.1%}"}
    rows |= {f"WRONG {name}": found.get(name, {}).get("err", "")[-600:] for name in found["wrong"]}
    return [f"{name:34} {said}" for name, said in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=get_args(Quantize))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--key", action="store_true", help="quantise while loading, by the recipe's key")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers on a GPU, too")
    args = parser.parse_args()
    folder, started = args.out / args.kind, time.perf_counter()
    folder.mkdir(parents=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    found = check(args.kind, args.key, SMALL if args.tiny or not torch.cuda.is_available() else LARGE)
    said = {"kind": args.kind, "key": args.key, **found}
    Path("../quantised.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    for made in ("base", "quantised", "merged"):
        shutil.rmtree(made, ignore_errors=True)
    how = "quantised while it is loaded" if args.key else "stored so"
    print("\n".join([f"{args.kind}, {how}: {time.perf_counter() - started:.0f} s", *table(found)]))
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
