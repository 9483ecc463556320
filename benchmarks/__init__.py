"""How fast it is: programs that measure, and what they measured. ``python -m benchmarks.layers`` and so on."""

import anorm as anorm  # before torch: threads wait as they do in a run
