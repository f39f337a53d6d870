"""The command line: a command by its name, errors to messages and exit codes."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import signal
import sys
import traceback
from types import ModuleType
from typing import NoReturn

from jsonargparse import Namespace

from engine.trial import EngineError

DESCRIPTION = "Multi-fidelity neural architecture search with knowledge distillation."
# Each is a module of engine/commands; only the one that is called is imported.
COMMANDS = {
    "search": "start or continue a search; without options, a demo of minutes",
    "teacher": "train a teacher, or check one",
    "replay": "run search methods on a table of recorded results",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (docs/design.md lists them)."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command, values = parse(sys.argv[1:] if arguments is None else arguments)
        result = command.run(values)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        logging.getLogger(__name__).debug("internal error", exc_info=True)
        traceback.print_exc()
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result))
    return 0


def parse(arguments: list[str]) -> tuple[ModuleType, Namespace]:
    """The module of the command that is called, and its flags; exits with 2 where there is no such thing."""
    if not arguments:
        _refuse("no command given")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        _refuse(f"no command '{name}'" + (f"; did you mean {near[0]}?" if near else ""))
    command = importlib.import_module(f"engine.commands.{name}")
    parser = command.parser()
    parser.prog = f"cli.py {name}"
    return command, parser.parse_args(command.with_defaults(rest) if hasattr(command, "with_defaults") else rest)


def overview() -> str:
    """What `--help` prints: the commands, a line each."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    head = f"usage: cli.py COMMAND [options]\n\n{DESCRIPTION}\n\ncommands:"
    return "\n".join([head, *lines, "\ncli.py COMMAND --help lists the options of a command"])


def _refuse(message: str) -> NoReturn:
    print(f"cli.py: {message}\nSee cli.py --help", file=sys.stderr)
    raise SystemExit(2)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
