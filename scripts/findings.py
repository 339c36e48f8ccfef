"""What the recorded studies found, as `loralign suggest` reads it: src/loralign/plan/findings.json.

    python scripts/findings.py [--check]

Reads results.json of every record that is a study beside plain LoRA, and writes one entry per arm that has all of its
seeds. --check: compare with the file instead of writing it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from loralign.methods.table import method

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "src/loralign/plan/findings.json"
RECORDS = (
    "2026-11-26-cpu-compare", "2026-11-26-h100-study", "2026-11-29-h200-prize/german", "2026-11-29-h200-prize/answers",
)  # fmt: skip
"""Studies on real models; the CoRA records say that they check a pipeline, the judge of
`recommended` chooses nothing."""
WIDTHS = {"minilm": 384, "smollm2-135m": 576}
"""Hidden sizes of their models, which rates move with."""


def validation(trials: Mapping[str, Any], arm: str) -> float | None:
    """The mean final loss on validation rows at an arm's chosen rate, over the seeds that judged it."""
    index = next((key.rsplit("/", 2)[1] for key in trials if key.startswith(f"seed/{arm}/")), None)
    losses = [t["losses"][-1] for key, t in trials.items() if key.startswith(f"rate/{arm}/{index}/")]
    return round(fmean(losses), 4) if losses else None


def findings() -> list[dict[str, Any]]:
    """One entry per record and finished arm."""
    found = []
    for record in RECORDS:
        data = json.loads((ROOT / "records" / record / "results.json").read_text(encoding="utf-8"))
        readme = " ".join((ROOT / "records" / record.split("/")[0] / "README.md").read_text(encoding="utf-8").split())
        study = data["study"]
        sections = {a if isinstance(a, str) else a.get("name", a["method"]): a for a in study["arms"]}
        for arm in data["result"]["arms"]:
            if arm["seeds"] < study["seeds"]:
                continue
            given = sections.get(arm["arm"], arm["arm"])
            section: dict[str, Any] = {"method": given} if isinstance(given, str) else dict(given)
            rank = section.get("rank", study["rank"])
            found.append(
                {
                    "record": f"records/{record}",
                    "model": Path(study["model"]).name,
                    "task": study["task"]["kind"],
                    "steps": study["train"]["steps"],
                    "arm": arm["arm"],
                    "method": section["method"],
                    "rank": None if method(section["method"].split("+")[0]).reference else rank,
                    "alpha": section.get("alpha", study.get("alpha")),
                    "options": section.get("options", {}),
                    "lr": arm["lr"],
                    "width": WIDTHS[Path(study["model"]).name],
                    "validation": validation(data["trials"], arm["arm"]),
                    "loss": [round(arm["final"][k], 4) for k in ("mean", "low", "high")] if arm["final"] else None,
                    "seeds": arm["seeds"],
                    "kind": arm["kind"],
                    "sentence": arm["sentence"],
                    "repeats": "AdamW" in readme and "few and repeat" in readme,
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = json.dumps(findings(), indent=1, ensure_ascii=False) + "\n"
    if parser.parse_args().check:
        return int(text != FILE.read_text(encoding="utf-8"))
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
