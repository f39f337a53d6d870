"""The command line: a command by its name, errors to messages and exit codes."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from engine import __version__
from engine.trial import Drained, EngineError, EnvironmentUnusable, WrongFlags

if TYPE_CHECKING:
    from jsonargparse import Namespace

DESCRIPTION = "Multi-fidelity neural architecture search with knowledge distillation."
# Each is a module of engine/commands; only the one that is called is imported.
COMMANDS = {
    "search": "start or continue a search; without options, a demo of minutes",
    "submit": "write the batch script of a search, for Slurm, PBS, LSF or Kubernetes, and hand it in",
    "teacher": "train a teacher, or check one",
    "fidelity-study": "which cheap judgement to search with: a study on your own data and space",
    "replay": "run search methods on a table of recorded results",
    "report": "one HTML page and one CSV file about a run",
    "status": "one screen about a run, while it runs or after it",
    "trials": "the evaluations of a run: list, filter, sort, CSV",
    "explain": "why an architecture of a run was trained in full, or was not",
    "export": "the winner as safetensors, model.py, ONNX, torch.export, each checked, with a model card",
    "train": "one architecture in full, by the code that a search uses",
    "eval": "the accuracy of weights on the validation or test part, or on another data set",
    "space": "list, show, sample search spaces; check one of your own",
    "config": "the resolved configuration of a search, and where each value came from",
    "doctor": "what this machine has and lacks: versions, devices, kernel, loader and file-system tests",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (docs/design.md lists them)."""
    signal.signal(signal.SIGTERM, _terminate)
    words = sys.argv[1:] if arguments is None else arguments
    verbose = False
    try:
        command, values = parse(words)
        verbose = values.get("verbose", False)
        if verbose:
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        result = command.run(values)
        if result is not None:
            print(json.dumps(result))
        sys.stdout.flush()
    except EngineError as error:
        if verbose:
            traceback.print_exc()
        print(f"{program()} {words[0]}: {error}", file=sys.stderr)
        if isinstance(error, WrongFlags):
            print(f"See {program()} {words[0]} --help", file=sys.stderr)
        if isinstance(error, Drained) and error.result is not None:
            print(json.dumps(error.result))
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output, like head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        traceback.print_exc()
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> tuple[ModuleType, Namespace]:
    """The module of the command that is called, and its flags; exits with 2 where there is no such thing."""
    if not arguments:
        _refuse("no command given")
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if name == "--version":
        print(f"mfkd {__version__}")
        raise SystemExit(0)
    if name.startswith("-"):
        _refuse(f"'{name}' comes before a command; write it like: {program()} search {name} ...")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        _refuse(f"no command '{name}'" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        command = importlib.import_module(f"engine.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise EnvironmentUnusable(
            f"the package {error.name} is not installed for {sys.executable}; "
            "run: make install; . .venv/bin/activate"
        ) from error
    parser = command.parser()
    parser.prog = f"{program()} {name}"
    if hasattr(command, "with_defaults"):
        rest = command.with_defaults(parser, rest)
    return command, parser.parse_args(rest)


def overview() -> str:
    """What `--help` prints: the commands, a line each."""
    lines = [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    head = f"usage: {program()} COMMAND [options]\n\n{DESCRIPTION}\n\ncommands:"
    return "\n".join([head, *lines, f"\n{program()} COMMAND --help is the manual of a command; --version"])


def program() -> str:
    """What the user typed: `mfkd` where it is installed, `cli.py` in a checkout; the same program."""
    return "mfkd" if Path(sys.argv[0]).name == "mfkd" else "cli.py"


def _refuse(message: str) -> NoReturn:
    print(f"{program()}: {message}\nSee {program()} --help", file=sys.stderr)
    raise SystemExit(2)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
