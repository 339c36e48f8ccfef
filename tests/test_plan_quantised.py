"""`plan` on a checkpoint that is stored quantised: the bytes that its own config says, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_world import assert_one_sentence, run, world_in
from loralign.plan.quantised import saved_bytes
from toy import llama

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_in(tmp_path_factory.mktemp("quantised")) as root:
        yield root


def plan(section: dict[str, Any] | None, *more: str) -> Any:
    shutil.rmtree("q", ignore_errors=True)
    shutil.copytree("base", "q")
    path = Path("q/config.json")
    body = json.loads(path.read_text(encoding="utf-8"))
    if section is not None:
        body["quantization_config"] = section
    path.write_text(json.dumps(body), encoding="utf-8")
    words = ("model=q", "method=lora", "options={}", "train.precision=bf16", *more)
    return run("plan", "r.yaml", "--json", *(word for o in words for word in ("--set", o)))


def linear(world: Path) -> list[torch.Tensor]:
    """The linear layers without the head."""
    return [t for name, t in load_file(world / "base/model.safetensors").items() if "_proj" in name]


def test_bytes_are_those_of_the_stored_weights(world: Path) -> None:
    plain = json.loads(plan(None).out)["weights_bytes"]
    numbers, rows = (sum(count(t) for t in linear(world)) for count in (torch.numel, len))
    four, eight = (json.loads(plan(section).out)["weights_bytes"] for section in (NF4, INT8))
    assert plain - four == pytest.approx(numbers * (2 - 0.5 - 4 / 64), abs=14)
    assert plain - eight == numbers - 4 * rows
    twice = json.loads(plan({**NF4, "bnb_4bit_use_double_quant": True}).out)["weights_bytes"]
    assert twice < four
    left = json.loads(plan({**NF4, "llm_int8_skip_modules": ["down_proj"]}).out)["weights_bytes"]
    assert four < left < plain


KINDS = {  # a section, bytes of a weight of n numbers in d_out rows
    "4 bit": (NF4, lambda n, rows: int(n * (0.5 + 4 / 64))),
    "4 bit, twice": ({**NF4, "bnb_4bit_use_double_quant": True}, lambda n, rows: int(n * (0.5 + (1 + 4 / 256) / 64))),
    "8 bit": (INT8, lambda n, rows: n + 4 * rows),
    "torchao": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, lambda n, rows: n + 4 * rows),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("left_out", "count"),
    [((), 14), (("gate_proj", "up_proj", "down_proj", "o_proj"), 6), (("model.layers.1",), 7)],
)
def test_hand_counts_of_what_is_stored_and_of_the_largest_weight(
    kind: str, left_out: tuple[str, ...], count: int
) -> None:
    """The head is left as it is; of the others the largest need not be the last."""
    section, stored = KINDS[kind]
    with torch.device("meta"):
        model = llama(hidden_size=512, intermediate_size=1024, tie_word_embeddings=False).to(torch.bfloat16)
    linears = {n: m.weight for n, m in model.named_modules() if n.endswith("_proj")}
    kept = {n: W for n, W in linears.items() if not n.endswith(left_out) and not n.startswith(left_out)}
    less = sum(2 * W.numel() - stored(W.numel(), len(W)) for W in kept.values())
    most = max(2 * W.numel() for W in kept.values())
    assert len(kept) == count
    assert saved_bytes(model, {**section, "llm_int8_skip_modules": left_out}) == (less, most)


def test_what_is_not_known_is_said(world: Path) -> None:
    done = plan({"quant_method": "gptq", "bits": 4})
    assert done.code == 2
    assert "is quantised (gptq), and plan does not know what that stores" in assert_one_sentence(done)
    full = plan(NF4, "method=full", "rank=null")
    assert full.code == 2
    assert "stores them quantised" in assert_one_sentence(full)
