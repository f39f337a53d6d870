"""`submit`: a search as a batch job that continues itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands import search
from engine.commands.flags import gather_settings, run_dir_of
from engine.config import Resources
from engine.run_folder import write_atomically
from engine.trial import EnvironmentUnusable, UsageError

EXAMPLES = """\
slurm --gpus 8 --time 24:00:00 --partition gpu --data photos/ --name photos          write runs/photos/slurm.sh
slurm --gpus 8 --nodes 2 --time 24:00:00 --data photos/ --name photos --go           and submit it
kubernetes --gpus 8 --cpus 64 --memory-gb 400 --image mfkd:1 --claim work:/work --data photos/"""
# What a search in a job has no use for, and what else is not for it.
OUTSIDE = {
    "executor": "the search runs on the nodes of its own job",
    "min_nodes": "--nodes says how many nodes the job has",
    "max_nodes": "--nodes says how many nodes the job has",
    "address": "the nodes of a job know each other",
    "dry_run": "search --dry-run says what it would cost",
}
NOT_PASSED = {*OUTSIDE, "config", "progress", "verbose"}
FILES = {"slurm": "slurm.sh", "pbs": "pbs.sh", "lsf": "lsf.sh", "kubernetes": "kubernetes.yaml"}
SUBMIT = {
    "slurm": ("sbatch", "--parsable"),
    "pbs": ("qsub",),
    "lsf": ("bsub",),
    "kubernetes": ("kubectl", "create", "-o", "name", "-f"),
}
with_defaults = search.with_defaults


def parser() -> ArgumentParser:
    """Flags of the command: those of `search`, and how the job is made."""
    made = search.parser()
    made.usage = "%(prog)s SCHEDULER [options]"
    made.description = (
        "Write the batch script, or the manifest, of a job that runs a search and goes back into the queue until the "
        "search is finished. Flags are those of `search`; --partition to --claim say what the job is to have."
    )
    made.epilog = "\n".join(["examples:", *(f"  %(prog)s {line}" for line in EXAMPLES.splitlines())])
    made.add_argument("scheduler", type=Literal["slurm", "pbs", "lsf", "kubernetes"], help="what the job is for")
    group = made.add_argument_group("The job")
    group.add_argument("--nodes", type=int, default=1, help="nodes of the job; more than one needs Slurm")
    group.add_argument("--requeues", type=int, default=20, help="times that the job goes back into the queue")
    group.add_argument(
        "--script", type=str | None, default=None, help="file to write, instead of one in the run folder"
    )
    group.add_argument("--go", action="store_true", help="submit it")
    return made


def run(values: Namespace) -> dict[str, Any]:
    from engine.fleet.submit import Job, render
    from engine.search.setup import validated_space

    settings = gather_settings(values)
    resources = settings.resources
    validated_space(settings)
    for name, reason in OUTSIDE.items():
        if values[name] != search.parser().get_default(name):
            raise UsageError(f"submit takes no --{name.replace('_', '-')}: {reason}")
    for name, least in (("nodes", 1), ("requeues", 0)):
        if values[name] < least:
            raise UsageError(f"--{name} is {values[name]}; it must be at least {least}")
    folder = run_dir_of(values).absolute()
    script = Path(values.script).absolute() if values.script else folder / FILES[values.scheduler]
    inside = values.scheduler == "kubernetes"  # of an image, where this interpreter is not
    job = Job(
        words=tuple(words(values)),
        program=("mfkd",) if inside else (sys.executable, str(Path(search.__file__).resolve().parents[2] / "cli.py")),
        folder=str(Path.cwd()),
        name=folder.name,
        script=str(script),
        output=str(folder),
        resources=resources,
        nodes=values.nodes,
        requeues=values.requeues,
    )
    text = render(values.scheduler, job)
    try:
        for made in (folder, script.parent):
            made.mkdir(parents=True, exist_ok=True)
        write_atomically(script, text)
    except OSError as error:
        raise EnvironmentUnusable(f"{error.filename} cannot be written: {error.strerror}") from error
    result = {"scheduler": values.scheduler, "script": str(script)}
    return {**result, "job": submit_job(values.scheduler, script)} if values.go else result


def words(values: Namespace) -> list[str]:
    """The search's command line without what is the job's: whatever is not the default, wherever it came from. The
    space is always named: a search that is told nothing runs the demo."""
    defaults = search.parser().get_defaults()
    of_the_job = {item.name for item in dataclasses.fields(Resources) if item.metadata.get("job")}
    given = []
    for key, default in defaults.items():
        changed = values[key] != default or key == "space"
        if key.split(".")[0] not in {*of_the_job, *NOT_PASSED} and changed:
            text = str(values[key]).lower() if isinstance(default, bool) else str(values[key])
            given.append(f"--{key.replace('_', '-')}={text}")
    return ["search", *given, "--progress=lines"]


def submit_job(scheduler: str, script: Path) -> str:
    """What the scheduler calls the job that it was given."""
    command = [*SUBMIT[scheduler], *([] if scheduler == "lsf" else [str(script)])]
    try:
        with open(script) as text:
            done = subprocess.run(command, stdin=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EnvironmentUnusable(f"no {command[0]} here: submit {script} on a machine of the cluster") from None
    if done.returncode:
        raise EnvironmentUnusable(f"{command[0]} refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()
