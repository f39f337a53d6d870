"""`teacher`: trains a teacher, or checks one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from engine.commands.flags import Parser, add_options, add_run_options, command_parser, gather_settings
from engine.config import Resources, SearchConfig, check_paths, check_settings, is_library_model
from engine.tasks import Statistic, task_to_json
from engine.trial import LOSS_WEIGHTS, UsageError

EXAMPLES = """\
# fine-tune a network of torchvision on your own images, for search --teacher
--data photos/ --arch torchvision:resnet18 --out teacher.safetensors
# the largest network of a space, trained from scratch
--data photos/ --space mobilenetv2:stem_stride=2 --out teacher.safetensors
# whether a file fits the data
--data photos/ --check teacher.safetensors"""
EVERYDAY = (
    *("arch", "out", "weights", "mean", "std", "check", "space", "data", "resolution", "from-scratch"),
    *("teacher-epochs", "batch-size", "lr", "device", "gpus", "quiet", "verbose"),
)
# Settings for choosing among architectures, and for students.
LEFT_OUT = (
    *("teacher", "low", "high", "final", "method", "objectives", "only", "initial_weights", "fidelity_study"),
    *("min_macs", "max_macs", "max_params", "max_latency_ms", "latency", "latency_batch", *LOSS_WEIGHTS),
)
SEARCH_ONLY = (
    *("students_per_gpu", "teacher_cache", "compile", "workers", "min_nodes", "max_nodes"),
    *("trial_timeout", "grace_s", "time_limit"),
)


def parser() -> Parser:
    """Flags of the command."""
    parser = command_parser("Train a teacher on a data set and save it, or check that one fits a data set.", EXAMPLES)
    parser.show_everyday(*EVERYDAY)
    networks = "auto, ARCHITECTURE, torchvision:NAME, timm:NAME or FILE.py:NAME; auto is the largest of the space"
    parser.add_argument("--arch", type=str, default="auto", help=networks)
    parser.add_argument("--out", type=str, default="teacher.safetensors", help="file to write")
    ready = "trained weights to import for --arch, instead of training; safetensors, or a state dict in .pt"
    parser.add_argument("--weights", type=str | None, default=None, help=ready)
    known = "of the images that --weights were trained on, like 0.485,0.456,0.406; by default that of the data"
    parser.add_argument("--mean", type=str, default="", help=f"mean {known}")
    parser.add_argument("--std", type=str, default="", help=f"standard deviation {known}")
    parser.add_argument(
        "--check", type=str | None, default=None, help="only check that the teacher in this file fits --data"
    )
    add_options(parser, SearchConfig, skip=LEFT_OUT)
    add_options(parser, Resources, skip=SEARCH_ONLY)
    add_run_options(parser, run_dir=False)
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.progress import Display
    from engine.search.setup import TeacherRequest, make_teacher

    if values.check and not Path(values.check).is_file():
        raise UsageError(f"no teacher file {values.check}")
    if Path(values.out).suffix != ".safetensors":
        raise UsageError(f"--out {values.out}: a teacher is a .safetensors file")
    if values.weights and Path(values.out).exists():
        raise UsageError(f"{values.out} already exists; remove it, or choose another --out")
    settings = gather_settings(values)
    if settings.config.recipe == "auto" and is_library_model(values.arch) and not values.from_scratch:
        # The flags are above the recipe of this network, whatever that of the space is.
        settings = replace(settings, config=replace(settings.config, recipe="finetune"))
    check_settings(settings)
    check_paths(replace(settings.config, teacher="auto"))
    request = TeacherRequest(
        network=values.arch,
        path=Path(values.check or values.out),
        check_only=bool(values.check),
        weights=Path(values.weights) if values.weights else None,
        mean=_channels("mean", values),
        std=_channels("std", values),
    )
    with Display(values.progress) as display:
        return task_to_json(make_teacher(settings, request, display))


def _channels(name: str, values: Namespace) -> Statistic | None:
    """Three comma-separated numbers; None if the flag is not given."""
    text: str = values[name]
    if not text:
        return None
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        red = green = blue = -1.0
    if not values.weights or min(red, green, blue) < 0 or (name == "std" and 0 in (red, green, blue)):
        raise UsageError(f"--{name} {text}: give three comma-separated numbers, and --weights")
    return red, green, blue
