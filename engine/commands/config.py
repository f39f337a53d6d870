"""`config`: the resolved configuration of a search, and where each value came from."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from engine.commands import search
from engine.commands.flags import gather_settings
from engine.run_folder import write_atomically
from engine.trial import EnvironmentUnusable

with_defaults = search.with_defaults
OWN = ("config", "yaml", "json", "dry_run")  # say nothing of the search itself


def parser() -> ArgumentParser:
    """Flags of the command: those of `search`, and two of its own."""
    made = search.parser()
    made.description = (
        "Print the configuration that the same flags give a search, as YAML that -c reads, "
        "each value with where it came from: the default, a YAML file, or the command line."
    )
    made.add_argument("--yaml", type=str | None, default=None, help="write to this FILE instead of printing")
    made.add_argument("--json", action="store_true", help="print one JSON object: {key: {value, from}}")
    return made


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.setup import validated_space

    validated_space(gather_settings(values))
    found = list(origins(values))
    if values.json:
        return {key: {"value": None if value == inf else plain(value), "from": origin} for key, value, origin in found}
    text = as_yaml(found)
    if not values.yaml:
        print(text, end="")
        return None
    try:
        write_atomically(Path(values.yaml), text)
    except OSError as error:
        raise EnvironmentUnusable(f"--yaml {values.yaml} cannot be written: {error.strerror}") from error
    return None


def origins(values: Namespace) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, where it came from). A flag that repeats the value it overrides is passed over."""
    made = parser()
    layers = [("default", made.get_defaults())]
    for file in values.config or []:
        layers.append((str(file), made.parse_path(file, defaults=False, _skip_validation=True)))
    for key, value in values.items():
        if key in OWN:
            continue
        origin = "command line"
        for name, layer in layers:
            if key in layer:
                origin = name if layer[key] == value else "command line"
        yield key, value, origin


def as_yaml(found: list[tuple[str, Any, str]]) -> str:
    """A YAML document of dotted keys, sections nested, the origin of each value as a comment."""
    lines, section = [], ""
    for key, value, origin in found:
        head, dot, tail = key.rpartition(".")
        if dot and head != section:
            lines.append(f"{head}:")
        section = head
        scalar = yaml.safe_dump(plain(value), width=10_000).splitlines()[0]
        lines.append(f"{'  ' if dot else ''}{f'{tail}: {scalar}':<40}{'' if dot else '  '}  # {origin}")
    return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Fraction) else value
