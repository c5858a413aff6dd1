#!/usr/bin/env bash
# Mistral-7B-v0.3 (base) on 8 GPUs of 80 GB, the paper's settings.   MODEL=... DATA=... EVAL=... examples/mistral-7b.sh [more flags]
# Not run yet on GPUs by us: flags and memory are arithmetic, see EXPERIMENTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # of `make train`, if there is one

flags=(
  --model "${MODEL:?a Hugging Face directory of Mistral-7B-v0.3}"
  --data "${DATA:?question-answer pairs, JSONL}"
  --eval-data "${EVAL:-}"
  --out "${OUT:-runs/mistral-7b}"
  --dtype bfloat16
  --recompute
  --marker '[control_8]'           # one of the 768 control tokens v0.3 keeps free; v0.1 has none: leave the flag out, a token is added
  --questions 256 --updates 4 --traces 8 --micro-traces 2   # a head of 32k tokens is a quarter of Llama's: two branches at a time
  --max-trace 2048 --max-prompt 4096 --max-answer 2047
  --lr 2e-6 --warmup 0.1 --weight-decay 0.01 --grad-clip 1.0
  --steps 810
  --eval-every 20 --save-every 20 --resume
)
torchrun --standalone --nproc-per-node "${GPUS:-8}" train.py "${flags[@]}" "$@"
