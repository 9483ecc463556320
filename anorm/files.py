"""Files: written whole or not at all, and told apart by a digest of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at every moment, a kill or a full disk included, the old or the new one is whole there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a path to write to (default: ``.NAME.tmp`` beside ``path``), which takes the place of ``path`` at the end.

    The content is on the disk before it gets the name. After an error ``path`` is as it was and nothing else stays;
    a kill may leave the temporary file, which the next writer overwrites.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path, kind: str = "blake2b") -> str:
    """Return the digest of a file's content in hexadecimal; ``kind`` is one of hashlib's names."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
