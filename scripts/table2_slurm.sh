#!/usr/bin/env bash
# Table 2 on a Slurm cluster: each run a job of one node with 8 GPUs, requeued when preempted or out of time. Repeat it for
# the table as it stands, and for what is not yet submitted.
#   PARTITION=gpu IMAGENET_DIR=/shared/imagenet scripts/table2_slurm.sh [slurm.account=me ...] [--dry] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

python tools/table.py table2 --run --submit slurm --seeds "${SEEDS:-1}" slurm.partition="${PARTITION:?}" \
    slurm.time="${TIME:-1-00}" slurm.gpus_per_node="${GPUS:-8}" "$@"
