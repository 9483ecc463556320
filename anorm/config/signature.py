"""What a run is: a digest of everything that changes its mathematics, which also names its folder."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from anorm.registry import has_basic_blocks

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

BATCHES = {"eval.batch_size": None, "eval.order": "shuffled", "eval.seed": 0}
"""What decides which images evaluation puts into one batch, with its defaults."""

ADDED = {
    "task.name": "classification",
    "schedule.name": "cosine",
    "schedule.milestones": [],
    "schedule.factor": None,
    "schedule.tolerance": None,
    "schedule.warmup_steps": None,
    "schedule.warmup_from": 0.0,
}
"""Keys that are younger than some runs -> the value that stands for what those runs did; it is left out of signatures.
Whoever adds an argument to a task, an architecture, a norm, a data set or a section adds its default here.
"""


def signature(config: dict, data_identity: str, weights: str | None = None) -> str:
    """Return ten hexadecimal digits. ``config``: the tree of a complete configuration decided for its machine, so that a
    default counts like the same value typed; ``weights``: the digest of the file that a run starts from.

    The number of processes counts only where statistics are pooled over them (norm.sync); the size, order and seed of
    evaluation's batches only where their statistics are used (eval.stats=batch).
    """
    flat = flatten(config)
    counted = {
        key: value for key, value in flat.items() if not _excluded(key) and (key, value) not in ADDED.items()
    }
    counted["data.identity"] = data_identity
    if "place" in config["norm"]:
        counted["norm.place"] = _place(config)
    if weights:
        counted["weights"] = weights
    here = counting_here(config)
    for name in ("batch_size", "order", "seed"):
        if f"eval.{name}" in here:
            counted[f"eval.{name}"] = flat[f"eval.{name}"]
    if "hardware.processes" in here:
        counted["processes"] = flat["hardware.processes"]
    text = json.dumps(counted, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _place(config: dict) -> Any:
    """Return norm.place as runs spelled it when "published" was the place of the paper's text in basic blocks too: that
    place keeps the signature of the runs that have it, and so does today's, which those had to call 1.
    """
    place, arch = config["norm"]["place"], config["arch"]["name"]
    if place == "text":
        return "published"
    at_focus = place == "published" and "attention" in config["norm"]  # AN's own option
    if not at_focus or not has_basic_blocks(arch):
        return place
    return "focus" if ":" in arch else 1


def difference(old: dict, new: dict) -> str:
    """Return in words which keys that count for a signature differ between two trees; empty where none does."""
    old, new, here = flatten(old), flatten(new), counting_here(new)
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} now"
        for key in {**old, **new}
        if old.get(key, ADDED.get(key)) != new.get(key) and (key in here or not _excluded(key))
    ]
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def counting_here(config: dict) -> set[str]:
    """Return the excluded keys that change the mathematics of this configuration all the same."""
    keys = set()
    if "batch" in config["eval"]["stats"]:
        keys |= set(BATCHES)
    flat = flatten(config)
    if any(key.startswith("norm.") and key.endswith("eval_stats") and flat[key] == "batch" for key in flat):
        # a law with batch statistics of its own, such as afn_as_released, whose runs are older than these keys
        keys |= {key for key, ordinary in BATCHES.items() if flat.get(key, ordinary) != ordinary}
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
