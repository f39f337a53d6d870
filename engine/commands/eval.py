"""`eval`: the accuracy of one architecture's weights, in all and at each class."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
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
from engine.tasks import Normalisation, SplitName
from engine.trial import Architecture, Evaluation, Fidelity, Trial, UsageError

if TYPE_CHECKING:
    from engine.search.runs import Run

EXAMPLES = """\
# the winner of runs/photos on images that it has not seen, then on another data set with the same classes
photos
photos --split all --data newer-photos/
# every class and the whole confusion matrix, for a program
photos --json
# weights without a run
--space nasbench201 --arch 3-1-0-2-4-3 --weights weights.safetensors --data photos/ --split test"""
BY_CLASS = ("classes", "confusion")  # what a result holds of each class
USED = ("space", "data", "resolution", "valid_fraction", "amp_dtype", "data_backend", "seed")


@dataclass(frozen=True)
class Chosen:
    """The weights to score: those of a trial, trained on images like `trained_on` (None: like the data given).

    `run` is the run that they belong to, if one was named, and `evaluation` the training in it.
    """

    trial: Trial
    weights: Path
    trained_on: Normalisation | None = None
    run: Run | None = None
    evaluation: Evaluation | None = None


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "Score the weights of one architecture, and show how good they are at each class. With RUN, these are the "
        "weights of its winner after the final training, the settings are those of the run and images are normalised "
        "as in its training; --data may name another data set with the same classes."
    )
    parser = command_parser(text, EXAMPLES)
    add_optional_run(parser)
    split = "split of the data to score on; by default valid, or test for a network that was trained on both others"
    parser.add_argument("--split", type=SplitName | None, default=None, help=split)
    parser.add_argument(
        "--weights", type=str | None, default=None, help="FILE of weights to score, instead of those of RUN"
    )
    parser.add_argument(
        "--json", action="store_true", help="print every class and the confusion matrix as one JSON object, no table"
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
    from engine.search.class_scores import table
    from engine.search.one_architecture import score
    from engine.search.progress import Display

    config = dataclasses.replace(SearchConfig(), **{name: values[name] for name in USED})
    chosen = _chosen(values)
    own = chosen.run is not None and not values.weights and _settings(chosen.run).items() <= vars(values).items()
    seen = own and chosen.trial.fidelity.with_valid
    split: SplitName = values.split or ("test" if seen else "valid")
    with Display("none" if values.json else values.progress) as display:
        if seen and split != "test":
            display.say(f"this network was trained on the {split} split too: --split test shows how good it is")
        result = score(config, gather(Resources, values), chosen.trial, chosen.weights, split, chosen.trained_on)
        if own:
            _record(chosen, split, result)
        scored_on = "all images" if split == "all" else f"the {split} split"
        display.say(
            f"{result['architecture']} on {scored_on} of {config.data} ({result['images']:,} images): "
            f"accuracy {result['accuracy']:.4f} ± {result['standard_error']:.4f}"
        )
        for note in result["notes"]:
            display.say(f"{config.data}: {note}")
        display.print("\n".join(table(result, display.width)))
    return result if values.json else {name: value for name, value in result.items() if name not in BY_CLASS}


def _chosen(values: Namespace) -> Chosen:
    """The weights that the flags name."""
    from engine.search.one_architecture import select_evaluation
    from engine.search.runs import open_run

    if not values.run:
        if not (values.arch and values.weights):
            raise UsageError("nothing to score: give a RUN, or --space, --arch, --weights and --data")
        return Chosen(Trial(0, Architecture.parse(values.arch), Fidelity("high")), Path(values.weights))
    found = open_run(values.run)
    if values.weights and values.arch:
        trial = Trial(0, Architecture.parse(values.arch), found.plan.high)
        return Chosen(trial, Path(values.weights), found.data.normalisation, found)
    evaluation = select_evaluation(found, values.arch)
    weights = Path(values.weights) if values.weights else found.folder.weights(evaluation.trial)
    return Chosen(evaluation.trial, weights, found.data.normalisation, found, evaluation)


def _record(chosen: Chosen, split: str, result: dict[str, Any]) -> None:
    """Keeps the scores of the winner for the report, if the run folder can be written: it may be somebody else's."""
    from engine.search.class_scores import save

    assert chosen.run is not None
    winner = chosen.run.final or chosen.run.best
    if chosen.evaluation is not None and chosen.evaluation == winner:
        scores = {name: result[name] for name in ("accuracy", "standard_error", "images", *BY_CLASS)}
        with suppress(OSError):
            save(chosen.run.folder, chosen.evaluation, split, scores)
