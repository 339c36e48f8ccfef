"""Where the tests find real weights and data: the cache that `make assets` fills.

    pytestmark = [pytest.mark.assets, needs("smollm2-2layer")]      # a module
    @pytest.mark.assets
    @needs("smollm2-135m")                                          # one test
    def test_x() -> None:
        model = AutoModelForCausalLM.from_pretrained(asset("smollm2-135m"))

Folders: `smollm2-135m`, `smollm2-2layer`, `minilm` (models); `bbc`, `snips` (`all.jsonl`), `multiemo/LANG`
(`train.jsonl`, `valid.jsonl`, `test.jsonl`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def asset_dir(name: str) -> Path | None:
    """The folder of one asset, or None when the cache lacks it."""
    chosen = os.environ.get("LORALIGN_ASSETS")
    cache = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"
    folder = cache / name
    return folder if folder.is_dir() else None


def asset(name: str) -> Path:
    """The folder of one asset that the test is marked to need."""
    folder = asset_dir(name)
    assert folder is not None, f"mark the test with needs({name!r})"
    return folder


def needs(name: str) -> pytest.MarkDecorator:
    """Skip when the asset is absent."""
    return pytest.mark.skipif(asset_dir(name) is None, reason=f"{name} is not in the asset cache: `make assets`")
