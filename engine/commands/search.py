"""`search`: start or continue a search."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_options, add_run_options, command_parser, gather_settings, run_dir_of
from engine.config import Budget, Resources, SearchConfig

EXAMPLES = """\
--data photos/ --space mobilenetv2:stem_stride=2 --name photos
--data photos/ --space mobilenetv2:stem_stride=2 --name photos --gpus 8     the same run, continued on eight GPUs
-c configs/cifar100-mobilenetv2.yaml --max-macs 60e6          the paper's setting, small networks only
-c my.yaml --dry-run                                          what it would cost here"""
DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def parser() -> ArgumentParser:
    """Flags of the command."""
    made = command_parser("Start or continue a search: the same command line continues it.", EXAMPLES)
    add_options(made, SearchConfig)
    add_options(made, Budget)
    add_options(made, Resources)
    group = add_run_options(made)
    group.add_argument(
        "--log",
        type=Literal["none", "tensorboard", "mlflow"],
        default="none",
        help="metrics also to event files in RUN/tensorboard, or to the MLflow server of MLFLOW_TRACKING_URI",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="start nothing: time a few steps here and print what it would cost"
    )
    return made


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
    """The result for people: the winner, what it took, and how well the cheap judgement ranked."""
    best, counts = result["winner"], result["evaluations"]
    tau = {name: "unknown (under 3 pairs)" if value is None else value for name, value in result["tau"].items()}
    return (
        f"winner {best['architecture']}: valid {best['valid_accuracy']:.4f}, test {best['test_accuracy']:.4f}, "
        f"{best['macs'] / 1e6:.2f} million MACs, {best['params']:,} parameters\n"
        f"            {counts['low']} low-fidelity and {counts['high']} full-fidelity evaluations, "
        f"{counts['failed']} failed; Kendall's tau with full fidelity: low fidelity {tau['low_vs_high']}, "
        f"MACs alone {tau['macs_vs_high']}" + _front(result.get("front", []))
    )


def _front(front: list[dict[str, Any]]) -> str:
    """A line for each network of a front."""
    lines = [f"{e['macs'] / 1e6:.2f} million MACs: {e['valid_accuracy']:.4f}, {e['architecture']}" for e in front]
    return "".join(f"\n            front {line}" for line in lines)


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """A search that is not told what to search runs the demo, on whatever device it is told to.

    `--low auto` is another word for `--pilot auto`.
    """
    if "--low=auto" in arguments:
        arguments = ["--pilot=auto" if word == "--low=auto" else word for word in arguments]
    elif "--low" in arguments and arguments[arguments.index("--low") + 1 :][:1] == ["auto"]:
        place = arguments.index("--low")
        arguments = [*arguments[:place], "--pilot", *arguments[place + 1 :]]
    settings = {"-c", "--config", "--help", "-h"}
    for kind in (SearchConfig, Budget):
        settings |= {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(kind)}
    given = {word.split("=")[0].split(".")[0] for word in arguments if word.startswith("-")}
    if given & settings:
        return arguments
    print(f"nothing to search given: the demo ({DEMO.name}); see search --help for your own data", file=sys.stderr)
    return ["-c", str(DEMO), *arguments]
