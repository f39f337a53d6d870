"""`predict`: the classes of images, by the network of a run or of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_device_option, command_parser, gather
from engine.config import Resources
from engine.trial import EnvironmentUnusable, UsageError

EXAMPLES = """\
# the winner of runs/photos
photos cat.jpg dog.png
# a folder of images, by an export, the three most probable classes of each
runs/photos/export/3-1-0-2-4-3 new/ --top 3
photos new/ --json"""


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "Classify images with the network that `export` takes from a run, or with an export. Images are prepared as "
        "those that `eval` counts. Prints a line for each image, with its most probable classes; the probabilities "
        "are the network's own, which tends to be too sure."
    )
    parser = command_parser(text, EXAMPLES)
    parser.usage = "%(prog)s RUN|EXPORT IMAGE... [options]"
    parser.add_argument("run", metavar="RUN|EXPORT", type=str, help="run folder, a name under runs/, or an export")
    parser.add_argument(
        "images", metavar="IMAGE", type=str, nargs="+", help="image files, or folders of them, in any format of --data"
    )
    parser.add_argument("--arch", type=str | None, default=None, help="ARCHITECTURE of RUN; by default, the winner")
    parser.add_argument("--top", type=int, default=1, help="number of classes to show for each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_device_option(parser)
    return parser


def run(values: Namespace) -> None:
    from engine.search.one_architecture import predict

    if values.top < 1:
        raise UsageError(f"--top {values.top}: give a number of classes, at least 1")
    images = [Path(one) for one in values.images]
    found = predict(values.run, values.arch, images, values.top, gather(Resources, values))
    print(json.dumps(found) if values.json else text(found))
    unreadable = found["unreadable"]
    if unreadable:
        whole = len(unreadable) + len(found["images"])
        named = "".join(f"\n  {file}: {why}" for file, why in unreadable.items())
        raise EnvironmentUnusable(f"{len(unreadable)} of {whole} files cannot be read as an image:{named}")


def text(found: dict[str, Any]) -> str:
    """A line for each image: the file, then its classes with their probabilities."""
    rows = [[f"{one['class']} {one['probability']:.3f}" for one in image["classes"]] for image in found["images"]]
    names = [image["file"] for image in found["images"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = max(map(len, names), default=0)
    lines = []
    for name, row in zip(names, rows, strict=True):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([f"{name:<{first}}", *cells]).rstrip())
    return "\n".join(lines)
