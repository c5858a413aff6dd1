#!/usr/bin/env bash
# The same program on two machines: start this on both, with the same HEAD (the name of one of them) and --out on a disk both see.
#   HEAD=node1 MODEL=... DATA=... examples/two-nodes.sh [more flags]
# Tested with two torchrun agents on loopback and the embedded task (tests/test_distributed.py), not yet on two machines with GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

flags=(
  --model "${MODEL:?a Hugging Face directory that both machines see under this path}"
  --data "${DATA:?question-answer pairs, JSONL, likewise}"
  --out "${OUT:?a folder on a file system both machines share}"
  --dtype bfloat16 --activation-checkpointing full
  --questions 256 --updates 4      # 64 questions an update: 4 on each of 16 GPUs
  --traces 8 --micro-traces 1 --max-trace 2048
  --lr 2e-6 --steps 810 --save-every 20
)
# --max-restarts on several machines: each counts its own restarts, so that --resume must be said (at first there is nothing to resume),
# and the store they meet at must be a new one every time (torch 2.13 keeps the addresses of processes that are gone)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun \
  --nnodes 2 --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the name or address of one of the two}:29500" --rdzv-id nrt \
  --max-restarts 3 \
  train.py "${flags[@]}" --resume "$@"
