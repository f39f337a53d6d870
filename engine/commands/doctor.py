"""`doctor`: checks whether this machine can run a search."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import command_parser
from engine.trial import EnvironmentUnusable

MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser(
        "Check what a search needs: packages, GPUs and their driver, the kernels and the data loader on each device, "
        "and the file system of the run folder. The exit code is 3 if something required is broken."
    )
    parser.add_argument("--run-dir", type=str, default="runs", help="folder whose file system is tested")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    return parser


def run(values: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from engine.doctor import examine

    findings = examine(Path(values.run_dir))
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if values.json:
        print(json.dumps({"ok": not broken, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for finding in findings:
            text = f"{finding.detail}\n-> {finding.remedy}" if finding.remedy else finding.detail
            table.add_row(MARKS[finding.status], finding.name, text)
        Console(highlight=False, markup=False).print(table)
    if broken:
        raise EnvironmentUnusable(f"{len(broken)} of {len(findings)} checks failed ({', '.join(broken)})")
