"""From configuration classes to command-line flags and back: what the commands share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

from engine.config import Resources
from engine.trial import Fidelity


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(f"{text} divides by zero") from None


register_type(Fraction, serializer=str, deserializer=_fraction)

FIDELITY_HELP = {
    "fraction": "part of the training images, like 1/27",
    "epochs": "passes over that part",
    "width": "width multiplier of the networks",
    "resolution": "pixels; 0 is the data's own",
    "kd_loss": "distillation terms beside the cross entropy",
}


METAVARS: dict[Any, str] = {int: "N", float: "X", Fraction: "P/Q"}


class Manual(DefaultHelpFormatter):
    """Help as text and default; the types are seen from the text, the default, or the choices."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        silent = any(action.default is none for none in (None, "", argparse.SUPPRESS))
        if silent or not action.option_strings or action.nargs == 0:
            return text
        return f"{text} (default: {'no limit' if action.default == math.inf else '%(default)s'})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = action.type or getattr(action, "_typehint", None)
        return METAVARS[kind] if kind in METAVARS else super()._get_default_metavar_for_optional(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Descriptions and examples keep their lines."""
        return "\n".join(indent + line for line in text.splitlines())


class Parser(ArgumentParser):
    """An argument parser that names the nearest flag when it refuses one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with the way out, and exits with 2."""
        known = [option for action in self._actions for option in action.option_strings]
        keys = {option.lstrip("-").replace("-", "_"): option for option in known}
        for word in re.findall(r"(?:unrecognized arguments: --|option '|key ')([\w.-]+)", message, re.IGNORECASE):
            near = difflib.get_close_matches(word.replace("-", "_"), keys, n=1, cutoff=0.7)
            if near:
                message = f"{message}; did you mean {keys[near[0]]}?"
        print(f"{self.prog}: {message}\nSee {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_options(parser: ArgumentParser, kind: type, skip: tuple[str, ...] = ()) -> None:
    """A flag for each field of a configuration class: name, type, default and help come from the field."""
    hints = get_type_hints(kind)
    group = parser.add_argument_group((kind.__doc__ or kind.__name__).split(".")[0])
    for item in dataclasses.fields(kind):
        if item.name in skip:
            continue
        flag = item.name.replace("_", "-")
        if hints[item.name] is not Fidelity:
            text = item.metadata["help"]
            group.add_argument(f"--{flag}", type=hints[item.name], default=item.default, help=text)
            continue
        fidelity_hints = get_type_hints(Fidelity)
        for name, text in FIDELITY_HELP.items():
            group.add_argument(
                f"--{flag}.{name.replace('_', '-')}",
                type=fidelity_hints[name],
                default=getattr(item.default, name),
                help=f"{flag} fidelity: {text}",
            )


def gather(kind: Callable[..., Any], values: Namespace) -> Any:
    """A configuration object from parsed flags."""
    arguments = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = values.get(item.name, item.default)
        arguments[item.name] = Fidelity(item.name, **vars(value)) if isinstance(value, Namespace) else value
    return kind(**arguments)


def command_parser(description: str, examples: str = "") -> ArgumentParser:
    """The parser of a command: flags in full, and `-c` for a YAML file of them. `examples` are lines of arguments."""
    parser = Parser(
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description=description,
        epilog="\n".join(["examples:", *(f"  %(prog)s {line}" for line in examples.splitlines())] if examples else []),
        formatter_class=Manual,
        print_config=None,  # `config` does that
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of flags; later ones win")
    return parser


def add_run_options(parser: ArgumentParser, run_dir: bool = True) -> Any:
    """Where the run folder is, and what is shown; returns the group of these flags."""
    group = parser.add_argument_group("This call")
    if run_dir:
        group.add_argument("--name", type=str, default="search", help="name of the run: its folder is runs/NAME")
        group.add_argument("--run-dir", type=str | None, default=None, help="run folder, instead of runs/NAME")
    group.add_argument(
        "--progress",
        type=Literal["auto", "bar", "lines", "none"],
        default="auto",
        help="what is shown on stderr; auto is bars on a terminal and lines elsewhere",
    )
    group.add_argument(
        "-q",
        "--quiet",
        dest="progress",
        action="store_const",
        const="none",
        default="auto",
        help="nothing on stderr but errors: --progress none",
    )
    group.add_argument(
        "-v", "--verbose", action="store_true", help="also show what libraries log, and where an error came from"
    )
    return group


def add_run_argument(parser: ArgumentParser) -> None:
    """The run that a command looks into, as its first word."""
    parser.usage = "%(prog)s RUN [options]"
    parser.add_argument("run", metavar="RUN", type=str, help="run folder, or a name under runs/")


def add_device_option(parser: ArgumentParser) -> None:
    """The device, for commands that need one worker only."""
    add_options(parser, Resources, skip=tuple(f.name for f in dataclasses.fields(Resources) if f.name != "device"))


def run_folder(values: Namespace) -> Path:
    """The run folder that --run-dir or --name means."""
    return Path(values.run_dir) if values.run_dir else Path("runs") / values.name
