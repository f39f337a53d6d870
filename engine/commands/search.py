"""`search`: starts or resumes a search."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_options, add_run_options, command_parser, gather_settings, run_dir_of
from engine.config import Budget, Resources, SearchConfig

EXAMPLES = """\
# search on your own images, then resume on eight GPUs
--data photos/ --space mobilenetv2:stem_stride=2 --name photos
--data photos/ --space mobilenetv2:stem_stride=2 --name photos --gpus 8
# the paper's setting, restricted to small networks
-c configs/cifar100-mobilenetv2.yaml --max-macs 60e6
# estimate the cost on this machine
-c my.yaml --dry-run"""
DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser("Start a search. Run the same command again to resume it.", EXAMPLES)
    add_options(parser, SearchConfig)
    add_options(parser, Budget)
    for flag, dest, text in (
        ("--no-final", "final_training", "neither train the winner once more nor the baselines"),
        ("--no-baselines", "baselines", "train no baselines"),
    ):
        short = f"{text}: --{dest.replace('_', '-')} never"
        parser.add_argument(flag, dest=dest, action="store_const", const="never", default="auto", help=short)
    add_options(parser, Resources)
    group = add_run_options(parser)
    group.add_argument(
        "--log",
        type=Literal["none", "tensorboard", "mlflow"],
        default="none",
        help="also log metrics to event files in RUN/tensorboard, or to the MLflow server of MLFLOW_TRACKING_URI",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="do not search: time a few steps on this machine and print what the search would cost",
    )
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.dry_run import dry_run
    from engine.search.fidelity_study.study import study_before_search
    from engine.search.progress import Display
    from engine.search.search import search

    settings, run_dir = gather_settings(values), run_dir_of(values)
    with Display(values.progress) as display:
        if values.dry_run:
            return dry_run(settings, run_dir, display)
        if settings.config.fidelity_study == "auto":
            settings = study_before_search(settings, run_dir, display)
        result = search(settings, run_dir, display, values.log)
        display.say(summary(result))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result for people: the winner, the evaluations, and how well the low fidelity ranked."""
    best, counts, final = result["winner"], result["evaluations"], result["final"]
    tau = {name: "unknown (fewer than 3 pairs)" if value is None else value for name, value in result["tau"].items()}
    searched = f"valid {_accuracy(best, 'valid')}, test {_accuracy(best, 'test')}"
    finished = f"\n            after its final training of {final['epochs']} epochs: test" if final else ""
    rows = [f"\n            baseline {_baseline(row)}" for row in result["baselines"]]
    return (
        f"winner {best['architecture']}: {searched}, "
        f"{best['macs'] / 1e6:.2f} million MACs, {best['params']:,} parameters"
        + (f"{finished} {_accuracy(final, 'test')}" if final else "")
        + "".join(rows)
        + (f"\n            {result['verdict']}" if result["verdict"] else "")
        + (f"\n            {counts['inherited']} scored with inherited weights" if "inherited" in counts else "")
        + f"\n            {counts['low']} low-fidelity and {counts['high']} full-fidelity evaluations, "
        f"{counts['failed']} failed; Kendall's tau with full fidelity: low fidelity {tau['low_vs_high']}, "
        f"MACs alone {tau['macs_vs_high']}" + _front(result["front"], result["front_cost"])
    )


def _accuracy(row: dict[str, Any], split: str) -> str:
    return f"{row[f'{split}_accuracy']:.4f} +- {row[f'{split}_standard_error']:.4f}"


def _baseline(row: dict[str, Any]) -> str:
    """A baseline in one line, with its test accuracy and cost."""
    network = f" ({row['architecture']})" if "architecture" in row else ""
    if "test_accuracy" not in row:
        return f"{row['name']}{network}: {row['status']}: {row['error']}"
    size = f", {row['macs'] / 1e6:.2f} million MACs" if row["macs"] else ""
    return f"{row['name']}{network}: test {_accuracy(row, 'test')}{size}"


def _front(front: list[dict[str, Any]], cost: str) -> str:
    """One line for each network of the front."""
    from engine.search.front import COSTS, in_unit

    sizes = [f"{in_unit(one[cost], cost)} {COSTS[cost][0]}" for one in front]
    lines = [f"valid {_accuracy(one, 'valid')}, {one['architecture']}" for one in front]
    return "".join(f"\n            front {size}: {line}" for size, line in zip(sizes, lines, strict=True))


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The command line with --low auto spelled out, and with the demo's settings if it has no settings of its own.

    `--low auto` is short for `--fidelity-study auto`.
    """
    if "--low=auto" in arguments:
        arguments = ["--fidelity-study=auto" if word == "--low=auto" else word for word in arguments]
    elif "--low" in arguments and arguments[arguments.index("--low") + 1 :][:1] == ["auto"]:
        place = arguments.index("--low")
        arguments = [*arguments[:place], "--fidelity-study", *arguments[place + 1 :]]
    settings = {"-c", "--config", "--help", "-h"}
    for kind in (SearchConfig, Budget):
        settings |= {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(kind)}
    given = {word.split("=")[0].split(".")[0] for word in arguments if word.startswith("-")}
    if given & settings:
        return arguments
    parser.parse_args(arguments)  # a misspelt setting is an error, not a call for the demo
    print(f"no settings given: running the demo ({DEMO.name}); see search --help for your own data", file=sys.stderr)
    return ["-c", str(DEMO), *arguments]
