"""`fidelity-study`: compares low fidelities on the user's own data and space, and recommends one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jsonargparse import Namespace

from engine.commands.flags import Parser, add_options, add_run_options, command_parser, gather_settings, run_dir_of
from engine.config import Budget, Resources, SearchConfig

EXAMPLES = """\
# compare four low fidelities on your own images, within a night
--data photos/ --space mobilenetv2:stem_stride=2 --name study --wall-time 10
# low fidelities of your own choice
--data photos/ --space mobilenetv2:stem_stride=2 --name study --lows none@1/9x20 kd@1/9x20"""
EVERYDAY = (
    *("lows", "architectures", "repeats", "low-repeats", "space", "data", "resolution", "teacher", "high.epochs"),
    *("max-macs", "gpu-hours", "wall-time", "device", "gpus", "workers", "name", "quiet", "verbose"),
)
HELP = {
    "architectures": "number of architectures to train; spread evenly over multiply-accumulates; can be raised later",
    "repeats": "full trainings of each architecture, with different seeds",
    "low_repeats": "trainings of each architecture at each low fidelity, with different seeds",
    "drop": "drop a low fidelity once another one that costs no more is clearly better",
}


def parser() -> Parser:
    """Flags of the command."""
    from engine.search.fidelity_study.design import FidelityStudy

    parser = command_parser(
        "Train some architectures in full and at several low fidelities, and recommend one of these fidelities for a "
        "search. Run the same command again to resume a study.",
        EXAMPLES,
    )
    parser.show_everyday(*EVERYDAY)
    group = parser.add_argument_group("What is compared")
    group.add_argument(
        "--lows",
        type=str,
        nargs="+",
        default=None,
        metavar="FIDELITY",
        help="low fidelities, like kd+at@1/27x30; each is LOSS@FRACTIONxEPOCHS[:name=value,...] with width, resolution "
        "or loss weights; by default four that suit the full fidelity",
    )
    for item in dataclasses.fields(FidelityStudy):
        if item.name in HELP:
            flag = f"--{item.name.replace('_', '-')}"
            group.add_argument(flag, type=type(item.default), default=item.default, help=HELP[item.name])
    add_options(parser, SearchConfig, skip=("low", "final", "method", "objectives", "proxies"))
    add_options(parser, Budget, skip=("max_low", "max_high", "target_accuracy", "final_training", "baselines"))
    add_options(parser, Resources)
    add_run_options(parser, name="fidelity-study")
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.fidelity_study.design import FidelityStudy
    from engine.search.fidelity_study.study import run_fidelity_study
    from engine.search.progress import Display
    from engine.trial import Fidelity

    settings = gather_settings(values)
    lows = tuple(map(Fidelity.parse, values.lows or ()))
    study = FidelityStudy(lows, *(values[name] for name in HELP))
    with Display(values.progress) as display:
        return run_fidelity_study(settings, study, run_dir_of(values), display)
