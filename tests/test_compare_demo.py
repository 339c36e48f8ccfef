"""`make compare-demo`'s study: what it asks for, and that killed three times it ends as if nothing had been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from cached_assets import asset, needs
from loralign.config.study import load_study

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from compare_demo import SHORT, main, prepared, results


def tiny_minilm(folder: Path) -> Path:
    """MiniLM's tokenizer, two small random layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset("minilm")).save_pretrained(folder)
    return folder


@pytest.mark.assets
@needs("minilm")
@needs("bbc")
def test_its_command_finds_a_folder_to_work_in(tmp_path: Path) -> None:
    """Rows and study file are written first: the study's own folder must still be new."""
    command = prepared(tmp_path / "demo", 2, SHORT)
    (spec,) = load_study(command[command.index("compare") + 1])
    assert [arm.name for arm in spec.arms] == ["full", "lora", "lora-ga"] and spec.charge == "steps"
    assert spec.output == results(tmp_path / "demo") and not spec.output.exists()
    assert spec.shared_rows == 0


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.distributed
@needs("minilm")
@needs("bbc")
def test_killed_three_times_it_ends_the_same_to_the_last_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its arms, rates and seeds with two workers, SIGKILL in each third of the trials; a small model, short rows."""
    model = tiny_minilm(tmp_path / "model")
    code = main(["--output", str(tmp_path / "demo"), "--short", "--model", str(model), "--prove-resume"])
    said = capfd.readouterr().out
    assert code == 0 and said.count("-- killed with ") == 3, said[-2000:]
    assert "trials, statistics and table: equal to the last bit" in said
    assert "pictures without seconds: equal to the last bit" in said
