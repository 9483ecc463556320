"""Compile C and C++ once for this machine, and find the library again.

A library lies in a cache folder (``ANORM_CACHE``, else ``anorm`` in ``XDG_CACHE_HOME`` or ``~/.cache``, else, where none
can be written, one of this user's among temporary files) under a name that holds a digest of its sources, flags and
compiler. Processes that start together wait for the one that builds; a
build that was killed leaves nothing behind that another would wait for or load.

The compiler is called directly. ``torch.utils.cpp_extension.load`` would also need ninja, which torch does not
require, and waits for ever on the lock of a build that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildError", "Library", "cache_folders"]


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why and what to do."""


def cache_folders() -> list[Path]:
    """Return where compiled libraries are looked for, and kept in the first that can be written.

    A home folder may be missing or read-only, as in containers and on some clusters; then the folder for temporary files
    holds ours, for this user alone.
    """
    if "ANORM_CACHE" in os.environ:
        return [Path(os.environ["ANORM_CACHE"])]
    folders = [Path(tempfile.gettempdir()) / f"anorm-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # no home
        folders.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anorm")
    return folders


def _usable(folder: Path) -> bool:
    """Whether what lies in a folder may be loaded: one among temporary files must be ours, and writable by nobody else."""
    if folder.parent != Path(tempfile.gettempdir()) or not folder.exists():
        return True
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


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

    def file_name(self) -> str:
        """Return the name of the file that a build makes."""
        digest = hashlib.sha256()
        for name in (*self.sources, *self.headers):
            digest.update((self.folder / name).read_bytes())
        made_of = (self.sources, self.flags, self.built_for, platform.machine(), os.environ.get("CXX"))
        digest.update(repr(made_of).encode())
        return f"{self.name}-{digest.hexdigest()[:16]}.so"

    def compiled(self, rebuild: bool = False, on_start=None) -> Path:
        """Path of the library, built if it is not in the cache.

        ``on_start()`` is called before a compiler is started. Raises BuildError with the reason and, where a compiler
        failed, the path of its messages.
        """
        from filelock import (
            FileLock,  # torch requires it; importing it here keeps `import anorm` as quick as torch
        )

        if sys.platform != "linux":
            raise BuildError(f"{self.name} is built on Linux only, this is {sys.platform}")
        folders, refused = [folder for folder in cache_folders() if _usable(folder)], []
        if not rebuild:
            for folder in folders:
                if (folder / self.file_name()).exists():
                    return folder / self.file_name()
        for folder in folders:
            path = folder / self.file_name()
            lock = FileLock(path.with_suffix(".lock"))  # the system releases it with the process, however that ends
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not _usable(folder):  # made by somebody else in the meantime
                    raise PermissionError(errno.EPERM, "it is not this user's alone")
                lock.acquire()
            except OSError as error:
                refused.append(f"cannot write to {folder} ({error.strerror})")
                continue
            try:
                if rebuild or not path.exists():
                    if on_start is not None:
                        on_start()
                    self._compile(path)
            finally:
                lock.release()
            return path
        raise BuildError(f"{'; '.join(refused)}; set ANORM_CACHE to a folder that can be written")

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
