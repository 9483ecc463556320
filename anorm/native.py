"""Compile C and C++ once for this machine, and find the library again.

A library lies in a cache folder (``ANORM_CACHE``, else ``anorm`` in ``XDG_CACHE_HOME`` or ``~/.cache``) under a name
that holds a digest of its sources, flags and compiler. Processes that start together wait for the one that builds; a
build that was killed leaves nothing behind that another would wait for or load.

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
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildError", "Library", "cache_folder"]


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why and what to do."""


def cache_folder() -> Path:
    """Where compiled libraries are kept. Raises BuildError where there is no place for them."""
    if "ANORM_CACHE" in os.environ:
        return Path(os.environ["ANORM_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anorm"
    except RuntimeError as error:
        raise BuildError("there is no home folder for compiled code: set ANORM_CACHE to a folder") from error


@dataclass(frozen=True)
class Library:
    """Sources in ``folder`` that become one shared library.

    name: how its file begins. sources: source file -> its own flags. headers: files of ours that the sources include.
    flags, link: of the compiler, for every source and for linking. built_for: whatever else the result depends on.
    include: folders of other people's headers; they are not part of the file's name.
    """

    name: str
    folder: Path
    sources: dict[str, str]
    headers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    built_for: str = ""
    include: tuple[Path, ...] = ()

    def path(self) -> Path:
        """The file that a build makes, whether it exists or not."""
        digest = hashlib.sha256()
        for name in (*self.sources, *self.headers):
            digest.update((self.folder / name).read_bytes())
        made_of = (self.sources, self.flags, self.built_for, platform.machine(), os.environ.get("CXX"))
        digest.update(repr(made_of).encode())
        return cache_folder() / f"{self.name}-{digest.hexdigest()[:16]}.so"

    def compiled(self, rebuild: bool = False, on_start=None) -> Path:
        """Path of the library, built if it is not in the cache.

        ``on_start()`` is called before a compiler is started. Raises BuildError with the reason and, where a compiler
        failed, the path of its messages.
        """
        if sys.platform != "linux":
            raise BuildError(f"{self.name} is built on Linux only, this is {sys.platform}")
        path = self.path()
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
                self._compile(path)
        return path

    def _compile(self, path: Path) -> None:
        compiler = _compiler()
        search = [word for folder in self.include for word in ("-isystem", str(folder))]
        log = path.with_suffix(".log")
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch, open(log, "w") as messages:
            objects = {name: Path(scratch, name).with_suffix(".o") for name in self.sources}
            _run([
                [compiler, *self.flags, own, *search, "-c", str(self.folder / name), "-o", str(objects[name])]
                for name, own in self.sources.items()
            ], messages)  # fmt: skip
            built = Path(scratch, path.name)
            _run([[compiler, "-shared", *map(str, objects.values()), "-o", str(built), *self.link]], messages)
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
