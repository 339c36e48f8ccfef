"""Keys that PEFT, TRL, Axolotl, LLaMA-Factory and Unsloth have, and what says it in our files."""

from __future__ import annotations

FOREIGN = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "lora_target_modules": "targets", "lora_target": "targets",
    "exclude_modules": "exclude", "rank_pattern": "ranks", "base_model": "model", "model_name_or_path": "model",
    "model_name": "model", "model_id": "model", "output_dir": "output", "dataset": "data.train",
    "datasets": "data.train", "dataset_name": "data.train", "train_dataset": "data.train", "train_file": "data.train",
    "test_file": "data.eval", "test_datasets": "data.eval", "eval_dataset": "data.eval", "val_size": "data.eval",
    "val_set_size": "data.eval", "max_seq_length": "data.max_length", "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length", "sample_packing": "data.packing", "train_on_inputs": "data.assistant_only",
    "train_on_prompt": "data.assistant_only", "assistant_only_loss": "data.assistant_only",
    "completion_only_loss": "data.assistant_only", "lr": "train.learning_rate", "max_steps": "train.steps",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule", "warmup_ratio": "train.warmup",
    "per_device_train_batch_size": "train.micro_batch_size", "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every", "evals_per_epoch": "train.eval_every", "save_steps": "train.save_every",
    "save_strategy": "train.save_every", "saves_per_epoch": "train.save_every", "logging_steps": "train.log_every",
    "save_total_limit": "train.keep", "load_best_model_at_end": "train.load_best", "bf16": "train.precision",
    "fp16": "train.precision", "torch_dtype": "train.precision", "dtype": "train.precision",
    "early_stopping_patience": "train.patience", "max_grad_norm": "max_grad_norm", "weight_decay": "weight_decay",
    "random_state": "seed", "torch_compile": "train.compile", "mix_strategy": "data.mix",
    "stopping_strategy": "data.mix",
    **dict.fromkeys(("fields", "field_mapping", "column_mapping"), "data.columns"),
    **dict.fromkeys(("path", "file", "file_name", "data_files", "hf_hub_url"), "source"),
    **dict.fromkeys(("weight", "weights", "probability", "proportion", "ratio"), "share"),
}  # fmt: skip
"""Keys that mean one of ours."""

_METHOD = "choose `method`; `loralign methods` lists them"
_QUANTISED = "a recipe of `train` says `quantize: {}`; studies and tasks do not quantise"
_TOKENIZER = "the tokenizer beside the model is used, with its own chat template"
_WHOLE = "a recipe file adapts linear layers; in Python `attach` takes more (docs/trainers.md)"
_SHARES = "give each source in `data.train` a `share`: {source: a.jsonl, share: 0.7} (docs/data.md)"
_COLUMNS = {
    "dataset_text_field": "text", "text_column": "text", "field": "text", "field_instruction": "instruction",
    "field_input": "input", "field_output": "output", "field_system": "system", "field_messages": "messages",
    "field_tools": "tools", "prompt_column": "prompt", "response_column": "completion", "query": "instruction",
    "response": "output",
}  # fmt: skip
"""What a column is called, to our name of it."""
_LAUNCH = "start the run with `accelerate launch` or torchrun (docs/scale.md)"
_ATTENTION = "attention is the one that Transformers chooses"
_QUANTISATION = (
    *("quantization_bit", "quantization_config", "quantization_method", "quantization_type", "double_quantization"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_config", "bits"),
)


def _named(ours: str) -> str:
    return f"name the column in `data.columns`: {{{ours}: …}}"


INSTEAD = {
    "warmup_steps": "set `train.warmup`, a share of the steps",
    "gradient_accumulation_steps": "set `train.batch_size`, rows of a step, and `train.micro_batch_size`, of a forward",
    **dict.fromkeys(("finetuning_type", "peft_type", "init_lora_weights", "use_dora"), _METHOD),
    "adapter": "choose `method` (`loralign methods` lists them), and for QLoRA `quantize: nf4` beside it",
    "use_rslora": "set `method: rslora`",
    "loraplus_lr_ratio": "set `method: lora-plus` and its `options.ratio`",
    "full_finetuning": "set `method: full`",
    "lora_target_linear": "`targets: all-linear` is the default",
    **dict.fromkeys(("optim", "optimizer"), "the method brings its optimizer: choose `method`"),
    "load_in_4bit": _QUANTISED.format("nf4"),
    "load_in_8bit": _QUANTISED.format("int8"),
    **dict.fromkeys(_QUANTISATION, _QUANTISED.format("nf4` or `int8")),
    **dict.fromkeys(("template", "chat_template", "special_tokens", "tokenizer", "tokenizer_name"), _TOKENIZER),
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "additional_target", "bias"), _WHOLE),
    **dict.fromkeys(("stage", "rl"), "`train` fine-tunes on rows; DPO and others in Python (docs/trainers.md)"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), _LAUNCH),
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation"), _ATTENTION),
    **{key: _named(ours) for key, ours in _COLUMNS.items()},
    **dict.fromkeys(("interleave_probs", "probabilities", "dataset_mixer", "dataset_weights"), _SHARES),
    **dict.fromkeys(("dataset_dir", "dataset_info"), "files are named in `data.train`, from the folder of the command"),
    **dict.fromkeys(
        ("formatting", "type", "ds_type", "dataset_kwargs"), "formats are known by their columns (docs/data.md)"
    ),
    "streaming": "rows are read into memory, as text: cut the file, or name a part of it with `split`",
    **dict.fromkeys(("test", "label"), "`data.eval` holds rows out; a classifier's file goes to `loralign tasks`"),
    **dict.fromkeys(("arms", "rates", "baseline_seeds"), "a study's file goes to `loralign compare`"),
    **dict.fromkeys(("max_samples", "num_samples"), "name a part of the rows as `split: train[:1000]` of a source"),
    "resume_from_checkpoint": "say `--resume`",
    **dict.fromkeys(("overwrite_output_dir", "overwrite_output"), "name another `output`, or delete that folder"),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "upload the result yourself, `hf upload` does it"),
    **dict.fromkeys(("wandb_project", "use_wandb"), "set `train.report_to: [wandb]`; wandb reads WANDB_PROJECT"),
    **{key: f"set it in `train.extra`: `train.extra.{key}`" for key in ("neftune_noise_alpha", "use_liger_kernel")},
}
"""Keys that mean none of ours, and what to do."""
