"""Measuring on a CPU: contenders that take turns, medians and ratios with spread, memory, the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anorm import ops

__all__ = ["Contender", "Timing", "fresh_write", "interleaved", "kept_bytes", "machine", "peak_bytes"]

MALLOC = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"


class Contender(NamedTuple):
    """What is timed: ``run()``, with the backend that it needs chosen outside of the clock."""

    run: Callable[[], object]
    backend: str = "auto"


class Timing(NamedTuple):
    """Median and quartiles of a call in ms, and of its ratio to the first contender's in the same round."""

    ms: float
    ms_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


def clock() -> Callable[[], float]:
    """Seconds: of this thread's own work where it works alone (others do not lengthen it), else of the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(contenders: dict[str, Contender], rounds: int, least_ms: float = 4.0) -> dict[str, Timing]:
    """Time every contender once a round, in turns; the first is the unit of the ratios.

    A contender is called often enough in its turn to fill ``least_ms``. Two rounds warm up.
    """
    now = clock()
    calls, times = dict.fromkeys(contenders, 1), {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, contender in contenders.items():
            ops.set_backend(contender.backend)
            start = now()
            for _ in range(calls[name]):
                contender.run()
            elapsed = 1e3 * (now() - start) / calls[name]
            if turn >= 2:
                times[name].append(elapsed)
            elif turn == 1:
                calls[name] = max(1, round(least_ms / max(elapsed, 1e-6)))
    ops.set_backend("auto")
    unit = next(iter(times.values()))
    found = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, unit, strict=True)]
        (low, ms, high), (less, ratio, more) = (
            statistics.quantiles(values, n=4),
            statistics.quantiles(ratios, n=4),
        )
        found[name] = Timing(ms, (low, high), ratio, (less, more))
    return found


def kept_bytes(call: Callable[[], Tensor], given: tuple[Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, without those of ``given``.

    The result counts where it is kept: an in-place ReLU keeps its own.
    """
    storages: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in given}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call()
    del y
    return sum(storages.values())


def peak_bytes(run: Callable[[], object]) -> int | None:
    """By how much the process's resident memory rises at most during ``run`` (Linux); None elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file() or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that malloc holds back would hide the rise
    before = _status(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM, the highest so far, again
    run()
    return _status(status, "VmHWM") - before


def _status(path: Path, name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", path.read_text())[1])


def fresh_write() -> float:
    """GB/s of writing 64 MB just allocated: low where malloc gives memory back to the system at once."""
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        torch.empty(16 * 2**20).fill_(1.0)
        best = max(best, 64e6 * 1.048576 / (time.perf_counter() - start) / 1e9)
    return best


def warm_copy() -> float:
    """GB/s, read and written, of a copy between buffers of 64 MB that exist."""
    a, b = torch.ones(16 * 2**20), torch.ones(16 * 2**20)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2 * 64e6 * 1.048576 / min(times) / 1e9


def machine() -> dict[str, object]:
    """The hardware, the versions, the threads and the allocator: what a figure depends on."""
    packages = {}
    for package in ("torch", "onnxruntime", "onnx", "triton", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    reason = ops.why_not("cpu")
    facts: dict[str, object] = {
        "hardware": hardware(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock().__name__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **packages,
        "allocator": {
            name: os.environ.get(name, "not set") for name in (*MALLOC, "LD_PRELOAD", "OMP_NUM_THREADS")
        },
        "libc": " ".join(platform.libc_ver()),
        "fresh_write_gb_s": round(fresh_write(), 1),
        "warm_copy_gb_s": round(warm_copy(), 1),
        "cpu_backend": reason or "usable",
    }
    if reason is None:
        from anorm.ops import cpu

        facts["cpu_backend"] = f"C++, {cpu.instruction_set()}"
    return facts


def hardware() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
