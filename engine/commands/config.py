"""`config`: the settings of a search, and where each value came from."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from engine.commands import search
from engine.commands.flags import Parser, example_text, gather_settings, recipe_defaults
from engine.run_folder import write_atomically
from engine.trial import EnvironmentUnusable

EXAMPLES = """\
-c configs/cifar100-mobilenetv2.yaml --max-high 10
--data photos/ --low.fraction 1/27 --yaml photos.yaml"""
EVERYDAY = (*search.EVERYDAY, "yaml", "json")
with_defaults = search.with_defaults
OWN = ("config", "yaml", "json", "dry_run")  # not settings of the search


def parser() -> Parser:
    """Flags of the command: those of `search`, --yaml and --json."""
    parser = search.parser()
    parser.description = (
        "Print the settings that `search` would have with the same flags, as YAML for -c, with the origin of each "
        "value: the default, a YAML file, or the command line."
    )
    parser.epilog = example_text(EXAMPLES)
    parser.show_everyday(*EVERYDAY)
    parser.add_argument(
        "--yaml", type=str | None, default=None, help="write the YAML to this FILE instead of printing it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: {key: {value, from}}")
    return parser


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.setup import validated_space

    validated_space(gather_settings(values))
    settings = list(origins(values))
    if values.json:
        return {
            key: {"value": None if value == inf else yaml_value(value), "from": origin}
            for key, value, origin in settings
        }
    text = as_yaml(settings)
    if not values.yaml:
        print(text, end="")
        return None
    try:
        write_atomically(Path(values.yaml), text)
    except OSError as error:
        raise EnvironmentUnusable(f"--yaml {values.yaml} cannot be written: {error.strerror}") from error
    return None


def origins(values: Namespace) -> Iterator[tuple[str, Any, str]]:
    """Dotted key, value and origin of each setting. A flag that repeats the value it overrides changes no origin."""
    flags = parser()
    layers: list[tuple[str, Any]] = [("default", flags.get_defaults())]
    recipe = recipe_defaults(flags, values)
    if recipe:
        layers.append(("recipe", Namespace(recipe)))
    for file in values.config or []:
        layers.append((str(file), flags.parse_path(file, defaults=False, _skip_validation=True)))
    for key, value in values.items():
        if key in OWN:
            continue
        origin = "command line"
        for name, layer in layers:
            if key in layer:
                origin = name if layer[key] == value else "command line"
        yield key, value, origin


def as_yaml(settings: list[tuple[str, Any, str]]) -> str:
    """Settings as YAML, dotted keys as sections, with the origin of each value as a comment."""
    lines, section = [], ""
    for key, value, origin in settings:
        head, dot, tail = key.rpartition(".")
        if dot and head != section:
            lines.append(f"{head}:")
        section = head
        scalar = yaml.safe_dump(yaml_value(value), width=10_000).splitlines()[0]
        lines.append(f"{'  ' if dot else ''}{f'{tail}: {scalar}':<40}{'' if dot else '  '}  # {origin}")
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> Any:
    return str(value) if isinstance(value, Fraction) else value
