"""The records' tables are those that the command writes from the journals."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["2026-11-26-h100-study", "2026-11-26-h100-cora"])
def test_the_table_in_the_readme_is_the_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import report_record

    folder = ROOT / "records" / name
    readme, table = ((folder / f).read_text(encoding="utf-8") for f in ("README.md", "results.md"))
    assert report_record.with_table(readme, table) == readme
    with pytest.raises(SystemExit):
        report_record.with_table("no place", table)
