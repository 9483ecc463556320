"""How torch's OpenMP threads wait for one another on a CPU.

Between two parallel regions a thread spins, for up to milliseconds, on a core that another process may need. On a machine
with something else to do each region then waits for a thread that is not running, and a training step on two threads
takes several times as long as on one. A thread that sleeps instead is woken within microseconds.
"""

from __future__ import annotations

import os
import sys

__all__ = ["SLEEP", "let_threads_sleep"]

SLEEP = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""What GNU's runtime (in torch's wheels) reads, and Intel's and LLVM's (in builds with MKL's)."""

_SAID = (*SLEEP, "OMP_WAIT_POLICY")


def let_threads_sleep() -> None:
    """Set ``SLEEP`` in the environment of this process and its children, unless the user said how threads wait.

    The runtime reads its environment when torch is imported; afterwards nothing changes, and nothing is set.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SAID):
        os.environ.update(SLEEP)
