"""The folder of a run: its name, what it holds, whom it belongs to."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anorm.config.frozen import Config
from anorm.engine import checkpoint
from anorm.engine.record import METRICS, final_metrics
from anorm.files import write_atomic
from anorm.processes.world import World

CONFIG, CARD = "config.yaml", "data.json"


@dataclass(frozen=True)
class Job:
    """What is decided before training. config: decided for this machine."""

    config: Config
    signature: str
    folder: Path


def prefix(config: Config) -> str:
    """Return ARCH-NORM-DATA-SETUP-sSEED, with the task before them where that is not classification."""
    words = [config.choices[group].replace(":", "_") for group in ("arch", "norm", "data", "setup")]
    task = config.choices["task"]
    words = words if task == "classification" else [task, *words]
    return "-".join([*words, f"s{config.settings.seed}"])


def folder_for(config: Config, signature: str) -> Path:
    """Return run_dir, or runs/PREFIX-SIGNATURE under the present folder."""
    if config.settings.run_dir:
        return Path(config.settings.run_dir).resolve()
    return Path("runs", f"{prefix(config)}-{signature}").resolve()


def standing(folder: Path, signature: str, config: Config) -> dict[str, Any] | None:
    """Return the final event when this run is finished in ``folder``, None when it is new or cut.

    Raises ValueError when the folder holds a run of another configuration.
    """
    path, finished = folder / CONFIG, final_metrics(folder)
    if not finished and not (folder / "last.ckpt").exists():
        return None  # nothing of worth, such as what a start that failed leaves
    if not path.exists():
        raise ValueError(
            f"{folder} holds a run without its {CONFIG}: set another run_dir, or move that folder away"
        )
    if signature_in(path) != signature:
        state = "a finished run" if finished else "a run"
        unlike = configuration_in(path).difference(config) or "other data or weights"
        if "batch" in config.settings.eval.all_stats and "order" not in yaml.safe_load(path.read_text())["eval"]:
            unlike = (
                "it was evaluated by an earlier version, with the statistics of other batches: as they were stored, for "
                "each process its own; tools/validate.py evaluates it as today"
            )
        raise ValueError(
            f"{folder} already holds {state} of another configuration ({unlike}): set another run_dir, leave run_dir "
            "out, or move that folder away"
        )
    return finished


def keep(job: Job) -> None:
    """Write config.yaml: the configuration, its signature, the choices it was composed from. Running it again continues,
    whatever the first start was told.
    """
    text = job.config.having(resume="auto").text(signature=job.signature)
    write_atomic(job.folder / CONFIG, text.encode())


def configuration_in(path: Path) -> Config:
    """Return the frozen configuration in a file, or in a run folder, wherever that lies now. Raises ValueError in words."""
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no {path}: give a run folder, or the config.yaml of one")
    of_a_run = signature_in(path) and (path.parent / METRICS).exists()
    here = {"run_dir": str(path.parent.resolve())} if of_a_run else {}
    return Config.from_text(path.read_text(), str(path), **here)


def signature_in(path: Path) -> str:
    """Return the signature that a file or a run folder holds, empty where it holds none."""
    held = yaml.safe_load((path / CONFIG if path.is_dir() else path).read_text())
    return held.get("signature", "") if isinstance(held, dict) else ""


def with_weights(config: Config) -> Config:
    """Return ``config`` with the digest of the weights that it starts from. A run with a checkpoint needs them no longer:
    where they are gone the run's own folder tells the digest.

    Raises ValueError where no run is there that started from them.
    """
    weights = config.settings.weights
    if weights is None or Path(weights).is_file() or config.settings.resume == "never":
        return config.with_weights()
    run_dir = config.settings.run_dir
    folders = [Path(run_dir)] if run_dir else sorted(Path("runs").glob(f"{prefix(config)}-*"))
    for folder in folders:
        if (folder / CONFIG).is_file() and ((folder / "last.ckpt").exists() or final_metrics(folder)):
            held = configuration_in(folder)
            if held.weights_digest and held.settings.weights == weights and not held.difference(config):
                return config.with_weights(held.weights_digest)
    return config.with_weights()


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
def occupied(job: Job, world: World) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Hold the folder for this run; gives it and the checkpoint to continue from, or None. Called by every process.

    Raises ValueError when other processes hold it (also such as outlived a killed launcher), or its
    checkpoint is damaged.
    """
    folder, lock = job.folder, checkpoint.FolderLock(job.folder)
    last = folder / "last.ckpt"
    try:
        if world.main:
            lock.take_all()
            standing(folder, job.signature, job.config)
            if job.config.settings.resume == "never":
                clear(folder)
            elif last.exists():
                checkpoint.load(last)  # nothing is written beside a damaged one
            keep(job)
            lock.keep(0)
        resumes = world.broadcast(last.exists())  # one answer, also where a network disk's caches differ
        if not world.main:
            lock.keep(world.rank)
        yield folder, checkpoint.load(last) if resumes else None
    finally:
        lock.close()


@contextmanager
def rehearsal(job: Job, world: World) -> Iterator[tuple[Path, None]]:
    """A folder for a dry run, gone afterwards; the run's own is not touched."""
    with tempfile.TemporaryDirectory(prefix="anorm-dry-") as place:
        yield Path(place), None


def clear(folder: Path) -> None:
    """Remove what an earlier, unwanted start of the same run left."""
    for pattern in (METRICS, "*.ckpt", "*.safetensors", "predictions*", "unreadable.txt"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
