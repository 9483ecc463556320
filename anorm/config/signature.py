"""What a run is: a digest of everything that changes its mathematics, which also names its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from anorm.files import file_digest

EXCLUDED = (
    "run_dir",
    "resume",
    "dry",
    "faithful",  # its effect is in the other keys
    "weights",  # replaced by a digest of the file
    "data.root",
    "data.cache",
    "data.on_error",  # the data's identity counts, not where it lies; data.loader does: their pixels differ by rounding
    "eval.batch_size",
    "eval.order",
    "eval.seed",
    "eval.others",
    "checkpoint",
    "log",
    "hardware.device",
    "hardware.processes",
    "hardware.channels_last",
    "hardware.compile",
    "hardware.workers",
    "hardware.threads",
    "hardware.deterministic",
)
"""Keys, or sections, that leave the mathematics as it is. ``hardware.dtype`` and ``hardware.loss_scale`` do not."""

ADDED = {
    "task.name": "classification",
    "schedule.name": "cosine",
    "schedule.milestones": [],
    "schedule.factor": None,
    "schedule.tolerance": None,
    "schedule.warmup_steps": None,
    "schedule.warmup_from": 0.0,
}
"""Keys that came later, with the values by which runs that are older than them keep their signature."""


def signature(config: dict, data_identity: str, processes: int) -> str:
    """Ten hexadecimal digits. ``config``: complete and resolved, so that a default counts like the same value typed.

    The number of processes counts only where statistics are pooled over them (norm.sync); the size, order and seed of
    evaluation's batches only where their statistics are used (eval.stats=batch).
    """
    counted = {
        key: value
        for key, value in flatten(config).items()
        if not _excluded(key) and not (key in ADDED and value == ADDED[key])
    }
    counted["data.identity"] = data_identity
    if config.get("weights"):
        if not Path(config["weights"]).is_file():
            raise ValueError(f"weights={config['weights']} is not a file")
        counted["weights"] = file_digest(Path(config["weights"]))
    for name in ("batch_size", "order", "seed"):
        if f"eval.{name}" in counting_here(config):
            counted[f"eval.{name}"] = config["eval"][name]
    if "hardware.processes" in counting_here(config):
        counted["processes"] = processes
    text = json.dumps(counted, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def counting_here(config: dict) -> set[str]:
    """The excluded keys that change the mathematics of this configuration all the same."""
    keys = set()
    if "batch" in config["eval"]["stats"]:
        keys |= {"eval.batch_size", "eval.order", "eval.seed"}
    if config["norm"].get("sync"):
        keys |= {"hardware.processes"}
    return keys


def flatten(config: dict, prefix: str = "") -> dict:
    """{"optim.lr": 0.1, ...}; an empty section stays as it is."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _excluded(key: str) -> bool:
    return any(key == word or key.startswith(word + ".") for word in EXCLUDED)
