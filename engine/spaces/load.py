"""Search spaces by the name that a command line gives: built in, or from a user's file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from engine.space import SearchSpace
from engine.spaces import SPACES
from engine.trial import UsageError


def load_space(spec: str) -> SearchSpace:
    """The space that a command line names: `NAME`, `NAME:option=value,...`, or `FILE.py:NAME`.

    NAME is a module of engine.spaces, whose function of the same name makes the space from its options; in a
    user's file NAME is a SearchSpace or a function that returns one.
    """
    head, _, tail = spec.partition(":")
    if head.endswith(".py"):
        return _from_file(Path(head), tail)
    if head not in SPACES:
        raise UsageError(f"no space '{head}'; built in are {', '.join(sorted(SPACES))}, your own is FILE.py:NAME")
    make = SPACES[head]
    parameters = inspect.signature(make).parameters
    options: dict[str, Any] = {}
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        if key not in parameters:
            raise UsageError(f"space {head} has no option '{key}'; it has {', '.join(parameters)}")
        kind = type(parameters[key].default)
        try:
            options[key] = kind(value)
        except ValueError:
            raise UsageError(f"space {head}: {key}={value!r} is not {kind.__name__}") from None
    return make(**options)


def _from_file(path: Path, name: str) -> SearchSpace:
    found = from_file(path, name)
    if callable(found) and not isinstance(found, SearchSpace):
        found = found()
    if not isinstance(found, SearchSpace):
        raise UsageError(f"{path} has no SearchSpace called '{name}', nor a function that returns one")
    return found


def from_file(path: Path, name: str) -> Any:
    """What a user's Python file calls `name`, None where it has no such name. Runs the file.

    Raises UsageError where there is no such file, or it cannot be run.
    """
    if not path.is_file():
        raise UsageError(f"no file {path}; your own is named FILE.py:NAME")
    if not name:
        raise UsageError(f"say which name of {path} is meant: {path}:NAME")
    spec = importlib.util.spec_from_file_location(f"{path.absolute()}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for what the file defines
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UsageError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return getattr(module, name, None)
