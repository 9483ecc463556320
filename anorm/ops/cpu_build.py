"""Compile the C++ kernels once for the torch that is installed, and find them again.

The library holds kernels for several instruction sets and chooses when it is loaded, so one build serves every machine
of its architecture. It lies in a cache folder (``ANORM_CACHE``, else ``anorm`` in ``XDG_CACHE_HOME`` or ``~/.cache``)
under a name that holds torch's version and a digest of sources, flags and CXX. Processes that start together wait for
the one that builds; a build that was killed leaves nothing behind that another would wait for or load.

The compiler is called directly. ``torch.utils.cpp_extension.load`` would also need ninja, which torch does not
require, and waits for ever on the lock of a build that was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["BuildError", "cache_folder", "compiled_library", "library_path"]

_HERE = Path(__file__).parent
# the passes are vectors by hand, the laws' loops are not
_SOURCES = {
    "cpu.cpp": "-O2",
    "cpu_laws.cpp": "-O3",
    "cpu_switchable.cpp": "-O3",
}
_HEADERS = (
    "cpu_isa.h", "cpu_vector.h", "cpu_passes.h", "cpu_cells.h", "cpu_channels.h", "cpu_laws.h", "cpu_switchable.h",
)  # fmt: skip
# Neither -ffast-math nor -march: see cpu.cpp. The two -fno are about errno and floating-point traps only.
_FLAGS = (
    "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-psabi", "-w",
)  # fmt: skip


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why and what to do."""


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if "ANORM_CACHE" in os.environ:
        return Path(os.environ["ANORM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anorm"


def library_path() -> Path:
    """The file that a build for this torch, these sources and this compiler makes, whether it exists or not."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    torch_build = f"{torch.__version__} {torch.version.git_version} {platform.machine()}"
    digest.update(repr((_SOURCES, _FLAGS, torch_build, os.environ.get("CXX"))).encode())
    return cache_folder() / f"cpu-torch{torch.__version__}-{digest.hexdigest()[:16]}.so"


def compiled_library(rebuild: bool = False, on_start=None) -> Path:
    """Path of the compiled library, built if it is not in the cache (about a minute and a half of one core).

    ``on_start()`` is called before a compiler is started. Raises BuildError with the reason and, where a compiler
    failed, the path of its messages.
    """
    if sys.platform != "linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    path = library_path()
    if path.exists() and not rebuild:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError as error:
        raise BuildError(
            f"cannot write to {path.parent} ({error}); set ANORM_CACHE to a folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it with the process, however that ends
        if rebuild or not path.exists():
            if on_start is not None:
                on_start()
            _compile(path)
    return path


def _compile(path: Path) -> None:
    compiler = _compiler()
    includes, libraries = Path(torch.__file__).parent / "include", Path(torch.__file__).parent / "lib"
    if not includes.is_dir():
        raise BuildError(
            f"this torch has no C++ headers ({includes}); install torch's wheel from PyPI or pytorch.org"
        )
    search = ["-isystem", str(includes), "-isystem", str(includes / "torch/csrc/api/include")]
    log = path.with_suffix(".log")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, open(log, "w") as messages:
        objects = {name: Path(scratch, name).with_suffix(".o") for name in _SOURCES}
        _run([
            [compiler, *_FLAGS, optimize, *search, "-c", str(_HERE / name), "-o", str(objects[name])]
            for name, optimize in _SOURCES.items()
        ], messages)  # fmt: skip
        built = Path(scratch, path.name)
        link = [compiler, "-shared", "-fopenmp", *map(str, objects.values()), "-o", str(built)]
        _run([[*link, f"-L{libraries}", "-lc10", "-ltorch_cpu", "-ltorch"]], messages)
        os.replace(built, path)  # complete or not there at all


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    what = f"CXX={asked}" if asked else "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler ({what} is not on the PATH); install g++ 11 or newer")


def _run(commands: list[list[str]], messages) -> None:
    """Run the commands side by side; all must succeed."""
    running = []
    for command in commands:
        messages.write(" ".join(command) + "\n")
        messages.flush()
        running.append(subprocess.Popen(command, stdout=messages, stderr=subprocess.STDOUT))
    if any([process.wait() for process in running]):
        raise BuildError(f"the compiler failed; its messages are in {messages.name}")
