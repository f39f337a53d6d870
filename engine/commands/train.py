"""`train`: trains one architecture in full, with the code that a search uses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import (
    Parser,
    add_optional_run,
    add_options,
    add_run_options,
    command_parser,
    gather,
    with_settings,
)
from engine.config import Resources, RunSettings, SearchConfig
from engine.trial import Fidelity, UsageError

if TYPE_CHECKING:
    from engine.search.runs import Run

EXAMPLES = """\
# the winner of runs/photos, from scratch, for longer
photos --epochs 300 --out runs/photos-long
# the same, fine-tuned from the weights of the run
photos --weights run --epochs 20 --lr 0.01 --out runs/tuned
# another architecture, distilled from the teacher of the run
photos --arch 3-1-0-2-4-3 --kd-loss kd+at --out runs/other
# without a run
--space nasbench201 --arch 3-1-0-2-4-3 --data photos/ --epochs 100 --out runs/plain"""
EVERYDAY = (
    *("arch", "out", "epochs", "kd-loss", "weights", "space", "data", "resolution", "teacher", "batch-size", "lr"),
    *("device", "gpus", "quiet", "verbose"),
)
# Settings for choosing among architectures, and those that have a flag of their own here.
LEFT_OUT = (
    *("method", "objectives", "only", "low", "high", "final", "initial_weights"),
    *("min_macs", "max_macs", "max_params", "max_latency_ms", "latency", "latency_batch", "fidelity_study"),
)


def parser() -> Parser:
    """Flags of the command."""
    text = (
        "Train one architecture in full and score it on the test split. RUN gives the settings; flags change them. Run "
        "the same command again to resume. The folder it writes is a run like any other."
    )
    parser = command_parser(text, EXAMPLES)
    parser.show_everyday(*EVERYDAY)
    hints, high = get_type_hints(Fidelity), SearchConfig().high
    add_optional_run(parser)
    parser.add_argument("--out", type=str, default="runs/train", help="folder to write")
    parser.add_argument("--epochs", type=int, default=high.epochs, help="passes over the training images")
    parser.add_argument(
        "--kd-loss", type=hints["kd_loss"], default=high.kd_loss, help="distillation terms added to the cross entropy"
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="weights to start from; `run` means those of RUN"
    )
    add_options(parser, SearchConfig, skip=LEFT_OUT)
    add_options(parser, Resources, skip=("students_per_gpu",))
    add_run_options(parser, run_dir=False)
    return parser


def with_defaults(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    return with_settings(parser, arguments, _settings)


def _settings(found: Run) -> dict[str, Any]:
    config, own = found.config, found.folder.teacher
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SearchConfig) if f.name not in LEFT_OUT}
    settings |= {"epochs": config.high.epochs, "kd_loss": config.high.kd_loss}
    return settings | ({"teacher": own} if config.teacher == "auto" and own.is_file() else {})


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.one_architecture import select_evaluation, train
    from engine.search.progress import Display
    from engine.search.runs import open_run

    found = open_run(values.run) if values.run else None
    base = found.config if found else SearchConfig()
    given = {f.name: values[f.name] for f in dataclasses.fields(SearchConfig) if f.name not in LEFT_OUT}
    high = dataclasses.replace(base.high, epochs=values.epochs, kd_loss=values.kd_loss)
    architecture = values.arch or (str(select_evaluation(found, None).trial.architecture) if found else "")
    if not architecture:
        raise UsageError("name an architecture with --arch 3-1-0-2-4-3, or a RUN, whose winner is then trained")
    weights = _weights(values.weights, found, architecture)
    config = dataclasses.replace(base, **given, high=high, initial_weights=weights)
    with Display(values.progress) as display:
        settings = RunSettings(config, resources=gather(Resources, values))
        return train(settings, architecture, Path(values.out), display)


def _weights(asked: str | None, found: Run | None, architecture: str) -> str:
    from engine.search.one_architecture import select_evaluation

    if not asked:
        return ""
    if asked != "run":
        if not Path(asked).is_file():
            raise UsageError(f"no weights file {asked}")
        return str(Path(asked).absolute())
    if found is None:
        raise UsageError("--weights run needs a RUN")
    return str(found.folder.weights(select_evaluation(found, architecture).trial))
