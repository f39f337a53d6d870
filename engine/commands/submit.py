"""`submit`: runs a search as a batch job that requeues itself until the search has finished."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from engine.commands import search
from engine.commands.flags import Parser, example_text, gather_settings, recipe_defaults, run_dir_of
from engine.config import Resources, SearchConfig, check_paths
from engine.fleet.supervisor import ROOT
from engine.run_folder import write_atomically
from engine.trial import EngineError, EnvironmentUnusable, UsageError

if TYPE_CHECKING:
    from engine.fleet.submit import Job

EXAMPLES = """\
# write runs/photos/slurm.sh
slurm --gpus 8 --time 24:00:00 --data photos/ --space mobilenetv2:stem_stride=2 --name photos
# write it for two nodes, and submit it
slurm --gpus 8 --nodes 2 --time 24:00:00 --data photos/ --space mobilenetv2:stem_stride=2 --name photos --go
kubernetes --gpus 8 --cpus 64 --memory-gb 400 --image mfkd:1 --claim work:/work --data photos/"""
EVERYDAY = (
    *("space", "data", "teacher", "max-macs", "max-low", "max-high", "name", "gpus", "partition", "account", "time"),
    *("cpus", "memory-gb", "job-options", "worker-init", "image", "claim"),
    *("nodes", "requeues", "script", "no-check", "go"),
)
# Flags of `search` that make no sense in a job, with the reason.
REFUSED = {
    "executor": "the search runs on the nodes of its own job",
    "min_nodes": "--nodes sets the number of nodes",
    "max_nodes": "--nodes sets the number of nodes",
    "address": "the nodes of a job find each other",
    "dry_run": "use search --dry-run to estimate the cost",
}
NOT_PASSED_ON = {*REFUSED, "config", "progress", "verbose"}
FILES = {"slurm": "slurm.sh", "pbs": "pbs.sh", "lsf": "lsf.sh", "kubernetes": "kubernetes.yaml"}
SUBMIT = {
    "slurm": ("sbatch", "--parsable"),
    "pbs": ("qsub",),
    "lsf": ("bsub",),
    "kubernetes": ("kubectl", "create", "-o", "name", "-f"),
}
with_defaults = search.with_defaults


def parser() -> Parser:
    """Flags of the command: those of `search`, and those of the job."""
    parser = search.parser()
    parser.usage = "%(prog)s SCHEDULER [options]"
    parser.description = (
        "Write the script (Kubernetes: the manifest) of a batch job that runs a search and requeues itself until the "
        "search has finished. The flags are those of `search`; those from --partition to --claim describe the job."
    )
    parser.epilog = example_text(EXAMPLES)
    parser.show_everyday(*EVERYDAY)
    parser.add_argument("scheduler", type=Literal["slurm", "pbs", "lsf", "kubernetes"], help="scheduler of the job")
    group = parser.add_argument_group("The job")
    group.add_argument("--nodes", type=int, default=1, help="nodes of the job; more than one needs Slurm")
    group.add_argument("--requeues", type=int, default=20, help="maximum number of requeues of the job")
    group.add_argument(
        "--script", type=str | None, default=None, help="file to write, instead of one in the run folder"
    )
    group.add_argument("--no-check", action="store_true", help="accept --data and --teacher that only the nodes have")
    group.add_argument("--go", action="store_true", help="submit the job too")
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.fleet.submit import render
    from engine.search.setup import validated_space

    settings = gather_settings(values)
    validated_space(settings)
    _check(values)
    job = make_job(values, settings.resources)
    script, text = Path(job.script), render(values.scheduler, job)
    _check_files(values, settings.config)
    try:
        for folder in (Path(job.output), script.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(script, text)
    except OSError as error:
        raise EnvironmentUnusable(f"cannot write {error.filename}: {error.strerror}") from error
    result = {"scheduler": values.scheduler, "script": job.script}
    return {**result, "job": submit_job(values.scheduler, script)} if values.go else result


def _check(values: Namespace) -> None:
    """Raises UsageError for flags of `search` that a job refuses, and for numbers that are too small."""
    for name, reason in REFUSED.items():
        if values[name] != search.parser().get_default(name):
            raise UsageError(f"submit does not accept --{name.replace('_', '-')}: {reason}")
    for name, least in (("nodes", 1), ("requeues", 0)):
        if values[name] < least:
            raise UsageError(f"--{name} is {values[name]}; it must be at least {least}")


def _check_files(values: Namespace, config: SearchConfig) -> None:
    """Raises EngineError for --data or --teacher that are not here; says so where that cannot be known."""
    if values.scheduler == "kubernetes":
        print(f"--data {config.data} was not checked: only pods see the volume {values.claim}", file=sys.stderr)
    elif not values.no_check:
        try:
            check_paths(config)
        except EngineError as error:
            raise type(error)(f"{error}; if only the nodes have it, add --no-check") from None


def make_job(values: Namespace, resources: Resources) -> Job:
    """The job that a command line describes."""
    from engine.fleet.submit import Job

    folder = run_dir_of(values).absolute()
    in_image = values.scheduler == "kubernetes"  # which has its own interpreter
    return Job(
        arguments=tuple(search_arguments(values)),
        program=("mfkd",) if in_image else (sys.executable, str(ROOT / "cli.py")),
        folder=str(Path.cwd()),
        name=folder.name,
        script=str(Path(values.script).absolute() if values.script else folder / FILES[values.scheduler]),
        output=str(folder),
        resources=resources,
        nodes=values.nodes,
        requeues=values.requeues,
    )


def search_arguments(values: Namespace) -> list[str]:
    """The arguments of the search in the job: every setting that is not a default, except those of the job itself.

    The space is always included, since a search without arguments runs the demo.
    """
    job_options = {item.name for item in dataclasses.fields(Resources) if item.metadata.get("job")}
    arguments, flags = [], search.parser()
    flags.set_defaults(recipe_defaults(flags, values))
    for key, default in flags.get_defaults().items():
        changed = values[key] != default or key == "space"
        if key.split(".")[0] not in {*job_options, *NOT_PASSED_ON} and changed:
            text = str(values[key]).lower() if isinstance(default, bool) else str(values[key])
            arguments.append(f"--{key.replace('_', '-')}={text}")
    return ["search", *arguments, "--progress=lines"]


def submit_job(scheduler: str, script: Path) -> str:
    """Submits a script; returns what the scheduler prints, its name for the job."""
    command = [*SUBMIT[scheduler], *([] if scheduler == "lsf" else [str(script)])]
    try:
        with open(script) as text:
            done = subprocess.run(command, stdin=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EnvironmentUnusable(f"no {command[0]} here: submit {script} on a machine of the cluster") from None
    if done.returncode:
        raise EnvironmentUnusable(f"{command[0]} refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()
