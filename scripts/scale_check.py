"""A recipe through attach on several processes: losses, adapter and a resumed run beside those of one process.

    python scripts/scale_check.py one --out OUT                                     # the reference, one process
    torchrun --nproc_per_node 2 scripts/scale_check.py ddp --out OUT                # or: fsdp
    python scripts/scale_check.py report --out OUT                                  # the table; 1 where they differ

A small Llama in fp32 with random weights, so that the same rows in the same order give the same losses but for
rounding. `fsdp` is FSDP2 through accelerate and needs one GPU a process; `ddp` runs on CPUs too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loralign import Recipe, attach, build, peft_config

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-ga": {"micro_batches": 2, "sketch": None},  # a sketch depends on which rows come together
    "lora-rite": {},
    "lora-pro": {},
    "rm-lora": {},
    "delta-lora": {"wait_steps": 2},
}
STEPS, ROWS, LENGTH, WORLD = 6, 4, 32, 2
TOLERANCE = 1e-5


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 256, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(mode: str, folder: Path, recipe: Recipe) -> Trainer:
    """The same rows at every optimizer step: WORLD rows of micro-batches, or one process with all of them."""
    from peft import get_peft_model

    fsdp: dict[str, Any] = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
        },
    }
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=ROWS if mode != "one" else ROWS * WORLD,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=7,
        use_cpu=not torch.cuda.is_available(),
        **(fsdp if mode == "fsdp" else {}),
    )
    model = get_peft_model(base(), peft_config(recipe, base()))
    return Trainer(model=model, args=args, train_dataset=rows())


def run(mode: str, name: str, out: Path, resume: Path | None = None) -> list[float]:
    recipe = build(name, RECIPES[name], r=4, alpha=8.0, seed=3)
    assert isinstance(recipe, Recipe)
    folder = out / mode / (name + ("-resumed" if resume else ""))
    trainer = trainer_for(mode, folder, recipe)
    attach(trainer, recipe, resume_from=resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(folder / "final"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def report(out: Path) -> int:
    reference = json.loads((out / "one.json").read_text(encoding="utf-8"))
    worst = 0.0
    for path in sorted(out.glob("*.json")):
        for name, found in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(found, str):
                print(f"{path.stem:6} {name:12} FAILED: {found}")
                worst = float("inf")
                continue
            wanted = reference[name]["losses"]
            gap = max(abs(a - b) / b for a, b in zip(found["losses"], wanted, strict=True))
            again = max(abs(a - b) / b for a, b in zip(found["resumed"], wanted[STEPS // 2 :], strict=True))
            worst = max(worst, gap, again)
            said = f"{path.stem:6} {name:12} loss {found['losses'][-1]:.6f}"
            print(f"{said}  from one process {gap:.1e}  resumed {again:.1e}")
    return int(worst > TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=("one", "ddp", "fsdp", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(RECIPES))
    asked = parser.parse_args()
    if asked.mode == "report":
        return report(asked.out)
    found: dict[str, Any] = {}
    for name in asked.only:
        try:
            losses = run(asked.mode, name, asked.out)
            half = asked.out / asked.mode / name / f"checkpoint-{STEPS // 2}"
            found[name] = {"losses": losses, "resumed": run(asked.mode, name, asked.out, half)[-(STEPS - STEPS // 2) :]}
        except Exception as error:  # the table says which recipe failed, and the others go on
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if torch.distributed.get_rank() == 0 if torch.distributed.is_initialized() else True:
        (asked.out / f"{asked.mode}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
