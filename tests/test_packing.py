"""Packing is refused where rows would see each other."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data_world import CONVERSATIONS, byte_tokenizer, rows_of, sft
from loralign.data.chat import fit
from loralign.data.packing import check_packing
from loralign.types import LoralignError
from toy import gpt2, llama

# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_compute_what_separate_rows_do(attention: str) -> None:
    model = llama()
    model.set_attn_implementation(attention)
    rows = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1)).tolist()
    rows[1] = rows[1][:4]
    example = {"input_ids": list(chain(*rows)), "seq_lengths": [len(r) for r in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([r])).logits[0] for r in rows])
        cached = model(**batch, use_cache=True).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (cached - alone).abs().max() > 0.1  # the trap that packing.py names: a cache switches the block mask off


def test_packing_is_refused_where_rows_see_each_other() -> None:
    for model in (llama(), llama().to(torch.bfloat16), gpt2()):
        model.train()
        check_packing(model)
        assert model.training
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.15))
    with pytest.raises(
        LoralignError, match=r"BloomForCausalLM with .* attention lets packed rows see each other: set pac"
    ):
        check_packing(bloom)
    broken = llama()
    broken.forward = lambda input_ids: None  # type: ignore[assignment]
    with pytest.raises(LoralignError, match=r"can't run packed rows .*: set packing: false"):
        check_packing(broken)


def test_packed_training_has_the_loss_of_separate_rows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    fitted = fit(rows_of(*CONVERSATIONS), tokenizer, max_length=256).dataset
    losses = []
    for packing in (False, True):
        trainer = sft(tmp_path, fitted, tokenizer, packing=packing, max_length=512, max_steps=1)
        trainer.train()
        assert len(trainer.train_dataset) == (1 if packing else 2)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
