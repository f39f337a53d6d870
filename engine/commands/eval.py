"""`eval`: the accuracy of one architecture's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from engine.config import Resources, Study
from engine.trial import Architecture, Fidelity, Trial, UsageError, weights_path

if TYPE_CHECKING:
    from engine.search.runs import Run

EXAMPLES = """\
photos                                    the winner of runs/photos on the validation images
photos --part all --data newer-photos/    on another data set with the same classes
--space nasbench201 --arch 3-1-0-2-4-3 --weights weights.safetensors --data photos/ --part test"""
USED = ("space", "data", "resolution", "valid_fraction", "amp_dtype", "data_backend", "seed")


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "Score the weights of one architecture. With RUN the settings are those of the run, --data may name another "
        "data set with the same classes, and images are normalised as in training."
    )
    made = command_parser(text, EXAMPLES)
    add_optional_run(made)
    made.add_argument("--part", type=Literal["valid", "test", "all"], default="valid", help="part of the data")
    made.add_argument("--weights", type=str | None, default=None, help="FILE of weights, instead of those of RUN")
    add_options(made, Study, skip=tuple(f.name for f in dataclasses.fields(Study) if f.name not in USED))
    add_device_option(made)
    add_run_options(made, run_dir=False)
    return made


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    return with_settings(parser, arguments, _settings)


def _settings(found: Run) -> dict[str, Any]:
    from engine.search.single import data_of

    # Another data set is brought to the size of the run's.
    return {name: getattr(found.study, name) for name in USED} | {"resolution": data_of(found)["resolution"]}


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.progress import Display
    from engine.search.runs import open_run
    from engine.search.single import chosen, data_of, score

    study = dataclasses.replace(Study(), **{name: values[name] for name in USED})
    if values.run:
        found = open_run(values.run)
        if values.weights and values.arch:
            trial = Trial(0, Architecture.parse(values.arch), found.plan.high)
        else:
            trial = chosen(found, values.arch).trial
        weights, known = values.weights or weights_path(found.folder, trial), data_of(found)
    else:
        if not (values.arch and values.weights):
            raise UsageError("say what to score: a RUN, or --space, --arch, --weights and --data")
        trial, weights, known = Trial(0, Architecture.parse(values.arch), Fidelity("high")), values.weights, None
    with Display(values.progress) as show:
        return score(study, trial, Path(weights), values.part, known, gather(Resources, values), show)
