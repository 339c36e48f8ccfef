#!/usr/bin/env bash
# The study of records/2026-11-26-h100-study on one GPU: SmolLM2-135M on German reviews, every arm at its own tuned rate.
#
#   scripts/gpu_study.sh [--workers 6] [--set key=value ...]
#
# Fetches weights and rows into the asset cache (scripts/assets.py), cuts the rows, runs `loralign compare` from where the
# record's journal stands. Stopped at any moment, the same command goes on. More arms are appended in study.yaml.
# PYTHON, STUDY, OUT, LORALIGN_ASSETS, ROWS_LANGUAGE (de), ROWS_TRAIN, ROWS_VALID and ROWS_TEST (the first so many: all,
# 220, 440) may be set. KEEP=FILE: the journal is copied there every ten seconds, for a machine that may be taken away.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python="${PYTHON:-.venv/bin/python}"
study="${STUDY:-records/2026-11-26-h100-study/study.yaml}"
out="${OUT:-runs/h100-study}"
model=$("$python" scripts/assets.py smollm2)
rows=$("$python" scripts/assets.py multiemo "${ROWS_LANGUAGE:-de}")
cut="$out-rows"
mkdir -p "$out" "$cut"
journal="$(dirname "$study")/study.journal"
[ -e "$out/study.journal" ] || { [ -e "$journal" ] && cp "$journal" "$out/study.journal"; } || true
# In German the validation and test rows are about 512 and 1,024 blocks of 128 tokens.
head -n "${ROWS_TRAIN:-1000000}" "$rows/train.jsonl" >"$cut/train.jsonl"
head -n "${ROWS_VALID:-220}" "$rows/valid.jsonl" >"$cut/valid.jsonl"
head -n "${ROWS_TEST:-440}" "$rows/test.jsonl" >"$cut/test.jsonl"
if [ -n "${KEEP:-}" ]; then
  (while sleep 10; do cp "$out/study.journal" "$KEEP.part" && mv "$KEEP.part" "$KEEP"; done) 2>/dev/null &
  keeper=$!
  trap 'kill $keeper 2>/dev/null || true; cp "$out/study.journal" "$KEEP"' EXIT
fi
"$python" -m loralign compare "$study" "$@" --set model="$model" --set output="$out" \
  --set task.train="$cut/train.jsonl" --set task.valid="$cut/valid.jsonl" --set task.test="$cut/test.jsonl"
