"""A long run killed many times, compared with one left alone. Not collected by pytest:

PYTHONPATH=tests python tests/processes/soak.py FOLDER [EPOCHS=200] [KILLS=50]
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from commands import SMALL, events, ranks_of, run_train, start_train, weights

from anorm.engine.record import read_metrics

VICTIMS = ("launcher", "rank", "group")


def main(folder: Path, epochs: int, kills: int) -> int:
    """0 when weights and log of the killed run equal those of the other, bit for bit."""
    arguments = [
        *(word for word in SMALL if not word.startswith("epochs")),
        "arch=wrn_16_4",
        "arch.widen=1",
        "arch.dropout=0.2",
        "norm=an",
        "mix.mixup=0.2",
        f"epochs={epochs}",
        "hardware.processes=4",  # more than two: their sums depend on the order
        "batch_size=4",
        "checkpoint.every_steps=3",
        "log.every=1",
    ]
    status, _, err = run_train(*arguments, f"run_dir={folder / 'alone'}")
    assert status == 0, err
    rng, done, counts = random.Random(0), 0, dict.fromkeys(VICTIMS, 0)
    total = events(folder / "alone", "train")[-1]["step"]
    while done < kills:
        process = start_train(*arguments, f"run_dir={folder / 'killed'}")
        # the kills are spread over the run: each waits for its own share of the steps
        share, start = total * (done + rng.random()) / kills, time.monotonic()
        while (
            process.poll() is None and last_step(folder / "killed") < share and time.monotonic() - start < 300
        ):
            time.sleep(0.01)
        victim, ranks = VICTIMS[done % len(VICTIMS)], ranks_of(process.pid)
        if process.poll() is not None or not ranks:
            print(f"the run ended before kill {done + 1}: {process.communicate()[1]}")
            return 1
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid if victim == "launcher" else rng.choice(ranks), signal.SIGKILL)
        process.communicate()
        while any(os.path.exists(f"/proc/{pid}") for pid in ranks):
            time.sleep(0.05)
        done += 1
        counts[victim] += 1
        print(f"kill {done} ({victim}) at step {last_step(folder / 'killed')} of {total}", flush=True)
    status, _, err = run_train(*arguments, f"run_dir={folder / 'killed'}")
    assert status == 0, err
    one, other = weights(folder / "alone")["model"], weights(folder / "killed")["model"]
    same = all(torch.equal(one[key], other[key]) for key in one)
    logs = [
        [
            (e["event"], e.get("step"), e.get("loss"), e.get("top1"))
            for e in read_metrics(folder / name)
            if e["event"] in ("train", "eval")
        ]
        for name in ("alone", "killed")
    ]
    print(
        f"{epochs} epochs, {done} kills {counts}: weights {'equal' if same else 'DIFFER'}, "
        f"log {'equal' if logs[0] == logs[1] else 'DIFFERS'}"
    )
    return 0 if same and logs[0] == logs[1] else 1


def last_step(folder: Path) -> int:
    return max((line["step"] for line in events(folder, "train")), default=0)


if __name__ == "__main__":
    sys.exit(
        main(Path(sys.argv[1]), *(int(word) for word in (sys.argv[2:] + ["200", "50"][len(sys.argv) - 2 :])))
    )
