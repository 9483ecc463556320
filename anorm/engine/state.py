"""What a run keeps on disk besides its log, and how it resumes from it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anorm.engine import checkpoint, optim
from anorm.engine.evaluate import Pair, Result
from anorm.engine.run import Progress, Run
from anorm.engine.statistics import gather_buffers, joined, with_buffers
from anorm.files import write_atomic


def weights_state(run: Run) -> dict[str, Any]:
    """Return what best.ckpt holds: the weights and what they are of."""
    return {
        "arch": run.arch,
        "signature": run.signature,
        "step": run.progress.step,
        "model": run.model.state_dict(),
        "progress": dataclasses.asdict(run.progress),
    } | ({"ema": run.ema.model.state_dict()} if run.ema else {})


def save(run: Run, own_statistics: list[list[Tensor]] | None = None) -> list[list[Tensor]]:
    """Write last.ckpt: all that the next step depends on. Called by every process; rank 0 writes. The checkpoint before is
    kept, unless it is of the same step, before its evaluation.

    Its weights hold the statistics of all processes joined; each process resumes with its own. own_statistics: the
    buffers of each process before an evaluation joined them, so that ``join_again`` can join them in another way. Returns,
    on rank 0, the buffers of each process as they are now.
    """
    world = run.world
    buffers = gather_buffers(world, run.model)
    ema_buffers = gather_buffers(world, run.ema.model) if run.ema else []
    sums = world.gather(run.sums.cpu())
    if not world.main:
        return buffers
    with warn_if_unwritable(run, "checkpoint"):
        run.record.write("checkpoint", step=run.progress.step)
        state = weights_state(run)
        how = run.settings.dist.stats
        state["model"] = with_buffers(state["model"], run.model, joined(buffers, how))
        if run.ema:
            state["ema"] = with_buffers(state["ema"], run.ema.model, joined(ema_buffers, how))
        state |= {
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "schedule": run.schedule.state_dict(),
            "ema_steps": run.ema.steps if run.ema else 0,
            "processes": {
                "size": world.size,
                "buffers": buffers,
                "ema_buffers": ema_buffers,
                "before_joining": own_statistics or buffers,
                "sums": sums,
            },
            "log_offset": run.record.offset,
            "threads": torch.get_num_threads(),
        }
        older = run.settings.checkpoint.keep if run.saved_step != run.progress.step else 0
        checkpoint.save(run.folder / "last.ckpt", state, keep=older + 1)
        run.saved_step = run.progress.step
    return buffers


@contextmanager
def warn_if_unwritable(run: Run, what: str) -> Iterator[None]:
    """Turn an OSError within, such as that of a full disk, into a warning; after the last step, raise it again."""
    try:
        yield
    except OSError as error:
        run.record.say(
            f"warning: no {what} at step {run.progress.step}: {error}; what was there before is untouched"
        )
        if run.progress.step == run.total_steps:
            raise


def restore(run: Run, state: dict[str, Any]) -> list[str]:
    """Resume from a checkpoint's state; return what a person should know about it. Called after DDP was put around the
    network, as DDP then copies rank 0's statistics to all.

    With another number of processes the statistics of each become the mean over those of the old ones.
    """
    said, processes, world = [], state["processes"], run.world
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    optim.lay_out_as_parameters(run.optimizer)
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    run.schedule.load_state_dict(state.get("schedule", {}))
    run.progress = Progress.from_state(state["progress"])
    models = [(run.model, processes["buffers"])]
    if run.ema:
        run.ema.model.load_state_dict(state["ema"])
        run.ema.steps = state["ema_steps"]
        models.append((run.ema.model, processes["ema_buffers"]))
    same = processes["size"] == world.size
    if not same:
        said.append(
            f"continuing with {world.size} instead of {processes['size']} processes: same batches in the "
            "same order, sums in another, so the weights will agree to rounding and not to the last bit"
        )
    for model, kept in models:
        for buffer, value in zip(
            model.buffers(), kept[world.rank] if same else joined(kept, "mean"), strict=True
        ):
            buffer.copy_(value)
    if same:
        run.sums.copy_(processes["sums"][world.rank])
    else:
        run.sums.copy_(torch.stack(processes["sums"]).mean(0))
    run.saved_step = run.progress.step
    return said


UNREADABLE = "unreadable.txt"
PREDICTIONS = "predictions"
"""The stem of the files of an evaluation's rows; a task adds what it writes behind it."""


def keep_predictions(run: Run, found: dict[Pair, Result], suffix: str = "") -> None:
    """Write what the network made of each image, in the data set's order: predictions.npz of the first pair of set and
    statistics, predictions-SET-STATS.npz of the others (other tasks write other formats). Called on rank 0.
    """
    for number, (pair, result) in enumerate(found.items()):
        name = f"{PREDICTIONS}{suffix}" + (f"-{pair.set}-{pair.stats}".replace("/", "_") if number else "")
        identity = run.evaluator.sets[pair.set].identity
        for ending, content in run.task.predictions(result.rows, identity).items():
            write_atomic(run.folder / f"{name}{ending}", content)


def list_unreadable(run: Run) -> int:
    """Write unreadable.txt: a line for each file that data.on_error=skip passed over since the run began, in any process.
    Called by every process; rank 0 writes, and returns their number.
    """
    mine = [
        f"{split}: {message}"
        for split, loader in (("train", run.train), *run.evaluator.sets.items())
        for message in loader.skipped.values()
    ]
    found = run.world.gather(mine)
    if not run.world.main:
        return 0
    path = run.folder / UNREADABLE
    before = path.read_text().splitlines() if path.exists() else []
    lines = list(dict.fromkeys([*before, *sorted(itertools.chain(*found))]))
    if len(lines) > len(before):
        with warn_if_unwritable(run, "list of unreadable files"):
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def save_release(run: Run) -> None:
    """Write weights.safetensors: the last weights, with the statistics that they were evaluated with."""
    from safetensors.torch import save as to_bytes

    for name, model in (("weights", run.model), *((("weights_ema", run.ema.model),) if run.ema else ())):
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        write_atomic(run.folder / f"{name}.safetensors", to_bytes(state, {"arch": run.arch, "format": "pt"}))
