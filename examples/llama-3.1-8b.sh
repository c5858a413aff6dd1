#!/usr/bin/env bash
# Llama-3.1-8B (base) on 8 GPUs of 80 GB, the paper's settings.   MODEL=... DATA=... EVAL=... examples/llama-3.1-8b.sh [more flags]
# Not run yet on GPUs by us: flags and memory are arithmetic, see EXPERIMENTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # of `make train`, if there is one

flags=(
  --model "${MODEL:?a Hugging Face directory of Llama-3.1-8B}"
  --data "${DATA:?question-answer pairs, JSONL: the paper takes 200k rows of Tulu-3}"
  --eval-data "${EVAL:-}"
  --out "${OUT:-runs/llama-3.1-8b}"
  --dtype bfloat16
  --recompute                      # parameters and moments take 24 GB of a GPU in training, 28 while sampling
  --marker '<|reserved_special_token_0|>'  # the paper adds a token; one that Llama 3 keeps free starts as the same copy of eos
  --aggregator weighted_sum_log_prob --answer-weight fixed   # NRT-WS(-log p), omega = 1: the paper's best
  --questions 256 --updates 4      # 64 questions an update, 8 of them on each GPU
  --traces 8 --micro-traces 1      # a branch at a time: up to 4096 tokens of activations
  --max-trace 2048 --max-prompt 4096 --max-answer 2047
  --temperature 1.0                # no top-p, no KL, no entropy bonus
  --lr 2e-6 --warmup 0.1 --weight-decay 0.01 --grad-clip 1.0
  --steps 810
  --eval-every 20 --save-every 20  # a checkpoint is 96 GB: fp32 weights and two moments; the newest two are kept
  --resume                         # the same command goes on after an interruption
)
torchrun --standalone --nproc-per-node "${GPUS:-8}" train.py "${flags[@]}" "$@"
