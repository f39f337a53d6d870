"""From configuration classes to command-line flags and back: what the commands share."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import register_type

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


def command_parser(description: str) -> ArgumentParser:
    """The parser of a command: flags in full, and `-c` for a YAML file of them."""
    parser = Parser(usage="%(prog)s [options]", allow_abbrev=False, description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of flags; later ones win")
    return parser


def add_run_options(parser: ArgumentParser, run_dir: bool = True) -> None:
    """Where the run folder is, and what is shown."""
    group = parser.add_argument_group("This call")
    if run_dir:
        group.add_argument("--name", type=str, default="search", help="name of the run: its folder is runs/NAME")
        group.add_argument("--run-dir", type=str | None, default=None, help="run folder, instead of runs/NAME")
    group.add_argument(
        "--progress", type=Literal["auto", "bar", "lines", "none"], default="auto", help="what is shown on stderr"
    )


def run_folder(values: Namespace) -> Path:
    """The run folder that --run-dir or --name means."""
    return Path(values.run_dir) if values.run_dir else Path("runs") / values.name
