"""`report`: one HTML page and one CSV file about a run."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser


def parser() -> ArgumentParser:
    """Flags of the command."""
    made = command_parser(
        "Write RUN/report/index.html, one page that needs no network, and RUN/report/trials.csv. Works while the "
        "search runs: call it again for the newest."
    )
    add_run_argument(made)
    return made


def run(values: Namespace) -> dict[str, Any]:
    from engine.report.write import write
    from engine.search.runs import open_run, with_answers

    return write(with_answers(open_run(values.run)))
