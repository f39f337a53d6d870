"""`eval`: the accuracy of one architecture's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import (
    add_device_option,
    add_optional_run,
    add_options,
    add_run_options,
    command_parser,
    gather,
    with_settings,
)
from engine.config import Resources, SearchConfig
from engine.tasks import SplitName
from engine.trial import Architecture, Fidelity, Trial, UsageError

if TYPE_CHECKING:
    from engine.search.runs import Run

EXAMPLES = """\
# the winner of runs/photos on images that it has not seen, then on another data set with the same classes
photos
photos --split all --data newer-photos/
# weights without a run
--space nasbench201 --arch 3-1-0-2-4-3 --weights weights.safetensors --data photos/ --split test"""
USED = ("space", "data", "resolution", "valid_fraction", "amp_dtype", "data_backend", "seed")


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "Score the weights of one architecture. With RUN, the settings are those of the run and images are normalised "
        "as in its training; --data may name another data set with the same classes."
    )
    parser = command_parser(text, EXAMPLES)
    add_optional_run(parser)
    split = "split of the data to score on; by default valid, or test for a network that was trained on both others"
    parser.add_argument("--split", type=SplitName | None, default=None, help=split)
    parser.add_argument(
        "--weights", type=str | None, default=None, help="FILE of weights to score, instead of those of RUN"
    )
    add_options(
        parser, SearchConfig, skip=tuple(f.name for f in dataclasses.fields(SearchConfig) if f.name not in USED)
    )
    add_device_option(parser)
    add_run_options(parser, run_dir=False)
    return parser


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    return with_settings(parser, arguments, _settings)


def _settings(found: Run) -> dict[str, Any]:
    # Another data set is resized to the resolution of the run.
    return {name: getattr(found.config, name) for name in USED} | {"resolution": found.data.resolution}


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.one_architecture import score, select_evaluation
    from engine.search.progress import Display
    from engine.search.runs import open_run

    config = dataclasses.replace(SearchConfig(), **{name: values[name] for name in USED})
    if values.run:
        found = open_run(values.run)
        if values.weights and values.arch:
            trial = Trial(0, Architecture.parse(values.arch), found.plan.high)
        else:
            trial = select_evaluation(found, values.arch).trial
        weights, known = values.weights or found.folder.weights(trial), found.data.normalisation
    else:
        if not (values.arch and values.weights):
            raise UsageError("nothing to score: give a RUN, or --space, --arch, --weights and --data")
        trial, weights, known = Trial(0, Architecture.parse(values.arch), Fidelity("high")), values.weights, None
    with Display(values.progress) as display:
        seen = trial.fidelity.with_valid and not values.weights
        split: SplitName = values.split or ("test" if seen else "valid")
        if seen and split != "test" and config.data == found.config.data:
            display.say(f"this network was trained on the {split} split too: --split test shows how good it is")
        result = score(config, gather(Resources, values), trial, Path(weights), split, known)
        scored_on = "all images" if split == "all" else f"the {split} split"
        display.say(
            f"{trial.architecture} on {scored_on} of {config.data} ({result['images']} images): "
            f"accuracy {result['accuracy']:.4f}"
        )
        for note in result["notes"]:
            display.say(f"{config.data}: {note}")
        return result
