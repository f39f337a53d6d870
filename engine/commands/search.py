"""`search`: starts or resumes a search."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import Parser, add_options, add_run_options, command_parser, gather_settings, run_dir_of
from engine.config import Budget, Resources, SearchConfig
from engine.search.comparison import with_error
from engine.shipped import shipped

EXAMPLES = """\
# the demo: cuts a pretrained network on photos that come with it, in minutes

# what a search on your own photos would cost here, then the search
--data photos/ --space pretrained:timm:tf_efficientnet_lite0 --resolution 112 --max-macs 30e6 --name photos --dry-run
--data photos/ --space pretrained:timm:tf_efficientnet_lite0 --resolution 112 --max-macs 30e6 --name photos
# the most accurate network at every latency
--data photos/ --space pretrained:timm:tf_efficientnet_lite0 --objectives accuracy,latency --name front
# the paper's search, from scratch, on eight GPUs
-c configs/cifar100-mobilenetv2.yaml --gpus 8"""
# The flags that --help shows.
EVERYDAY = (
    *("space", "data", "resolution", "teacher", "low.epochs", "high.epochs", "max-macs", "max-latency-ms"),
    *("objectives", "max-low", "max-high", "wall-time", "device", "gpus", "workers"),
    *("name", "log", "dry-run", "quiet", "verbose"),
)
DEMO = "configs/demo.yaml"


def parser() -> Parser:
    """Flags of the command."""
    parser = command_parser("Start a search. Run the same command again to resume it.", EXAMPLES)
    parser.show_everyday(*EVERYDAY)
    add_options(parser, SearchConfig)
    add_options(parser, Budget)
    for flag, dest, text in (
        ("--no-final", "final_training", "neither train the winner once more nor the baselines"),
        ("--no-baselines", "baselines", "train no baselines"),
    ):
        short = f"{text}; short for --{dest.replace('_', '-')} never"
        parser.add_argument(flag, dest=dest, action="store_const", const="never", default="auto", help=short)
    add_options(parser, Resources)
    group = add_run_options(parser)
    group.add_argument(
        "--log",
        type=Literal["none", "tensorboard", "mlflow"],
        default="none",
        help="where to log metrics too; tensorboard writes event files to RUN/tensorboard, mlflow sends to the server "
        "of MLFLOW_TRACKING_URI",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="only time a few steps here, and print what the search would cost",
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
    """The result for people: the winner beside the networks it is compared with, and how well low fidelity ranked."""
    best, counts = result["winner"], result["evaluations"]
    tau = {name: "unknown (fewer than 3 pairs)" if value is None else value for name, value in result["tau"].items()}
    return "\n".join(
        [
            f"winner {best['architecture']}: valid {_accuracy(best, 'valid')}, test {_accuracy(best, 'test')}, "
            f"{best['macs'] / 1e6:.2f} million MACs, {best['params']:,} parameters",
            *_table(result["final"], result["baselines"]),
            *([result["verdict"]] if result["verdict"] else []),
            *([f"{counts['inherited']} networks scored with inherited weights"] if "inherited" in counts else []),
            f"{counts['low']} low-fidelity and {counts['high']} full-fidelity evaluations, {counts['failed']} failed; "
            f"Kendall's tau with full fidelity: low fidelity {tau['low_vs_high']}, MACs alone {tau['macs_vs_high']}",
            _front(result["front"], result["front_cost"]),
        ]
    )


def _accuracy(row: dict[str, Any], split: str) -> str:
    return f"{with_error(row[f'{split}_accuracy'], row[f'{split}_standard_error'])} %"


def _table(final: dict[str, Any] | None, baselines: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of the networks that were trained to the end; none if the winner was not."""
    if final is None:
        return []
    rows = [("after the last training", "test accuracy", "winner's lead", "million MACs", "parameters")]
    for row in [{"name": "the winner", **final}, *baselines]:
        if "test_accuracy" not in row:
            rows.append((row["name"], row["status"], "", "", ""))
            continue
        compared = "difference" in row  # the winner is not compared with itself
        gap = with_error(row["difference"], row["difference_standard_error"], sign="+") if compared else ""
        size = (f"{row['macs'] / 1e6:.2f}", f"{row['params']:,}") if row["macs"] else ("", "")
        rows.append((row["name"], _accuracy(row, "test"), gap, *size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name, *others = widths
    return [f"  {row[0]:{name}}  " + "  ".join(map(str.rjust, row[1:], others)) for row in rows]


def _front(front: list[dict[str, Any]], cost: str) -> str:
    from engine.search.front import COSTS

    unit, _ = COSTS[cost]
    return f"{len(front)} on the front of accuracy and {unit}: see trials --front; export --front exports all of it"


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The command line with --low auto spelled out, and with the demo's settings if it has no settings of its own.

    `--low auto` is short for `--fidelity-study auto`.
    """
    if "--low=auto" in arguments:
        arguments = ["--fidelity-study=auto" if word == "--low=auto" else word for word in arguments]
    elif "--low" in arguments and arguments[arguments.index("--low") + 1 :][:1] == ["auto"]:
        place = arguments.index("--low")
        arguments = [*arguments[:place], "--fidelity-study", *arguments[place + 1 :]]
    settings = {"-c", "--config", "--help", "--help-all", "-h"}
    for kind in (SearchConfig, Budget):
        settings |= {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(kind)}
    given = {word.split("=")[0].split(".")[0] for word in arguments if word.startswith("-")}
    if given & settings:
        return arguments
    parser.parse_args(arguments)  # a misspelt setting is an error, not a call for the demo
    demo = shipped(DEMO)
    print(f"no settings given: running the demo ({demo.name}); see search --help for your own data", file=sys.stderr)
    return ["-c", str(demo), *arguments]
