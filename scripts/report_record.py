"""Report a recorded study anew from its journal, and put the table into the record's README.

    python scripts/report_record.py records/2026-11-26-h100-study [--study study.yaml]

Needs neither model nor rows. Writes what `loralign compare --report` writes into the record's folder and replaces what
stands between `<!-- table -->` and `<!-- end of table -->` in its README by results.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def with_table(readme: str, table: str) -> str:
    """The README with another table between its marks."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"the README has no place for the table: {BEGIN} … {END}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--study", default="study.yaml", help="study file in the record's folder")
    args = parser.parse_args()
    command = ["-m", "loralign", "compare", str(args.record / args.study), "--report", "--set", f"output={args.record}"]
    if code := subprocess.run([sys.executable, *command], check=False).returncode:
        return code
    file = args.record / "README.md"
    table = (args.record / "results.md").read_text(encoding="utf-8")
    file.write_text(with_table(file.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
