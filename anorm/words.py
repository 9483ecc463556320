"""The nearest known names to one that is not known, in words for an error message."""

from __future__ import annotations

import difflib
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
