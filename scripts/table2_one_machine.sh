#!/usr/bin/env bash
# Table 2 on the GPUs of this machine, one run after the other; repeat it to continue, --dry says what it costs first.
#   IMAGENET_DIR=/data/imagenet scripts/table2_one_machine.sh [--only resnet50] [--seeds 3] [--dry] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

python tools/table.py table2 --run --seeds 1 hardware=gpu "$@"
