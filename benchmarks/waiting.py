"""A training step on two threads that sleep while they wait, that spin, and on one thread: alone and beside others.

    python -m benchmarks.waiting                    ResNet-50 at 96 px, 4 images; beside nothing and beside one busy process
    python -m benchmarks.waiting --busy 0 1 2       beside so many
    python -m benchmarks.waiting --side 224 --rounds 7

Every contender is a process of its own (its runtime reads the environment once). They take turns; a figure is the
median of the steps, with quartiles. What else the machine does is given as its load before the run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from anorm.openmp import SLEEP

# label -> threads, environment
CONTENDERS = {
    "2 threads that sleep (as anorm sets it)": (2, SLEEP),
    "2 threads that spin (torch's default)": (2, {}),
    "1 thread": (1, {}),
}
STEPS = """
import sys, time, torch
from anorm import create_model
threads, side, steps = map(int, sys.argv[1:])
torch.set_num_threads(threads)
model = create_model("resnet50", norm="an")
images, labels = torch.randn(4, 3, side, side), torch.randint(1000, (4,))
for step in range(steps + 1):
    begin = time.perf_counter()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    if step:
        print(time.perf_counter() - begin)
"""


def seconds_of_steps(threads: int, chosen: dict[str, str], side: int, steps: int) -> list[float]:
    """Seconds of each step of a new process. ``import torch`` comes first there, so that only ``chosen`` is set."""
    clean = {name: value for name, value in os.environ.items() if name not in (*SLEEP, "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", STEPS, str(threads), str(side), str(steps)]
    done = subprocess.run(command, env=clean | chosen, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of busy processes beside it")
    parser.add_argument("--side", type=int, default=96, help="pixels of an image's side")
    parser.add_argument("--steps", type=int, default=4, help="a process")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(argv)
    print(f"load before: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    for number in asked.busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
        try:
            found = {name: [] for name in CONTENDERS}
            for _ in range(asked.rounds):
                for name, (threads, chosen) in CONTENDERS.items():
                    found[name] += seconds_of_steps(threads, chosen, asked.side, asked.steps)
        finally:
            for other in others:
                other.kill()
                other.wait()
        print(f"beside {number} busy processes:")
        for name, values in found.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"  {name:42s} {middle:6.2f} s a step [{low:.2f}, {high:.2f}]", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
