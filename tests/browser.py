"""A headless Chromium: opens a page, runs a script in it, returns what the script found and what the console said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH (apt-get install chromium)")


def visit(page: Path, script: str, *, width: int, height: int = 844) -> tuple[Any, list[str]]:
    """What `script`, the body of a function, returns in the page, and the lines of its console.

    The page stands in a frame of the wanted size: a window of Chromium's is at least 500 pixels wide.
    """
    probe = f"""
      const found = parent.document.createElement("output");
      found.id = "found";
      found.textContent = JSON.stringify((() => {{{script}}})());
      parent.document.body.append(found);"""
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{probe}</script></body>")
    frame = f'<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{escape(text)}"></iframe>'
    outer = page.with_name(f"frame-{width}.html")
    outer.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    command = [
        str(PROGRAM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,1000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<output id="found">(.*?)</output>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
