#!/usr/bin/env bash
# One run over several machines, without a scheduler: the same command on each of them, with its own NODE.
#   NODES=2 NODE=0 MASTER=host0 scripts/nodes.sh norm=an arch=resnet50 data.root=/data/imagenet
#   NODES=2 NODE=1 MASTER=host0 scripts/nodes.sh norm=an arch=resnet50 data.root=/data/imagenet
# The machines see one folder of runs and one of data. 2 x 4 GPUs x batch_size 128 are the recipe's 1024 images; with more
# GPUs give optim.global_batch=2048 (the learning rate follows) or batch_size=64. Repeat it to continue.
set -euo pipefail
cd "$(dirname "$0")/.."

signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2
[ -n "$(trap -p HUP)" ] || signals+=,SIGHUP # under nohup, a lost connection ends nothing
torchrun --nnodes="${NODES:?machines}" --node-rank="${NODE:?0 to NODES - 1}" --nproc-per-node="${GPUS:-gpu}" \
    --master-addr="${MASTER:?name of the machine with NODE=0}" --master-port="${PORT:-29500}" \
    --signals-to-handle="$signals" train.py "$@"
