"""Loads search spaces by name: built-in ones, and those in a user's file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from engine.shipped import shipped
from engine.space import SearchSpace
from engine.spaces import SPACES
from engine.trial import UsageError


def load_space(spec: str) -> SearchSpace:
    """The space that `NAME`, `NAME:option=value,...` or `FILE.py:NAME` specifies.

    A built-in NAME is a key of engine.spaces.SPACES, whose function takes the options; those without a default come
    first and without a name: `pretrained:NETWORK,option=value`. In a user's file, NAME is a SearchSpace or a function
    that returns one. Raises UsageError for anything else.
    """
    head, _, tail = spec.partition(":")
    if head.endswith(".py"):
        return _from_file(Path(head), tail)
    if head not in SPACES:
        raise UsageError(f"no space named '{head}'; choose from {', '.join(sorted(SPACES))}, or give FILE.py:NAME")
    make = SPACES[head]
    parameters = inspect.signature(make).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    given = list(filter(None, tail.split(",")))
    if len(given) < len(required):
        raise UsageError(f"space {head} needs a {required[0]}: {head}:{required[0].upper()}")
    options: dict[str, Any] = dict(zip(required, given, strict=False))
    for pair in given[len(required) :]:
        key, _, value = pair.partition("=")
        if key not in parameters:
            raise UsageError(f"space {head} has no option '{key}'; it has {', '.join(parameters)}")
        kind = type(parameters[key].default)
        try:
            options[key] = kind(value)
        except ValueError:
            word = "whole number" if kind is int else "number"
            raise UsageError(f"space {head}: {key}={value!r} is not a {word}") from None
    return make(**options)


def _from_file(path: Path, name: str) -> SearchSpace:
    found = from_file(path, name)
    if callable(found) and not isinstance(found, SearchSpace):
        found = found()
    if not isinstance(found, SearchSpace):
        raise UsageError(f"{path} has no SearchSpace named '{name}', and no function of that name that returns one")
    return found


def from_file(path: Path, name: str) -> Any:
    """Runs a user's Python file, or an example of ours, and returns the value of `name` in it; None if there is none.

    Raises UsageError if there is no such file, or it fails.
    """
    path = shipped(path)
    if not path.is_file():
        raise UsageError(f"no file {path}; your own code is given as FILE.py:NAME")
    if not name:
        raise UsageError(f"give a name defined in {path}: {path}:NAME")
    spec = importlib.util.spec_from_file_location(f"{path.absolute()}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of a class here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise UsageError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    return getattr(module, name, None)
