"""`export`: the winner of a run, or another of its architectures, as files that do not need this program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_device_option, add_run_argument, add_run_options, command_parser, gather
from engine.config import Resources
from engine.trial import UsageError

EXAMPLES = """\
# the winner of runs/photos, into runs/photos/export/ARCHITECTURE
photos
# another architecture that was trained in full
runs/photos --arch 3-1-0-2-4-3 --out phone/
# every network on the front of accuracy and size, with a table of them
photos --front"""


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "Export trained weights as safetensors, a model.py that needs only torch, ONNX and torch.export files, with a "
        "model card. Each format is verified to give the logits of the checkpoint."
    )
    parser = command_parser(text, EXAMPLES)
    add_run_argument(parser)
    parser.add_argument("--arch", type=str | None, default=None, help="ARCHITECTURE to export; by default, the winner")
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder to write, instead of RUN/export/ARCHITECTURE"
    )
    parser.add_argument(
        "--front",
        action="store_true",
        help="export every network on the front to OUT/ARCHITECTURE, with OUT/front.csv and OUT/front.md; by default, "
        "OUT is RUN/export; skip what is there",
    )
    add_device_option(parser)
    add_run_options(parser, run_dir=False)
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.front_export import export_front
    from engine.search.one_architecture import export, exporter, select_evaluation
    from engine.search.progress import Display
    from engine.search.runs import open_run

    if values.front and values.arch:
        raise UsageError("--front exports every network on the front and --arch one network: give one of them")
    found, resources = open_run(values.run), gather(Resources, values)
    with Display(values.progress) as display:
        if values.front:
            return export_front(found, Path(values.out or found.folder.exports).absolute(), resources, display)
        evaluation = select_evaluation(found, values.arch)
        out = Path(values.out) if values.out else found.folder.export(evaluation.trial.architecture)
        with exporter(found, resources) as fleet:
            return export(found, evaluation, out, fleet, display)
