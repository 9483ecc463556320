"""The folder of a run: its name, what it holds, whom it belongs to."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from anorm.config.signature import EXCLUDED, counting_here, flatten
from anorm.engine import checkpoint
from anorm.engine.record import METRICS, final_metrics
from anorm.files import write_atomic
from anorm.processes.world import World

CONFIG, CARD = "config.yaml", "data.json"


def folder_for(config: dict, choices: dict[str, str], signature: str) -> Path:
    """run_dir, or runs/ARCH-NORM-DATA-SETUP-sSEED-SIGNATURE under the present folder, with the
    task before them where that is not classification.
    """
    if config["run_dir"]:
        return Path(config["run_dir"]).expanduser().resolve()
    task = choices.get("task", "classification")
    words = [choices[group].replace(":", "_") for group in ("arch", "norm", "data", "setup")]
    words = words if task == "classification" else [task, *words]
    return Path("runs", "-".join([*words, f"s{config['seed']}", signature])).resolve()


def standing(folder: Path, signature: str, config: dict) -> dict[str, Any] | None:
    """The final event when this run is finished in ``folder``, None when it is new or cut.

    Raises ValueError when the folder holds a run of another configuration.
    """
    path, finished = folder / CONFIG, final_metrics(folder)
    if not finished and not (folder / "last.ckpt").exists():
        return None  # nothing of worth, such as what a start that failed leaves
    if not path.exists():
        raise ValueError(
            f"{folder} holds a run without its {CONFIG}: set another run_dir, or move that folder away"
        )
    held = yaml.safe_load(path.read_text())
    if held.get("signature") != signature:
        state = "a finished run" if finished else "a run"
        raise ValueError(
            f"{folder} already holds {state} of another configuration ({_difference(held, config)}): set "
            "another run_dir, leave run_dir out, or move that folder away"
        )
    return finished


def freeze(folder: Path, config: dict, choices: dict[str, str], signature: str) -> None:
    """Write config.yaml: the resolved configuration, its signature, the choices it was composed from. Running it again
    continues, whatever the first start was told.
    """
    held = {"signature": signature, "choices": choices} | with_absolute_root(config) | {"resume": "auto"}
    text = yaml.safe_dump(held, sort_keys=False)
    write_atomic(folder / CONFIG, text.encode())


def with_absolute_root(config: dict) -> dict:
    """``config`` with data.root as it is called from any folder."""
    root = config["data"].get("root")
    return (
        config | {"data": config["data"] | {"root": str(Path(root).expanduser().absolute())}}
        if root
        else config
    )


def thaw(path: Path) -> tuple[dict, dict[str, str]]:
    """(configuration, choices) that ``freeze`` wrote, given the file or its folder, wherever that lies now. Raises
    ValueError in words.
    """
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no {path}: give a run folder, or the config.yaml of one")
    held = yaml.safe_load(path.read_text())
    if not isinstance(held, dict) or "choices" not in held:
        raise ValueError(f"{path} is no frozen configuration: it has no choices")
    choices = held.pop("choices")
    if held.pop("signature", None) and (path.parent / METRICS).exists():
        held["run_dir"] = str(path.parent.resolve())
    return held, choices


def write_data_card(folder: Path, card: dict) -> None:
    """Write data.json: what a prediction needs to know about the data, so that it does not need the data; and which
    images the run is evaluated on.
    """
    write_atomic(folder / CARD, json.dumps(card).encode())


def last_weights(folder: Path) -> Path:
    """The newest weights of a run. Raises ValueError when it has none yet."""
    for name in ("last.ckpt", "weights.safetensors"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds no weights yet: the run saves its first at the end of an epoch")


@contextmanager
def occupied(folder: Path, world: World, job: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Hold the folder for this run; gives it and the checkpoint to continue from, or None. Called by every process.

    Raises ValueError when other processes hold it (also such as outlived a killed launcher), or its
    checkpoint is damaged.
    """
    lock, config = checkpoint.FolderLock(folder), job["config"]
    last = folder / "last.ckpt"
    try:
        if world.main:
            lock.take_all()
            standing(folder, job["signature"], config)
            if config["resume"] == "never":
                clear(folder)
            elif last.exists():
                checkpoint.load(last)  # nothing is written beside a damaged one
            freeze(folder, config, job["choices"], job["signature"])
            lock.keep(0)
        resumes = world.broadcast(last.exists())  # one answer, also where a network disk's caches differ
        if not world.main:
            lock.keep(world.rank)
        yield folder, checkpoint.load(last) if resumes else None
    finally:
        lock.close()


@contextmanager
def rehearsal(folder: Path, world: World, job: dict[str, Any]) -> Iterator[tuple[Path, None]]:
    """A folder for a dry run, gone afterwards; the run's own is not touched."""
    with tempfile.TemporaryDirectory(prefix="anorm-dry-") as place:
        yield Path(place), None


def clear(folder: Path) -> None:
    """Remove what an earlier, unwanted start of the same run left."""
    for pattern in (METRICS, "*.ckpt", "*.safetensors", "predictions*.npz", "unreadable.txt"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _difference(held: dict, config: dict) -> str:
    old, new = flatten({k: v for k, v in held.items() if k not in ("signature", "choices")}), flatten(config)
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} now"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
        and (key in counting_here(config) or (key.split(".")[0] not in EXCLUDED and key not in EXCLUDED))
    ]
    return (
        "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        or "other data or weights"
    )
