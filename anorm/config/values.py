"""Values of a command line or a yaml, checked against the annotation of the argument that takes them."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

TRUTH = dict.fromkeys(("true", "yes", "on", "y"), True) | dict.fromkeys(("false", "no", "off", "n"), False)
"""YAML's words for true and false. Hydra reads the first of each itself; where a name is wanted all stay words."""
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    Path: "a path",
    list: "a list such as [a,b]",
    dict: "a mapping such as {a:1}",
    type(None): "null",
}
SEQUENCES = (list, tuple, collections.abc.Sequence)
MANY = {int: "whole numbers", float: "numbers", bool: "truth values", str: "words", Path: "paths"}


@dataclass(frozen=True)
class Option:
    """An argument of what is built: its annotation, ``Any`` where it has none, and its default. required: it has none."""

    hint: Any = Any
    default: Any = None
    required: bool = False


def options_of(called: Callable, hidden: Collection[str] = ()) -> dict[str, Option]:
    """Return the arguments of a function, a class or a ``functools.partial`` by name, but for ``hidden`` ones."""
    try:
        signature = inspect.signature(called, eval_str=True)
    except NameError:  # an annotation that only a type checker imports
        signature = inspect.signature(called)
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in hidden:
            hint = parameter.annotation
            default = None if parameter.default is parameter.empty else parameter.default
            found[name] = Option(
                Any if hint is parameter.empty or isinstance(hint, str) else hint,
                list(default) if isinstance(default, tuple) else default,
                parameter.default is parameter.empty,
            )
    return found


def checked(hint: Any, value: Any, path: str) -> Any:
    """Return ``value`` where one of the types in ``hint`` takes it: words for true and false as truth values.

    A whole number is taken where a number is asked for, and stays what it is. Raises ValueError with the key ``path``,
    the value and what is accepted.
    """
    accepted = alternatives(hint)
    if bool in accepted and isinstance(value, str) and value.lower() in TRUTH:
        return TRUTH[value.lower()]
    for kind in accepted:
        if _takes(kind, value):
            return _inside(kind, value, path)
    if isinstance(value, int) and not isinstance(value, bool) and (str in accepted or Path in accepted):
        return str(value)  # a folder may be called 2012
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        for kind in accepted:
            if kind is list or typing.get_origin(kind) is list:
                return _inside(kind, [value], path)
    shown = "null" if value is None else repr(value)
    raise ValueError(f"{path}={shown} must be {' or '.join(dict.fromkeys(map(_words, accepted)))}")


def as_word(hint: Any, value: Any, text: str) -> Any:
    """Return ``text``, what was typed, where Hydra read a number or a truth value and ``hint`` asks for a name alone.

    A folder may be called 2012, 007 or true.
    """
    accepted = alternatives(hint)
    names = any(kind in (str, Path) for kind in accepted)
    others = any(kind in (int, float, bool, Any) for kind in accepted)
    return text if names and not others and isinstance(value, (bool, int, float)) else value


def is_path(hint: Any, value: Any) -> bool:
    """Return whether a value is a path: its argument is annotated as one, and it is none of the words beside it."""
    kinds = alternatives(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    return Path in kinds and isinstance(value, (str, Path)) and value not in words


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for member in typing.get_args(hint) for kind in alternatives(member))
    return (hint,)


def _takes(kind: Any, value: Any) -> bool:
    """Return whether one type takes a value as it is; what is inside a list is checked by ``_inside``."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if kind in (None, type(None)):
        return value is None
    if origin is Literal:
        return value in members
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and not math.isnan(value)
    if kind is Path:
        return isinstance(value, (str, Path))
    if kind in SEQUENCES or origin in SEQUENCES:
        fixed = len(members) if origin is tuple and Ellipsis not in members else None
        return isinstance(value, (list, tuple)) and fixed in (None, len(value))
    if kind is dict or origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    if isinstance(kind, type) and kind is not type:
        return isinstance(value, kind)
    return True  # a type variable, a callable: whoever takes it knows


def _inside(kind: Any, value: Any, path: str) -> Any:
    """Return the value with the items of a list checked. Raises ValueError for an item, or for a word in doubt."""
    members = typing.get_args(kind)
    if isinstance(value, (list, tuple)):
        return [checked(members[0], v, f"{path}[{i}]") if members else v for i, v in enumerate(value)]
    if kind is Any and isinstance(value, str) and value.lower() in TRUTH:
        raise ValueError(
            f"{path}={value} is a word, and the argument does not say whether it takes one: give true or false"
        )
    return str(value) if isinstance(value, Path) else value


def _words(kind: Any) -> str:
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, members))
    if origin in SEQUENCES and members:
        many = MANY.get(members[0], "values")
        fixed = origin is tuple and Ellipsis not in members
        return f"a list of {f'{len(members)} ' if fixed else ''}{many}"
    if kind in SEQUENCES:
        kind = list
    if origin is dict:
        kind = dict
    return WORDS.get(kind) or getattr(kind, "__name__", str(kind))
