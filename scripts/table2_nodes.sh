#!/usr/bin/env bash
# Table 2 over several machines, one run after the other: nodes.sh for every row; a finished run is passed over.
#   NODES=2 NODE=0 MASTER=host0 IMAGENET_DIR=/data/imagenet scripts/table2_nodes.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

# every machine makes the same list: of all cells, whatever is finished
none=$(mktemp -d)
python tools/table.py table2 --dry --seeds "${SEEDS:-1}" --runs "$none" "$@" | sed -n 's/^  python train.py //p' \
    | xargs -L 1 scripts/nodes.sh
rmdir "$none"
