"""`teacher`: train a teacher, or check one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_options, add_run_options, command_parser, gather
from engine.config import Resources, Study
from engine.trial import UsageError


def parser() -> ArgumentParser:
    """Flags of the command."""
    made = command_parser("Train a teacher on a data set and save it, or check one against a data set.")
    networks = "auto (the largest of the space), an ARCHITECTURE of it, or torchvision:NAME"
    made.add_argument("--arch", type=str, default="auto", help=networks)
    made.add_argument("--out", type=str, default="teacher.safetensors", help="file to write")
    made.add_argument("--check", type=str | None, default=None, help="only check that this FILE fits --data")
    add_options(made, Study, skip=("teacher", "low", "high", "method", "max_macs", "max_params"))
    add_options(made, Resources)
    add_run_options(made, run_dir=False)
    return made


def run(values: Namespace) -> dict[str, Any]:
    from engine.progress import Display
    from engine.search import make_teacher

    if values.check and not Path(values.check).is_file():
        raise UsageError(f"no teacher file {values.check}")
    study, resources = gather(Study, values), gather(Resources, values)
    with Display(values.progress) as show:
        return make_teacher(study, values.arch, resources, Path(values.check or values.out), show)
