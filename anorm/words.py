"""Names in words: the nearest known ones to one that is not known, and files' names that any text takes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], what: str = "known") -> str:
    """': did you mean ...? (known: ...)' for the end of an error message.

    Few names are all listed; of many, only the near ones.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = near or [other for other in known if other.lower() == name.lower()]
    if not near:
        near = [other for other in known if name and (name in other or other in name)][:3]
    question = f"did you mean {' or '.join(near)}? " if near else ""
    listing = f"({what}: {', '.join(known)})" if len(known) <= 24 else ""
    return f": {question}{listing}".rstrip(" :") if question or listing else ""


def printable(name: str | os.PathLike) -> str:
    """Return a file's name or path as text that every terminal, log and file takes; ordinary names stay as they are.

    Bytes that are not UTF-8, line ends and control characters appear as escapes (caf\\xe9.JPEG): any byte may stand in
    a name, and encoding such a name, or splitting a list of names at its lines, fails long after the file was listed.
    """
    name = os.fspath(name)
    if name.isprintable():  # which a byte that is not UTF-8 is not
        return name
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
