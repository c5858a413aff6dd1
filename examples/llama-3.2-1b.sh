#!/usr/bin/env bash
# Llama-3.2-1B (base) on one GPU of 80 GB.   MODEL=... DATA=... EVAL=... examples/llama-3.2-1b.sh [more flags]
# Not run yet on a GPU by us: flags and memory are arithmetic, see EXPERIMENTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # of `make train`, if there is one

flags=(
  --model "${MODEL:?a Hugging Face directory of Llama-3.2-1B}"
  --data "${DATA:?question-answer pairs, JSONL}"
  --eval-data "${EVAL:-}"
  --out "${OUT:-runs/llama-3.2-1b}"
  --dtype bfloat16                 # compute and final/; parameters, gradient sums and AdamW stay fp32
  --marker '<|reserved_special_token_0|>'  # Llama 3 keeps tokens free: no new row, the vocabulary stays a round number
  --questions 64 --updates 1       # a quarter of the paper's batch, used once: on-policy
  --traces 8                       # K of the paper
  --micro-traces 4                 # half of the 8 branches per backward: 4 x 2048 tokens of activations at a time
  --max-trace 1024 --max-prompt 2048 --max-answer 1023
  --lr 5e-6                        # the paper's 2e-6 is for 3B to 8B; smaller models bear more
  --steps 400 --warmup 0.1
  --eval-every 20 --save-every 50
  --resume                         # the same command goes on after an interruption
)
python train.py "${flags[@]}" "$@"
