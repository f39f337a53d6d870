"""The command line: flags to configuration, one function per command, errors to messages and exit codes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from engine.config import Budget, Resources, Study
from engine.trial import EngineError, Fidelity, UsageError

DEMO = Path(__file__).parent / "configs" / "demo.yaml"
DESCRIPTION = "Multi-fidelity neural architecture search with knowledge distillation."


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
        # A parser of commands, which reports what a configuration file gets wrong, knows the flags of all of them.
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        known = [option for parser in parsers for action in parser._actions for option in action.option_strings]
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
    parser = Parser(usage="%(prog)s [options]", allow_abbrev=False, description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of flags; later ones win")
    return parser


def search_parser() -> ArgumentParser:
    parser = command_parser("Start or continue a search: the same command line continues it.")
    add_options(parser, Study)
    add_options(parser, Budget)
    add_options(parser, Resources)
    _add_run_options(parser)
    return parser


def teacher_parser() -> ArgumentParser:
    parser = command_parser("Train a teacher on a data set and save it, or check one against a data set.")
    networks = "auto (the largest of the space), an ARCHITECTURE of it, or torchvision:NAME"
    parser.add_argument("--arch", type=str, default="auto", help=networks)
    parser.add_argument("--out", type=str, default="teacher.safetensors", help="file to write")
    parser.add_argument("--check", type=str | None, default=None, help="only check that this FILE fits --data")
    add_options(parser, Study, skip=("teacher", "low", "high", "method", "max_macs", "max_params"))
    add_options(parser, Resources)
    _add_run_options(parser, run_dir=False)
    return parser


REPLAY_HELP = {
    "table": "CSV of recorded results (docs/surrogate.md has its form; two published ones are read as they are)",
    "method": "methods, joined by commas",
    "low": "low fidelities of the table to offer, joined by commas, the main one first; all by default",
    "workers": "simulated workers",
    "gpu_hours": "worker-hours of each run",
    "at": "worker-hours at which accuracies are printed, joined by commas",
    "seeds": "runs of each method",
    "max_low": "low-fidelity evaluations of a run, at most",
    "min_macs": "leave out architectures with fewer MACs; 0 is no limit",
    "max_macs": "leave out architectures with more MACs; 0 is no limit",
    "max_params": "leave out architectures with more parameters; 0 is no limit",
    "noise": "standard deviation of one full run around the recorded one, in points",
    "until_best": "end a run when the best architecture has been trained",
    "processes": "processes that run replays; 0 is one per core",
    "out": "folder for curves.csv, curves.png, summary.json, and finished runs: the same line goes on from them",
}


def replay_parser() -> ArgumentParser:
    from engine.replay import Replay

    parser = command_parser("Run search methods on a table of recorded results with a simulated clock.")
    defaults: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(Replay)}
    parser.add_argument("--table", type=str, required=True, help=REPLAY_HELP["table"])
    parser.add_argument("--method", type=str, default=",".join(defaults["methods"]), help=REPLAY_HELP["method"])
    parser.add_argument("--low", type=str, default="", help=REPLAY_HELP["low"])
    parser.add_argument("--at", type=str, default=",".join(f"{h:g}" for h in defaults["at"]), help=REPLAY_HELP["at"])
    parser.add_argument("--out", type=str | None, default=None, help=REPLAY_HELP["out"])
    for name in REPLAY_HELP:
        if name not in defaults or name in ("table", "at", "out"):
            continue
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(defaults[name]), default=defaults[name], help=REPLAY_HELP[name])
    return parser


def run_replay(values: Namespace) -> dict[str, Any]:
    from engine.replay import Replay, replay

    def words(text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())

    try:
        at = tuple(float(word) for word in words(values.at))
    except ValueError:
        raise UsageError(f"--at {values.at}: write hours joined by commas, like 15,20,60") from None
    given = {name: values[name] for name in vars(values).keys() & {f.name for f in dataclasses.fields(Replay)}}
    given |= {"table": Path(values.table), "methods": words(values.method), "lows": words(values.low), "at": at}
    return replay(Replay(**given | {"out": Path(values.out) if values.out else None}))


def _add_run_options(parser: ArgumentParser, run_dir: bool = True) -> None:
    group = parser.add_argument_group("This call")
    if run_dir:
        group.add_argument("--name", type=str, default="search", help="name of the run: its folder is runs/NAME")
        group.add_argument("--run-dir", type=str | None, default=None, help="run folder, instead of runs/NAME")
    group.add_argument(
        "--progress", type=Literal["auto", "bar", "lines", "none"], default="auto", help="what is shown on stderr"
    )


def run_search(values: Namespace) -> dict[str, Any]:
    from engine.progress import Display
    from engine.search import search

    study, budget, resources = gather(Study, values), gather(Budget, values), gather(Resources, values)
    run_dir = Path(values.run_dir) if values.run_dir else Path("runs") / values.name
    with Display(values.progress) as show:
        result = search(study, budget, resources, run_dir, show)
        show.say(summary(result))
    return result


def run_teacher(values: Namespace) -> dict[str, Any]:
    from engine.progress import Display
    from engine.search import make_teacher

    if values.check and not Path(values.check).is_file():
        raise UsageError(f"no teacher file {values.check}")
    study, resources = gather(Study, values), gather(Resources, values)
    with Display(values.progress) as show:
        return make_teacher(study, values.arch, resources, Path(values.check or values.out), show)


def summary(result: dict[str, Any]) -> str:
    """The result for people: the winner, what it took, and how well the cheap judgement ranked."""
    best, counts = result["winner"], result["evaluations"]
    tau = {name: "unknown (under 3 pairs)" if value is None else value for name, value in result["tau"].items()}
    return (
        f"winner {best['architecture']}: valid {best['valid_accuracy']:.4f}, test {best['test_accuracy']:.4f}, "
        f"{best['macs'] / 1e6:.2f} million MACs, {best['params']:,} parameters\n"
        f"            {counts['low']} low-fidelity and {counts['high']} full-fidelity evaluations, "
        f"{counts['failed']} failed; Kendall's tau with full fidelity: low fidelity {tau['low_vs_high']}, "
        f"MACs alone {tau['macs_vs_high']}"
    )


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], dict[str, Any]]]] = {
    "search": (search_parser, run_search),
    "teacher": (teacher_parser, run_teacher),
    "replay": (replay_parser, run_replay),
}


def parse(arguments: list[str] | None) -> Namespace:
    parser = Parser(prog="cli.py", usage="%(prog)s COMMAND [options]", allow_abbrev=False, description=DESCRIPTION)
    commands = parser.add_subcommands(dest="command")
    for name, (make, _) in COMMANDS.items():
        commands.add_subcommand(name, make())
    return parser.parse_args(with_demo(sys.argv[1:] if arguments is None else arguments))


def with_demo(arguments: list[str]) -> list[str]:
    """A search that is not told what to search runs the demo, on whatever device it is told to."""
    settings = {"-c", "--config", "--help", "-h"}
    for kind in (Study, Budget):
        settings |= {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(kind)}
    given = {word.split("=")[0].split(".")[0] for word in arguments[1:] if word.startswith("-")}
    if arguments[:1] == ["search"] and not given & settings:
        print(f"nothing to search given: the demo ({DEMO.name}); see search --help for your own data", file=sys.stderr)
        return ["search", "-c", str(DEMO), *arguments[1:]]
    return arguments


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (docs/design.md lists them)."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        values = parse(arguments)
        result = COMMANDS[values.command][1](values[values.command])
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
    print(json.dumps(result))
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
