#!/usr/bin/env bash
# The same program on two machines: start this on both, with the same HEAD (the name of one of them) and --out on a disk both see.
#   HEAD=node1 MODEL=... DATA=... examples/two-nodes.sh [more flags]
# Not tried on two machines yet: a test checks that train.py accepts these flags, others run ranks of one machine.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # of `make train`, if there is one

flags=(
  --model "${MODEL:?a Hugging Face directory that both machines see under this path}"
  --data "${DATA:?question-answer pairs, JSONL, likewise}"
  --out "${OUT:?a folder on a file system both machines share}"
  --dtype bfloat16 --recompute
  --questions 256 --updates 4      # 64 questions an update: 4 on each of 16 GPUs
  --traces 8 --micro-traces 1 --max-trace 2048
  --lr 2e-6 --steps 810 --save-every 20
  --resume                         # started again on both machines, it goes on from the newest checkpoint
)
torchrun \
  --nnodes 2 --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the name or address of one of the two}:29500" --rdzv-id nrt \
  train.py "${flags[@]}" "$@"
