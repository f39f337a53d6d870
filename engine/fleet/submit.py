"""Batch scripts and manifests that run a search as one job, and bring it back into the queue until it is finished.

A job that is about to end is warned, its search drains and exits with 75, and the job is queued again: `scontrol
requeue` of Slurm, `qsub` of the same script for PBS (only operators may requeue), a requeue exit code of LSF, another
pod of a Kubernetes Job. A search that has finished, or that another try would not change, ends the job.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from engine.config import Resources, walltime_s
from engine.fleet import jobs
from engine.trial import UsageError

DRAINED = 75  # what a drained search exits with: EX_TEMPFAIL of sysexits.h
FINAL = [1, 2, 3, 4]  # exit codes of a search that another try would not change
MARGIN_S = 30  # for the search to close and for the script to act, after the grace


@dataclass(frozen=True, slots=True)
class Job:
    """A search for a scheduler to run: `words` are what cli.py is given, `program` is how it is called."""

    words: tuple[str, ...]
    program: tuple[str, ...]
    folder: str  # where the words are to be understood
    name: str
    script: str  # the file that the text is written to
    output: str  # folder for what the job prints
    resources: Resources
    nodes: int = 1
    requeues: int = 20

    @property
    def warning_s(self) -> int:
        """How long before its end the job is to be warned."""
        return math.ceil(self.resources.grace_s) + MARGIN_S


def render(scheduler: str, job: Job) -> str:
    """The text of a job for a scheduler; UsageError for what the scheduler cannot do, or what it must be told."""
    jobs.check(scheduler, job.resources)
    if odd := re.search(r"[^\w./+=,@-]", job.output):
        raise UsageError(f"a scheduler cannot be told of the run folder {job.output} ('{odd[0]}'); choose --run-dir")
    if job.resources.time and walltime_s(job.resources.time) < 2 * job.warning_s:
        raise UsageError(
            f"--time {job.resources.time} is too short: the job is warned {job.warning_s} s before its end, which is "
            f"--grace-s and {MARGIN_S} s"
        )
    if job.nodes > 1 and scheduler != "slurm":
        raise UsageError(
            f"submit {scheduler} --nodes {job.nodes}: a job of several nodes needs Slurm's srun; submit one node, or "
            f"run search --executor {scheduler} --max-nodes {job.nodes}"
        )
    return RENDERERS[scheduler](job)


def slurm(job: Job) -> str:
    """For sbatch. B: because the warning is for the script; the processes of the workers need not know."""
    directives = [
        f"--job-name={job.name}",
        f"--output={job.output}/slurm-%j.out",
        "--open-mode=append",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={job.resources.time}",
        f"--signal=B:USR1@{job.warning_s}",
        "--requeue",
        *(["--no-kill"] if job.nodes > 1 else []),  # the others go on when a node is lost
        *jobs.slurm_options(job.resources),
    ]
    again = f"""
        if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.requeues} ]; then
            {_enough(job)}
        fi
        task=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
        scontrol requeue "${{task:-$SLURM_JOB_ID}}"
    """
    return _script(job, "sbatch", [f"#SBATCH {line}" for line in directives], again)


def pbs(job: Job) -> str:
    """For qsub. PBS gives no warning, so the search is told how long it has."""
    directives = [
        f"-N {job.name[:230]}",
        f"-o {job.output}/pbs.out",
        "-j oe",
        f"-l select=1:ncpus={job.resources.cpus}{jobs.pbs_chunk(job.resources)}",
        f"-l walltime={job.resources.time}",
        "-r y",
        *jobs.pbs_options(job.resources),
    ]
    again = f"""
        if [ "${{MFKD_REQUEUES:-0}}" -ge {job.requeues} ]; then
            {_enough(job)}
        fi
        qsub -v MFKD_REQUEUES="$((${{MFKD_REQUEUES:-0}} + 1))" {shlex.quote(job.script)}
    """
    limit = [f"--time-limit={walltime_s(job.resources.time) - MARGIN_S}"] if job.resources.time_limit == "auto" else []
    return _script(job, "qsub", [f"#PBS {line}" for line in directives], again, *limit)


def lsf(job: Job) -> str:
    """For bsub, which reads it from stdin. A file counts the requeues: LSF does not tell the job."""
    hours, minutes = divmod(-(-walltime_s(job.resources.time) // 60), 60)
    directives = [
        f"-J {job.name}",
        f"-o {job.output}/lsf-%J.out",
        f"-n {job.resources.cpus}",
        '-R "span[hosts=1]"',
        f"-W {hours}:{minutes:02}",
        f"-wa 'USR1' -wt '{-(-job.warning_s // 60)}'",
        "-r",
        f'-Q "{DRAINED}"',
        *jobs.lsf_options(job.resources),
    ]
    again = f"""
        tally={shlex.quote(job.output)}/lsf-$LSB_JOBID.requeues
        echo >> "$tally"
        if [ "$(wc -l < "$tally")" -gt {job.requeues} ]; then
            {_enough(job)}
        fi
    """
    return _script(job, "bsub <", [f"#BSUB {line}" for line in directives], again)


def _script(job: Job, hand_in: str, directives: list[str], again: str, *more: str) -> str:
    """A bash script: directives, the search, and `again` when it has drained.

    The search runs in the background, because bash looks at a signal only when what it waits for has ended, and bash
    has it ignore INT there. INT and TERM go to every process of a job: it is cancelled, or preempted and requeued by
    the scheduler. In neither case is it for the script to queue it again.
    """
    command = " \\\n    ".join([shlex.join(job.program), *map(shlex.quote, job.words), *more])
    setup = f"{job.resources.worker_init}\n" if job.resources.worker_init else ""
    head = "\n".join(["#!/bin/bash", f"# Hand it in with: {hand_in} FILE", *directives])
    return f"""{head}

cd {shlex.quote(job.folder)} || exit 3
{setup}
ended= signalled=
trap 'signalled=yes; kill -USR1 "$search" 2> /dev/null' USR1 USR2  # the warning: drain
trap 'signalled=yes; ended=yes' TERM                               # the search has been told, too
trap 'signalled=yes; ended=yes; kill "$search" 2> /dev/null' INT   # the search does not hear it
{command} &
search=$!
while
    signalled=
    wait "$search"; got=$?
    [ "$got" -ne 127 ] && code=$got  # 127: the signal came when all was over
    [ -n "$signalled" ]
do :; done

if [ "$code" -eq {DRAINED} ]; then
    [ -n "$ended" ] && exit 143
{textwrap.indent(textwrap.dedent(again).strip(), "    ")}
fi
exit "$code"
"""


def _enough(job: Job) -> str:
    """Ends a script that has been requeued as often as it may, by a code that is not a drained search's."""
    return f'echo "requeued {job.requeues} times and not finished: hand the script in again to go on" >&2; exit 1'


def kubernetes(job: Job) -> str:
    """For kubectl create. A drained pod counts against the limit of retries; an evicted one does not."""
    asked = job.resources
    claim, mount = jobs.claimed(asked)
    command = [*job.program, *job.words]
    container = {
        "name": "search",
        "image": asked.image,
        "command": ["bash", "-c", f"{asked.worker_init}\nexec {shlex.join(command)}"] if asked.worker_init else command,
        "workingDir": mount,
        "resources": {"limits": jobs.pod_limits(asked)},
        "volumeMounts": [{"name": "work", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onExitCodes": {"containerName": "search", "operator": "In", "values": FINAL}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    pod = {
        "restartPolicy": "Never",  # a pod failure policy needs it; the Job makes a new pod
        "terminationGracePeriodSeconds": job.warning_s,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    spec = {"backoffLimit": job.requeues, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}
    metadata = {"name": _label(job.name), **({"namespace": asked.partition} if asked.partition else {})}
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    return f"# Hand it in with: kubectl create -f FILE\n{yaml.safe_dump(manifest, sort_keys=False, width=1000)}"


def _label(name: str) -> str:
    """A run's name as Kubernetes takes it: RFC 1123, at most 63 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:63].strip("-") or "search"


RENDERERS: dict[str, Callable[[Job], str]] = {"slurm": slurm, "pbs": pbs, "lsf": lsf, "kubernetes": kubernetes}
