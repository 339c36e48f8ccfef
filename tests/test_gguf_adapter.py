"""Profile gguf: what the file says, what llama.cpp computes with it, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import toy
import warm
from loralign import build, factors, sites
from loralign.io.export import export
from loralign.io.verify import VerifyJob, verify_many
from loralign.types import LoralignError, Recipe
from trainers import step_by_step

gguf = pytest.importorskip("gguf")

FIELDS: dict[str, Any] = {
    **{"vocab_size": toy.VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": toy.llama,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**FIELDS, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**FIELDS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**FIELDS, head_dim=16)),
}


def trained(model: Any, **fields: Any) -> Any:
    chosen = build("rslora", **{"r": 4, "ranks": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, **fields})
    assert isinstance(chosen, Recipe)
    return step_by_step(model, chosen, toy.batches_for(model, 2))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """By family the trained model and the folder of its base."""
    made = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        make().save_pretrained(folder)
        made[name] = trained(type(make()).from_pretrained(folder)), folder
    return made


def as_llama_cpp_stores(rows: Tensor, heads: int) -> np.ndarray:
    """Row i of a head's first half at 2i, of its second at 2i + 1: ggml's rotation of neighbouring pairs."""
    half = rows.shape[0] // heads // 2
    out = np.empty(tuple(rows.shape), dtype=np.float64)
    for h in range(heads):
        for i in range(half):
            out[2 * (h * half + i)] = rows[2 * h * half + i]
            out[2 * (h * half + i) + 1] = rows[2 * h * half + half + i]
    return out


def test_the_file_is_what_llama_cpp_reads(adapted: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """Its formula, alpha / rank of each tensor, gives the trained update of every module, rows in its order."""
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    short |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for family, (model, _) in adapted.items():
        report = export(model, tmp_path / family, profile="gguf", base_id=f"t/{family}")
        assert report.exact and "ADAPTER ./adapter.gguf" in (tmp_path / family / "README.md").read_text()
        reader = gguf.GGUFReader(str(tmp_path / family / "adapter.gguf"))
        said = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
        assert said["general.type"] == "adapter" and said["adapter.type"] == "lora"
        architecture = reader.get_field("general.architecture").contents()
        assert architecture == {"mistral": "llama"}.get(family, family)
        tensors = {t.name: t for t in reader.tensors}
        for site in sites(model):
            block, part = site.name.split(".")[2], short[site.name.split(".")[-1]]
            A, B = (tensors.pop(f"blk.{block}.{part}.weight.lora_{side}").data.astype(np.float64) for side in "ab")
            rank = {"attn_q": 2}.get(part, 7 if (block, part) == ("1", "ffn_down") else 4)
            assert A.shape == (rank, site.d_in) and B.shape == (site.d_out, rank)
            A_s, B_s = factors(site)
            want = (B_s.double() @ A_s.double()).detach()
            heads = {"attn_q": 4, "attn_k": 2}.get(part)
            stored = as_llama_cpp_stores(want, heads) if heads and architecture == "llama" else want.numpy()
            np.testing.assert_allclose(said["adapter.lora.alpha"] / rank * (B @ A), stored, rtol=0, atol=1e-7)
        assert not tensors


def test_a_clean_process_reads_it_back(
    adapted: dict[str, tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family and precision; a cut, an empty and a rescaled file, and one of another model, are named."""
    jobs, bad = {}, ("cut", "emptied", "scaled", "of another")
    for name in (*MODELS, "float16", "bfloat16", *bad):
        model, base = adapted[name if name in MODELS else "llama"]
        model = adapted["qwen2"][0] if name == "of another" else model
        export(model, tmp_path / name, profile="gguf", base_id="t/b", dtype=getattr(torch, name, None))
        jobs[name] = VerifyJob(tmp_path / name, base)
        file = tmp_path / name / "adapter.gguf"
        whole = file.read_bytes()
        if name in ("cut", "emptied"):
            file.write_bytes(whole[: len(whole) // 2 if name == "cut" else 0])
        if name == "scaled":
            alpha = np.float32(gguf.GGUFReader(str(file)).get_field("adapter.lora.alpha").contents())
            file.write_bytes(whole.replace(alpha.tobytes(), (1.2 * alpha).astype(np.float32).tobytes(), 1))
    warm.verification(monkeypatch)
    for name, found in zip(jobs, verify_many(list(jobs.values())), strict=True):
        if name not in bad:
            assert found.passed and found.proven, found.failure
            continue
        assert found.kind == "verification" and len(found.failure) < 300, name
        assert ("is damaged" if name in ("cut", "emptied") else "differ") in found.failure, found.failure


def test_refusals(adapted: dict[str, tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted["llama"][0]
    with pytest.raises(LoralignError, match=r"profile gguf knows Llama.*this is GPT2LMHeadModel: export with"):
        export(trained(toy.gpt2(), ranks={}), tmp_path / "out", profile="gguf", base_id="t/b")
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        tied = trained(toy.tied(), targets=("lm_head", "q_proj"), ranks={})
    with pytest.raises(LoralignError, match=r"the head shares its weight with the embedding"):
        export(tied, tmp_path / "out", profile="gguf", base_id="t/b")
    with pytest.raises(LoralignError, match=r"only profile portable pads"):
        export(model, tmp_path / "out", profile="gguf", base_id="t/b", power_of_two=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoralignError, match=r"pip install 'loralign\[gguf\]'"):
        export(model, tmp_path / "out", profile="gguf", base_id="t/b")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ llama.cpp's own word


def asked(model: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token that llama.cpp's server gives."""
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.warmup, wanted.n_ctx, wanted.n_parallel = str(model), False, 64, 1
    wanted.cpuparams.n_threads, wanted.verbosity = 1, 0
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    ask = {"prompt": ids, "n_predict": 1, "n_probs": 98, "temperature": -1.0, "post_sampling_probs": False}
    said = xllamacpp.Server(wanted).handle_completions(ask)
    found = {t["id"]: t["logprob"] for t in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return torch.tensor([found[i] for i in range(98)])


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3"))]
)
def test_llama_cpp_computes_what_was_trained(architecture: str, tmp_path: Path) -> None:
    """Its server, with and without the adapter, beside Transformers on the same file."""
    pytest.importorskip("xllamacpp")
    toy_gguf = pytest.importorskip("toy_gguf")
    file = toy_gguf.write(tmp_path / "base.gguf", architecture, packed=False)
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    base.config.pad_token_id = 0
    ids, says = [5, 9, 33, 70, 12, 44], lambda m: torch.log_softmax(m(torch.tensor([ids])).logits[0, -1], -1).detach()
    before = says(base)
    model = trained(base).eval()
    after = says(model)
    assert float((after - before).abs().max()) > 0.1
    torch.testing.assert_close(asked(file, None, ids), before, rtol=0, atol=2e-5)
    for dtype, bound in ((None, 2e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        out = tmp_path / str(dtype)
        export(model, out, profile="gguf", base_id="t/b", dtype=dtype)
        torch.testing.assert_close(asked(file, out / "adapter.gguf", ids), after, rtol=0, atol=bound)
