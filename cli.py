"""The command line: dispatches to a command, and turns errors into messages and exit codes."""

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

DESCRIPTION = """\
Finds the most accurate image classifier within your budget, cut from a pretrained network or from a search space of
your own: multi-fidelity neural architecture search with knowledge distillation."""
# A module of engine/commands each; only the one that is called is imported.
COMMANDS = {
    "search": "start or resume a search; without options, a demo of a few minutes",
    "submit": "write the batch script of a search for Slurm, PBS, LSF or Kubernetes, and submit it",
    "teacher": "train or check a teacher",
    "fidelity-study": "compare low fidelities on your data and space, and recommend one",
    "replay": "run search methods on a table of recorded results",
    "report": "write an HTML page and a CSV file about a run",
    "status": "show the progress of a run on one screen",
    "trials": "list, filter and sort the evaluations of a run",
    "explain": "explain why an architecture of a run was or was not trained in full",
    "export": "export the winner as safetensors, model.py, ONNX and torch.export, each verified",
    "train": "train one architecture in full, with the code that a search uses",
    "eval": "score weights, in all and at each class, on the validation split, the test split, or other data",
    "predict": "classify images with the network of a run or of an export",
    "latency": "time networks on another device, and predict the latency of all others",
    "space": "list, show, sample and check search spaces",
    "config": "print the settings of a search, and where each value came from",
    "doctor": "check this machine: versions, devices, kernels, data loader, file system",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (listed in docs/design.md)."""
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
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        traceback.print_exc()
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> tuple[ModuleType, Namespace]:
    """The module of the command that is called, and its flags; exits with 2 if there is no such command."""
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
        _refuse(f"'{name}' comes before the command; write: {program()} search {name} ...")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        _refuse(f"no command named '{name}'" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        command = importlib.import_module(f"engine.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise EnvironmentUnusable(
            f"the package {error.name} is not installed for {sys.executable}; run: make install; . .venv/bin/activate"
        ) from error
    parser = command.parser()
    parser.prog = f"{program()} {name}"
    if hasattr(command, "with_defaults"):
        rest = command.with_defaults(parser, rest)
    return command, parser.parse_args(rest)


def overview() -> str:
    """What `--help` prints: the commands, one per line."""
    lines = [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    head = f"usage: {program()} COMMAND [options]\n\n{DESCRIPTION}\n\ncommands:"
    tail = f"\n{program()} COMMAND --help lists the options of a command; {program()} --version prints the version."
    return "\n".join([head, *lines, tail])


def program() -> str:
    """The name that the user typed: `mfkd` if installed, `cli.py` in a checkout. Both are the same program."""
    return "mfkd" if Path(sys.argv[0]).name == "mfkd" else "cli.py"


def _refuse(message: str) -> NoReturn:
    print(f"{program()}: {message}\nSee {program()} --help", file=sys.stderr)
    raise SystemExit(2)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
