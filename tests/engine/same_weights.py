"""Train the same configurations in two checkouts and compare what comes out, bit for bit. Not collected by pytest:

python tests/engine/same_weights.py OTHER_CHECKOUT FOLDER

FOLDER keeps the runs of both: a second call trains only what is missing.
"""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from anorm.engine.record import read_metrics

HERE = Path(__file__).resolve().parents[2]
COMMON = ["data=digits", "hardware=cpu", "hardware.threads=1", "epochs=2", "arch=resnet20"]
AN = ["norm=an", "norm.place=2"]  # by number: "published" has meant different places
RUNS = {
    "bn": ["norm=bn"],
    "an": AN,
    "sn": ["norm=sn"],
    "mixed": ["arch=wrn_16_4", "arch.widen=1", "arch.dropout=0.2", *AN, "mix.mixup=0.2", "mix.cutmix=0.5"],
    "two processes": [*AN, "hardware.processes=2", "batch_size=32", "ema.decay=0.99"],
    "accumulated": [*AN, "batch_size=16", "optim.clip=1"],
    "recalibrated": [*AN, "eval.stats=recalibrated", "eval.recalibrate_batches=5"],
    "statistics of rank 0": ["norm=bn", "hardware.processes=2", "batch_size=32", "dist.stats=rank0"],
}
WALL_CLOCK = {"seconds", "images_per_second", "data_wait", "memory_mib", "environment", "notes", "event"}


def main(other: Path, folder: Path) -> int:
    """Return the number of configurations that differ."""
    differ = 0
    for name, arguments in RUNS.items():
        runs = {}
        for side, tree in (("other", other), ("here", HERE)):
            runs[side] = folder / side / name.replace(" ", "_").replace(",", "")
            train(tree, [*words(arguments), f"run_dir={runs[side]}"], runs[side])
        found = difference(runs["other"], runs["here"])
        differ += bool(found)
        print(f"{name}: {found or 'equal'}", flush=True)
    return differ


def words(arguments: list[str]) -> list[str]:
    """Return the whole command line of a configuration; a later word replaces an earlier one of the same key."""
    return list({word.partition("=")[0]: word for word in [*COMMON, *arguments]}.values())


def train(tree: Path, arguments: list[str], folder: Path) -> None:
    if (folder / "weights.safetensors").exists():
        return
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(arguments)}: {done.stderr or done.stdout}")


def difference(a: Path, b: Path) -> str:
    """Return what differs between two runs, in words; empty where nothing does. Fields that one side alone has are new."""
    weights_a, weights_b = (load_file(run / "weights.safetensors") for run in (a, b))
    if list(weights_a) != list(weights_b):
        return "the names of the weights"
    unequal = [name for name, value in weights_a.items() if not value.equal(weights_b[name])]
    if unequal:
        return f"{len(unequal)} of {len(weights_a)} tensors, {unequal[0]} first"
    for event_a, event_b in zip(read_metrics(a), read_metrics(b), strict=True):
        for key in (event_a.keys() & event_b.keys()) - WALL_CLOCK:
            if event_a[key] != event_b[key]:
                return f"{event_a['event']}.{key}: {event_a[key]} and {event_b[key]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
