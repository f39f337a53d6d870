"""`report`: writes an HTML page and a CSV file about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser(
        "Write RUN/report/index.html, a page that needs no network, and RUN/report/trials.csv. The search may still be "
        "running."
    )
    add_run_argument(parser)
    parser.add_argument("--out", type=str | None, default=None, help="folder to write, instead of RUN/report")
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.report.write import write
    from engine.search.runs import open_run, with_answers

    found = with_answers(open_run(values.run))
    return write(found, Path(values.out).absolute() if values.out else found.folder.report)
