"""`latency`: has networks timed on another device, and reads what it has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_options, command_parser
from engine.trial import UsageError

EXAMPLES = """\
export-probes --space mobilenetv2:stem_stride=2 --classes 20 --resolution 224 --out probes
# on the device: python time_probes.py
import probes --out phone.json"""


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "export-probes: write networks of a space, and a script that times them on another device; it needs only "
        "onnxruntime. import: read what the script has written into a file for search --latency FILE, and say how well "
        "the latency of other networks is predicted from it."
    )
    parser = command_parser(text, EXAMPLES)
    parser.usage = "%(prog)s {export-probes,import} [DIR] [options]"
    parser.add_argument("action", type=Literal["export-probes", "import"], help="what to do")
    what = "import: the folder of the probes with the latencies.json of the device, or that file"
    parser.add_argument("source", metavar="DIR", nargs="?", default="", help=what)
    parser.add_argument("--out", type=str, required=True, help="folder (export-probes) or file (import) to write")
    parser.add_argument("--space", type=str, default="nasbench201", help="space of the search")
    parser.add_argument("--classes", type=int, default=10, help="number of classes of the data")
    parser.add_argument("--resolution", type=int, default=32, help="image size of full trainings in pixels")
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier of full trainings")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--count", type=int, default=40, help="number of networks")
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice")
    parser.add_argument("--device", type=str, default="", help="import: name of the device, instead of its own")
    add_run_options(parser, run_dir=False)
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.latency.probes import export_probes, import_latencies, summary
    from engine.search.latency.table import BuiltSpace
    from engine.search.progress import Display

    for name in ("classes", "resolution", "batch"):
        if getattr(values, name) < 1:
            raise UsageError(f"--{name} is {getattr(values, name)}; it must be at least 1")
    with Display(values.progress) as display:
        if values.action == "export-probes":
            if values.source:
                raise UsageError(f"export-probes writes into --out; leave out {values.source}")
            networks = BuiltSpace(values.space, values.classes, values.width, values.resolution)
            return export_probes(networks, values.batch, values.count, values.seed, Path(values.out), display)
        if not values.source:
            raise UsageError("latency import: name the folder of the probes, or the latencies.json of the device")
        found = import_latencies(Path(values.source), values.device, Path(values.out))
        display.say(summary(found))
    return found
