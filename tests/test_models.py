"""Models as people have them: targets that match or are refused, heads, towers, mixtures, tensors beside A and B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import toy
from loralign import LoralignError, Recipe, adapt, build, optimizer, peft_config, sites
from loralign.carrier.abilities import fresh_heads, task_type, towers, width
from loralign.carrier.targets import ranks_of
from loralign.io.export import export

TEXT: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def recipe(name: str = "lora", **fields: Any) -> Recipe:
    made = build(name, **{"r": 2, "alpha": 4.0, **fields})
    assert isinstance(made, Recipe)
    return made


def gemma3() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            **TEXT, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=SiglipVisionConfig(**vision, image_size=16, patch_size=8, num_channels=3),
        mm_tokens_per_image=1,
        image_token_index=60,
        boi_token_index=62,
        eoi_token_index=63,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def whisper() -> PreTrainedModel:
    config = WhisperConfig(
        **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "num_mel_bins": 8},
        **{"d_model": 16, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 3},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).eval()


def speech(kind: Any = Wav2Vec2ForCTC, **changes: Any) -> PreTrainedModel:
    fields = {
        **{"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0},
        **{"intermediate_size": 24, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4)},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0},
    }
    torch.manual_seed(0)
    made: PreTrainedModel = kind(Wav2Vec2Config(**{**fields, **changes})).eval()
    return made


def sounds(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 320, generator=draw)
    return {"input_values": values, "labels": torch.randint(1, 20, (4, 4), generator=draw)}


def moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, head_dim=8, **experts)).eval()


def phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**TEXT)).eval()


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"targets": ("q_proj", "o_proj", "up_proj")},
            r"`targets` names 'q_proj', 'up_proj', which no module.*qkv_proj",
        ),
        ({"targets": "q_proj,o_proj"}, r"`targets` names 'q_proj', which no module here ends with"),
        ({"targets": "all"}, r"no module matches targets 'all'.*all-linear"),
        ({"targets": ("o_proj", "embed_tokens")}, r"names 'embed_tokens', a Embedding, which is no linear layer"),
        ({"exclude": ("lm_head", "qproj", "vproj")}, r"`exclude` names 'qproj', 'vproj', which no module here"),
        ({"ranks": {"o_proj": 3, "q_proj": 4}}, r"`ranks` names 'q_proj', which no adapted module ends with"),
        ({"exclude": ("layers",)}, r"no module matches"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_names_that_match_nothing_are_refused_with_the_names_there_are(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(LoralignError, match=said) as refused:
        peft_config(recipe(**fields), phi3())
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"targets": "o_proj"}, {"self_attn.o_proj"}),
        ({"targets": "o_proj, down_proj"}, {"self_attn.o_proj", "mlp.down_proj"}),
        ({"targets": r".*layers\.\d\.mlp\..*", "exclude": ("down_proj",)}, {"mlp.gate_up_proj"}),
        ({"exclude": ("self_attn",)}, {"mlp.gate_up_proj", "mlp.down_proj"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_targets_are_endings_patterns_or_what_is_left(fields: dict[str, Any], names: set[str]) -> None:
    found = [site.name for site in sites(adapt(phi3(), recipe(**fields)))]
    assert sorted(found) == sorted(f"model.layers.{i}.{n}" for i in range(2) for n in names)


def test_of_two_ranks_for_a_module_the_last_one_counts() -> None:
    general, special = ("proj", 2), ("up.proj", 8)
    assert ranks_of(["up.proj", "down.proj"], 4, dict([general, special])) == {"up.proj": 8, "down.proj": 2}
    assert ranks_of(["up.proj", "down.proj"], 4, dict([special, general])) == {"up.proj": 2, "down.proj": 2}


def test_a_name_that_ends_like_a_chosen_one_is_not_adapted() -> None:
    """PEFT matches endings: `x.map` must not bring `y.x.map` along."""
    inner = torch.nn.ModuleDict({"x": torch.nn.ModuleDict({"map": torch.nn.Linear(4, 4)})})
    model = torch.nn.ModuleDict({"x": torch.nn.ModuleDict({"map": torch.nn.Linear(4, 4)}), "y": inner})
    assert [s.name for s in sites(adapt(model, recipe(targets=r"x\.map")))] == ["x.map"]


@pytest.mark.parametrize("make", ["mamba2", "falcon"])
def test_state_space_mixers_keep_their_out_proj(make: str) -> None:
    """Fused kernels read its weight, so PEFT refuses it: the default goes round it, a name is refused with the mend."""
    torch.manual_seed(0)
    if make == "mamba2":
        sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "state_size": 8}
        model: PreTrainedModel = Mamba2ForCausalLM(
            Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, **sizes)
        )
    else:
        sizes = {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 1, "chunk_size": 8}
        model = FalconH1ForCausalLM(FalconH1Config(**TEXT, **{f"mamba_{k}": v for k, v in sizes.items()}))
    with pytest.raises(LoralignError, match=r"out_proj can't be adapted .* name 'out_proj' in `exclude`"):
        peft_config(recipe(targets=("in_proj", "out_proj")), model)
    names = {site.name.rpartition(".")[2] for site in sites(adapt(model, recipe()))}
    assert "in_proj" in names and "out_proj" not in names


def test_a_first_mamba_keeps_what_its_kernels_read() -> None:
    """PEFT would adapt dt_proj, whose weight the mixer takes, to no effect; x_proj is the GPU kernel's."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(
        LoralignError, match=r"dt_proj can't be adapted \(the kernels of mamba .* 'dt_proj' in `exclude`"
    ):
        peft_config(recipe(targets=("in_proj", "dt_proj")), model)
    adapted = adapt(model, recipe())
    assert {site.name.rpartition(".")[2] for site in sites(adapted)} == {"in_proj"}
    adapted.train()(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(site.layer.lora_B["default"].weight.grad is not None for site in sites(adapted))


# -------------------------------------------------------------------------------------------------- what a model can do


def test_task_and_heads_come_from_what_a_model_can_do() -> None:
    class Mine(BertForTokenClassification):
        """A user's own subclass, whose name says nothing."""

    bert = BertConfig(**SMALL, num_labels=5)
    audio = speech(Wav2Vec2ForSequenceClassification)
    said = {
        **{"gemma3": gemma3(), "whisper": whisper(), "ctc": speech(), "audio": audio, "t5": toy.t5(), "vit": toy.vit()},
        **{"bert": toy.bert(), "mine": Mine(bert), "masked": BertForMaskedLM(bert), "gpt2": toy.gpt2()},
    }
    assert {k: (task_type(m), fresh_heads(m)) for k, m in said.items()} == {
        "gemma3": ("CAUSAL_LM", []),
        "whisper": (None, []),
        "ctc": (None, ["lm_head"]),
        "audio": (None, ["projector", "classifier"]),
        "t5": ("SEQ_2_SEQ_LM", []),
        "vit": (None, ["classifier"]),
        "bert": ("SEQ_CLS", ["classifier"]),
        "mine": ("TOKEN_CLS", ["classifier"]),
        "masked": (None, []),
        "gpt2": ("CAUSAL_LM", []),
    }
    assert towers(said["gemma3"]) == ["model.vision_tower", "model.multi_modal_projector"]
    assert [towers(m) for k, m in said.items() if k != "gemma3"] == [[]] * 9
    assert (width(said["gemma3"].config), width(said["gpt2"].config), width(said["whisper"].config)) == (32, 32, 16)


def test_token_classification_trains_its_head_whole() -> None:
    made = adapt(BertForTokenClassification(BertConfig(**SMALL, num_labels=5)), recipe())
    heads = [n for n, p in made.named_parameters() if p.requires_grad and "classifier" in n]
    assert heads and all(".modules_to_save.default." in n for n in heads)
    assert not any("classifier" in site.name for site in sites(made))


def reloaded(model: PreTrainedModel, base: PreTrainedModel, folder: Path, asked: dict[str, torch.Tensor]) -> float:
    """Relative difference of an exported adapter on another copy of the base."""
    with torch.no_grad():
        want = model.eval()(**asked).logits
        got = PeftModel.from_pretrained(base, folder).eval()(**asked).logits
    return float((got - want).norm() / want.norm())


def test_a_fresh_ctc_head_travels(tmp_path: Path) -> None:
    """Trained from one draw of the head, loaded onto another; the clean process knows its vocabulary."""
    model = adapt(speech(vocab_size=24), recipe())
    step(model, recipe(), sounds())
    asked = {"input_values": sounds()["input_values"]}
    export(model, tmp_path, base_id="t/x", probes=asked)
    other = speech(vocab_size=24)
    torch.nn.init.normal_(other.lm_head.weight)  # type: ignore[union-attr, arg-type]
    assert reloaded(model, other, tmp_path, asked) < 1e-5  # type: ignore[arg-type]


def step(model: Any, made: Recipe, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    opt = optimizer(model, made, lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        opt.step()
        opt.zero_grad()


def test_whisper_trains_and_exports(tmp_path: Path) -> None:
    model = adapt(whisper(), recipe())
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(4, 64, (2, 6))}
    step(model, recipe(), batch)
    assert export(model, tmp_path, base_id="t/whisper", probes=batch).exact
    asked = {"input_features": batch["input_features"], "decoder_input_ids": batch["labels"]}
    assert reloaded(model, whisper(), tmp_path, asked) < 1e-5  # type: ignore[arg-type]


def test_a_vision_language_model_exports_without_a_batch(tmp_path: Path) -> None:
    model = adapt(gemma3(), recipe(exclude=("vision_tower", "multi_modal_projector")))
    step(model, recipe(), toy.batch_for(toy.llama()))
    assert export(model, tmp_path, base_id="t/vlm", profile="portable").exact
    asked = {"input_ids": toy.batch_for(toy.llama())["input_ids"]}
    assert reloaded(model, gemma3(), tmp_path, asked) < 1e-5  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT's mistake: they act
@pytest.mark.parametrize("ranks", [{}, {"layers.0.mlp.up_proj": 3}], ids=["one rank", "ragged"])
def test_the_dense_layers_of_a_mixture_are_adapted_and_reload(ranks: dict[str, int], tmp_path: Path) -> None:
    """PEFT takes their names for the fused experts', so files name their weights instead; checkpoints and exports."""
    made = recipe(ranks=ranks)
    model = adapt(moe(), made)
    names = {site.name for site in sites(model)}
    assert {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} < names
    assert not any(".layers.1.mlp." in name for name in names)
    step(model, made, toy.batch_for(toy.llama()))
    asked = {"input_ids": toy.batch_for(toy.llama())["input_ids"]}
    assert export(model, tmp_path / "out", base_id="t/moe").exact
    model.save_pretrained(tmp_path / "stock")
    for folder in ("out", "stock"):
        assert reloaded(model, moe(), tmp_path / folder, asked) < 1e-5  # type: ignore[arg-type]
    with pytest.raises(LoralignError, match=r"not portable: .*target_parameters"):
        export(model, tmp_path / "portable", base_id="t/moe", profile="portable")
    with pytest.raises(LoralignError, match=r"by its weight, where dropout cannot act"):
        adapt(moe(), recipe(dropout=0.1))


# --------------------------------------------------------------------------------------------- tensors beside A and B


def test_unfrozen_norms_travel_with_the_adapter(tmp_path: Path) -> None:
    model = adapt(toy.llama(), recipe())
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    step(model, recipe(), toy.batch_for(model))
    with pytest.raises(LoralignError, match=r"layernorm\.weight trains beside the adapter, and PEFT does not save it"):
        model.save_pretrained(tmp_path / "stock")
    with pytest.raises(LoralignError, match=r"norm.* was trained in full"):
        export(model, tmp_path / "portable", base_id="t/x", profile="portable")
    assert export(model, tmp_path / "out", base_id="t/x").exact
    assert reloaded(model, toy.llama(), tmp_path / "out", {"input_ids": toy.batch_for(model)["input_ids"]}) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "transformer.h.0.attn.c_attn.bias"), ("tied", "model.embed_tokens.weight")]
)
def test_what_no_file_can_hold_is_refused_by_name(family: str, name: str, tmp_path: Path) -> None:
    """A bias inside an adapted layer, a weight that two modules share."""
    model = adapt(toy.FAMILIES[family](), recipe())
    for key, p in model.get_base_model().named_parameters():
        if key.replace(".base_layer", "") == name:
            p.requires_grad_(True)
    with pytest.raises(LoralignError, match=rf"{name} trains beside the adapter, and no adapter file can hold it"):
        export(model, tmp_path / "out", base_id="t/x")
