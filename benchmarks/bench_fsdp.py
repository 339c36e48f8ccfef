"""Memory of one of several GPUs under FSDP2 or DDP: the allocator's peak beside what `plan` says.

    torchrun --nproc_per_node 2 benchmarks/bench_fsdp.py [--engine fsdp|ddp] [--method lora] [--checkpointing]

A Llama of random weights in bf16 through the Trainer and `attach`, four steps, whole logits. Under
gloo on a CPU (`--small`) it only proves that it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loralign import Recipe, attach, build, peft_config
from loralign.evidence import model_loss
from loralign.plan.memory import estimate
from loralign.plan.several import Layout
from loralign.plan.trace import Step

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip


def trainer_for(asked: argparse.Namespace, recipe: Recipe, folder: str) -> Trainer:
    fsdp: dict[str, Any] = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
        },
    }
    args = TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=asked.rows, save_strategy="no", report_to=[],
        disable_tqdm=True, bf16=True, use_cpu=not torch.cuda.is_available(), learning_rate=1e-4,
        gradient_checkpointing=asked.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if asked.checkpointing else None,
        **(fsdp if asked.engine == "fsdp" and torch.cuda.is_available() else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(made(asked).to(torch.bfloat16), peft_config(recipe, made(asked, "meta")))
    ids = torch.randint(0, 64, (64, asked.length))
    return Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def made(asked: argparse.Namespace, device: str = "cpu") -> LlamaForCausalLM:
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**(SMALL if asked.small else SHAPE)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    recipe = build(asked.method, r=asked.rank)
    assert isinstance(recipe, Recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(asked, recipe, folder)
        attach(trainer, recipe)
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    world = trainer.args.world_size
    sizes = {"rows": asked.rows, "length": asked.length, "gradient_checkpointing": asked.checkpointing}
    step = Step(**sizes, device="cuda", bf16=True)
    layout = Layout(world, sharded=asked.engine == "fsdp" and world > 1)
    plan = estimate(made(asked, "meta").to(torch.bfloat16), recipe, step, loss=model_loss, layout=layout)
    if trainer.is_world_process_zero():
        off = plan.peak_bytes / peak - 1 if peak else None
        told = {"engine": asked.engine, "gpus": world, "method": asked.method, "measured": peak, "off": off}
        print(
            json.dumps(
                {**told, "plan": plan.peak_bytes, "weights": plan.weights_bytes, "gathered": plan.gathered_bytes}
            )
        )


if __name__ == "__main__":
    main()
