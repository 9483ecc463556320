"""How fast it is: programs that measure, and what they measured. ``python -m benchmarks.layers`` and so on."""
